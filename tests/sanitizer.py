"""Triton's interpreter, checking every access as compute-sanitizer does on a GPU, and kernels whose bugs it must find.

Import it only where TRITON_INTERPRET=1.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


def _places(t):
    """The address of every element."""
    at = np.array([t.data_ptr()])
    for size, stride in zip(t.shape, t.stride(), strict=True):
        at = np.add.outer(at, np.arange(size) * stride * t.element_size())
    return at


class Sanitizer:
    """While entered, `kernels` collects the names of launched kernels, and `found` what is wrong with them:

    accesses outside the tensors of the launch, two lanes of a store or two programs that write one address,
    a program that reads what another writes, and reads of what `torch.empty` left there (NaN, or the largest integer;
    inputs must hold neither).
    """

    def __init__(self):
        self.found, self.kernels, self.right = set(), set(), interpreter._interpreter

    def __enter__(self):
        self.launch = interpreter.GridExecutor.__call__

        def launch(executor, *args, **kwargs):
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            self.name, self.places = (
                executor.fn.__name__,
                np.unique(np.concatenate([_places(t).ravel() for t in tensors])),
            )
            self.accesses = {"reads": [], "writes": []}
            self.kernels.add(self.name)
            self.launch(executor, *args, **kwargs)
            self._conflicts()

        interpreter.GridExecutor.__call__, interpreter._interpreter = launch, self
        torch.use_deterministic_algorithms(True)  # fills torch.empty
        return self

    def __exit__(self, *_):
        interpreter.GridExecutor.__call__, interpreter._interpreter = self.launch, self.right
        torch.use_deterministic_algorithms(False)

    def __getattr__(self, name):  # atomic operations, which may share an address
        return getattr(self.right, name)

    def load(self, places, mask, other, dtype):
        inside, _ = self._access("reads", places, mask)
        values = self.right.load(places, inside, other, dtype)
        poison = np.isnan(values) if values.dtype.kind == "f" else values == np.iinfo(values.dtype).max
        if (poison & inside).any():
            self.found.add(f"{self.name}: a program reads what nobody wrote")
        return values

    def store(self, places, values, mask):
        inside, at = self._access("writes", places, mask)
        if len(np.unique(at)) < len(at):
            self.found.add(f"{self.name}: a store writes one address twice")
        return self.right.store(places, values, inside)

    def _access(self, kind, places, mask):
        """Which accesses are allowed, and their addresses."""
        places, mask = places.astype(np.int64), np.broadcast_to(mask, places.shape).astype(bool)
        inside = mask & (self.places.take(np.searchsorted(self.places, places), mode="clip") == places)
        if (inside != mask).any():
            self.found.add(f"{self.name}: {kind} out of bounds")
        at = places[inside]
        x, y, z = interpreter.interpreter_builder.grid_idx
        self.accesses[kind].append(np.stack([at, np.full_like(at, x << 40 | y << 20 | z)]))
        return inside, at

    def _conflicts(self):
        reads, writes = (np.unique(np.hstack([np.empty((2, 0), int), *a]), axis=1) for a in self.accesses.values())
        if (writes[0, 1:] == writes[0, :-1]).any():
            self.found.add(f"{self.name}: two programs write one address")
        by = dict(zip(*writes.tolist(), strict=True))
        if any(by.get(at, program) != program for at, program in zip(*reads.tolist(), strict=True)):
            self.found.add(f"{self.name}: a program reads what another writes")


@triton.jit
def reads_outside(x_ptr, y_ptr):
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(y_ptr + at, tl.load(x_ptr + at), mask=at < 6)  # of 6 values


@triton.jit
def writes_outside(x_ptr, y_ptr):
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < 6))


@triton.jit
def writes_twice(x_ptr, y_ptr):
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(y_ptr + at // 2, tl.load(x_ptr + at, mask=at < 6), mask=at < 6)


@triton.jit
def writes_the_same(x_ptr, y_ptr):
    at = tl.arange(0, 4)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def reads_anothers(x_ptr, y_ptr):
    at = tl.program_id(0) * 2 + tl.arange(0, 2)
    tl.store(x_ptr + at, 1.0)
    tl.store(y_ptr + at, tl.load(x_ptr + 3 - at))


@triton.jit
def reads_empty(x_ptr, y_ptr):
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(x_ptr + at, tl.load(y_ptr + at, mask=at < 6), mask=at < 6)


#: What the sanitizer says of each, launched as two programs with 6 values x and 6 empty y.
PLANTED = {
    reads_outside: "reads out of bounds",
    writes_outside: "writes out of bounds",
    writes_twice: "a store writes one address twice",
    writes_the_same: "two programs write one address",
    reads_anothers: "a program reads what another writes",
    reads_empty: "a program reads what nobody wrote",
}
