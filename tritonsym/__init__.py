"""Layers whose weights are tied by a symmetry: mirrored and rotated filters, symmetric matrices, order-free models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tritonsym import functional, nn, testing
from tritonsym.convert import init_, materialize, replace_layers
from tritonsym.importers import load_cnn_symmetry, load_escnn
from tritonsym.packing import pack, pack_tril, pack_triu, unpack, unpack_tril, unpack_triu
from tritonsym.plan import Plan, backend, explain, path
from tritonsym.symmetry import FilterLayout, Symmetry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn import Module

__version__ = "0.1.0"


def tune(model: Module, example_input: Tensor, budget_s: float = 300) -> dict[str, Any]:
    """Find the fastest path and tiles on this GPU for every convolution and `SymmetricLinear` of a model.

    The model runs once on `example_input` to learn the inputs of its layers; every layer is then searched for inference
    and for training, within `budget_s` seconds in all. The results are kept in the user's cache directory
    (`tritonsym.tuned`), and used from now on; layers already there are not searched again. The model is not changed.

    Returns:
        The entries {key: {"path": .., "tiles": .., "seconds": ..}} of the model's layers.
    Raises:
        ValueError: the input is not on a GPU, or no such layer runs in a dtype that the kernels support.

    >>> tritonsym.tune(nn.SymmetricLinear(8, 8), torch.ones(1, 8))
    Traceback (most recent call last):
    ValueError: tune: ...
    """
    from tritonsym.perf import tune as perf

    return perf.tune(model, example_input, budget_s)


def advise(
    model: Module, x: Tensor, symmetries: Sequence[str] | None = None, rounds: int = 5, save: bool = False
) -> Any:
    """Measure on this machine what symmetric convolutions would gain in a model, layer by layer and overall.

    Every convolution that `replace_layers` could replace is timed dense and symmetric, on its input in ``model(x)``,
    forward and in training (with the gradients of its input and parameters); then the whole model.

    Args:
        model: any module; it is not changed.
        x: an input.
        symmetries: names to try; by default 'h', 'hv' and 'd4' (2-D), 'hvz' (3-D).
        rounds: how often everything is timed; the median counts.
        save: put the fastest path of every layer into the user's table for this machine (`tritonsym.tuned`), so that
            every later plan for such a layer says "Measured". On a GPU this also searches for tiles, as `tune` does.
    Returns:
        An `Advice`: its `str` is a table sorted by the time saved; ``.json()``; ``.plot(file)`` needs matplotlib.
    Raises:
        ValueError: no convolution can be replaced, or an unknown symmetry.
        TypeError: `model` is not a module, or x is not a tensor.

    >>> advice = tritonsym.advise(torch.nn.Conv2d(8, 8, 3), torch.randn(1, 8, 6, 6), symmetries=["h"], rounds=1)
    >>> "training, ms" in str(advice)
    True
    """
    from tritonsym.perf import advise as perf

    return perf.advise(model, x, symmetries, rounds, save)


__all__ = [
    "FilterLayout",
    "Plan",
    "Symmetry",
    "__version__",
    "advise",
    "backend",
    "explain",
    "functional",
    "init_",
    "load_cnn_symmetry",
    "load_escnn",
    "materialize",
    "nn",
    "pack",
    "pack_tril",
    "pack_triu",
    "path",
    "replace_layers",
    "testing",
    "tune",
    "unpack",
    "unpack_tril",
    "unpack_triu",
]
