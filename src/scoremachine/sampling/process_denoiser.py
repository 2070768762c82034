"""A machine under a forward process, as an azula denoiser of coefficients."""

from __future__ import annotations

import torch
from azula.denoise import Denoiser, DiracPosterior
from torch import Tensor

from scoremachine.core.derivatives import check_untracked
from scoremachine.core.noise import PictureNoise
from scoremachine.core.processes import Process, Pyramid
from scoremachine.machines.machine import Bandwidth, Label, Machine
from scoremachine.runtime.lru import LRUCache


class ProcessDenoiser(Denoiser):
    """A machine under a process as an azula denoiser: E[z | z_t] of coefficients z = T x.

    Under a pyramid the finer bands are pure noise from some time on. From then on a machine of
    block means is used, which compares small pictures with small images.

    Arguments:
        machine: The machine.
        process: A process for pictures of the size of its images.
    """

    def __init__(self, machine: Machine, process: Process) -> None:
        super().__init__()
        process.check(machine.corpus.shape[1:])
        self.machine, self.schedule = machine, process
        self._coarse: LRUCache[ProcessDenoiser] = LRUCache(8)

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        label: Label = None,
        bandwidth: Bandwidth | None = None,
        noise: PictureNoise | None = None,
    ) -> DiracPosterior:
        """E[z | z_t] for coefficients z_t, shape (B, C, H, W), at a time t, shape ()."""
        check_untracked("t", t, "under a forward process D has one by z_t only")
        process, at = self.schedule, float(t)
        halvings = process.coarse(at) if isinstance(process, Pyramid) else 0
        if halvings:
            H, W = (n // 2**halvings for n in process.shape)
            mean = torch.zeros_like(z_t)
            small = self.coarse(halvings)(
                z_t[..., :H, :W] / 2**halvings, t, label, bandwidth, noise
            ).mean
            mean[..., :H, :W] = small * 2**halvings
            return DiracPosterior(mean=mean)
        x_t = process.picture(z_t)
        D = self.machine.denoise_through(process, x_t, at, label, bandwidth, noise)
        return DiracPosterior(mean=process.coefficients(D))

    def coarse(self, halvings: int) -> ProcessDenoiser:
        """The same for means of blocks with a side of 2^halvings pixels, which have less noise."""

        def made() -> ProcessDenoiser:
            process = self.schedule
            assert isinstance(process, Pyramid)
            machine = self.machine.smaller(self.machine.corpus.block_means(2**halvings))
            return ProcessDenoiser(machine.resolved(), process.halved(halvings))

        return self._coarse.get(halvings, made)
