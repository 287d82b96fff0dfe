"""What every kernel does to a result before it is rounded and stored."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """act(y) for float32 y; ACTIVATION '' is the identity. NaN stays NaN."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(y)
    elif ACTIVATION == "tanh":
        y = 2 * tl.sigmoid(2 * y) - 1
    else:
        tl.static_assert(ACTIVATION == "", "unknown activation")
    return y
