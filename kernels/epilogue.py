"""What kernels do to a result before they store it."""

import triton
import triton.language as tl


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """act(y) in float32; ACTIVATION is None or a name of `tritonsym.reference.ACTIVATIONS`."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # not a maximum: NaN stays NaN
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    if ACTIVATION == "sigmoid":
        y = tl.sigmoid(y)
    if ACTIVATION == "tanh":
        y = 2 * tl.sigmoid(2 * y) - 1
    return y
