"""Kernel launches with everything but the tensors worked out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: What a launch is prepared for: shape, strides, dtype and device of a tensor.
Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


def form(t: Tensor) -> Form:
    return t.shape, t.stride(), t.dtype, t.device


class Launch:
    """A kernel on a grid, with its numbers and constants: called with its tensors, or None, in the kernel's order.

    Tensors must have the dtypes and the device of the first call's, and be None where these were. If all are aligned to
    16 bytes, the compiled kernel is called directly, else through Triton's JIT. With an empty grid nothing is done.
    """

    def __init__(
        self, kernel: Any, grid: Sequence[int], numbers: Sequence[int], fixed: dict[str, Any], options: dict[str, int]
    ) -> None:
        self.kernel, self.grid, self.numbers, self.fixed, self.options = kernel, tuple(grid), numbers, fixed, options
        self.rest: list[Any] = []
        self.compiled: Callable[..., object] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        is_aligned = True
        for t in tensors:
            if t is not None and t.data_ptr() & 15:
                is_aligned = False
        if self.compiled is not None and is_aligned:
            self.compiled(*tensors, *self.numbers, *self.rest)
        elif self.grid:
            found = self.kernel[self.grid](*tensors, *self.numbers, **self.fixed, **self.options)
            if found is not None and is_aligned:  # the interpreter compiles nothing
                names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
                self.rest = [self.fixed[name] for name in names]
                self.compiled = found[(*self.grid, 1, 1)[:3]]
