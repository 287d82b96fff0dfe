"""The epilogue of every kernel: the activation, applied before a result is rounded and stored."""

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
        e = tl.exp(-2 * tl.abs(y))
        large = (1 - e) / (1 + e)
        large = tl.where(y < 0, -large, large)
        z = y * y  # small y: a least-squares fit of (tanh(y) / y - 1) / z, since the other form cancels there
        fit = (((-0.00610495 * z + 0.02100364) * z - 0.0538525) * z + 0.13332783) * z - 0.33333328
        y = tl.where(z < 0.390625, y + y * z * fit, large)
    else:
        tl.static_assert(ACTIVATION == "", "unknown activation")
    return y
