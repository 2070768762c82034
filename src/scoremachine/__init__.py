"""scoremachine: training-free diffusion, exact and fast.

For a finite set of images the ideal diffusion denoiser E[clean | noisy] has a closed form; so have
its local, shift-equivariant and patch-composite variants. This package computes them.

    import scoremachine as sm

    corpus = sm.Corpus.open("digits")
    machine = sm.build("els", corpus)
    pictures = sm.generate(machine, count=16, steps=20, seed=0)

The public names are those of `__init__.pyi`. Each is imported when it is first used, since PyTorch
takes a second to load.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
