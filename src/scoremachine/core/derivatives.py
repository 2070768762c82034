"""Helpers for automatic differentiation: errors for missing derivatives, `torch.func` wrappers.

A derivative that is not implemented has to be an error. `detach` would make it a silent zero, so
inputs without a derivative are checked before the computation (`check_untracked`), or raise when
their derivative is requested (`refused`).

Under `torch.func` a tensor may be a wrapper without values of its own: one for each `grad`, `jvp`
or `vmap` around the call. `values` unwraps it where Python code has to branch on its values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

P = ParamSpec("P")
R = TypeVar("R")

# no public function distinguishes wrappers from tensors; these exist as long as torch.func has
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_batchedtensor
_unwrapped = torch._C._functorch.get_unwrapped
# a context in which tensors are created outside all transforms, for what depends on a seed alone
outside_transforms = torch._C._DisableFuncTorch


def _layers(x: Tensor) -> list[Tensor]:
    """x and the tensors that it wraps, the outermost wrapper first."""
    found = [x]
    while _is_wrapped(found[-1]):
        found.append(_unwrapped(found[-1]))
    return found


def values(x: Tensor) -> Tensor:
    """The values of x without wrappers; axes that `vmap` maps over are dimensions of them."""
    with outside_transforms():
        return _layers(x)[-1].detach()


def mapped(x: Tensor) -> bool:
    """Whether x is one of many tensors that `torch.func.vmap` maps over."""
    return any(map(_is_batched, _layers(x)))


def tracked(x: Tensor) -> bool:
    """Whether autograd, `torch.func.grad` or `jvp` may require a derivative by x."""
    layers = _layers(x)
    if torch.is_grad_enabled() and any(each.requires_grad for each in layers):
        return True
    return any(not _is_batched(x) and unpack_dual(x).tangent is not None for x in layers)


def check_untracked(what: str, x: object, why: str) -> None:
    """NotImplementedError if a derivative by x may be required; `why` says which ones exist."""
    if isinstance(x, Tensor) and tracked(x):
        raise NotImplementedError(
            f"there is no derivative by {what} here: {why}; detach it where none is needed"
        )


class _Refused(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, sentence: str) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.sentence = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(ctx.sentence)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise NotImplementedError(ctx.sentence)


def refused(x: Tensor, sentence: str) -> Tensor:
    """x, whose derivative raises NotImplementedError with that sentence if it is required."""
    return _Refused.apply(x, sentence)


class _WithSlope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None
        (slope,) = ctx.saved_tensors
        return g, None, g.reshape(-1, *[1] * (slope.ndim - 1)) * slope

    @staticmethod
    def jvp(ctx: Any, value: Tensor | None, slope: Tensor | None, x: Tensor | None) -> Tensor:
        (known,) = ctx.saved_tensors
        along = 0 if x is None else (known * x).reshape(len(known), -1).sum(1)
        return along + (known.new_zeros(len(known)) if value is None else value)


def with_slope(value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """`value` (B,) with the gradient `slope` by x, both (B, ...), in addition to its own graph.

    Second derivatives are the first derivatives of `slope`.
    """
    return _WithSlope.apply(value, slope, x)


def regrouped(members: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Pictures that were computed in groups, in their original order.

    `members` are each group's positions, or a mask of them. The result is concatenated, since
    `torch.func` would not track writes into an empty tensor.
    """
    if len(parts) == 1:
        return parts[0]
    places = [m.nonzero()[:, 0] if m.dtype == torch.bool else m for m in members]
    return torch.cat(list(parts))[torch.argsort(torch.cat(places))]


def stacked(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that `vmap` maps over, (B, ...) each, as one larger batch (size B, ...)."""
    return [
        (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
        for x, dim in zip(tensors, dims, strict=True)
    ]


def untransformed(f: Callable[P, R]) -> Callable[P, R]:
    """A function that runs outside all transforms of `torch.func`, so that its result can be kept.

    Under a transform every new tensor is a wrapper, which is useless when the transform has ended.
    """

    @functools.wraps(f)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with outside_transforms():
            return f(*args, **kwargs)

    return called


def uncompiled(f: Callable[P, R]) -> Callable[P, R]:
    """A function that `torch.compile` does not trace, since its kernels are already compiled.

    Like `torch.compiler.disable`, but the compiler is imported only while it is compiling.
    """

    @functools.wraps(f)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(f)(*args, **kwargs)
        return f(*args, **kwargs)

    return called
