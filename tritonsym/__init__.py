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
    """Find the fastest path and tiles on this GPU for every convolution and `SymmetricLinear` of a model, and use them
    from now on.

    The model runs once on `example_input` to learn the inputs of its layers; every layer is then searched for inference
    and for training, within `budget_s` seconds in all. What is found is kept in the user's cache directory
    (`tritonsym.tuned`); layers that are there already are not searched again. The model stays as it is.

    Returns:
        The entries {key: {"path": .., "tiles": .., "seconds": ..}} of the model's layers.
    Raises:
        ValueError: the input is not on a GPU, or no such layer is called in a dtype that kernels compute.

    >>> tritonsym.tune(nn.SymmetricLinear(8, 8), torch.ones(1, 8))
    Traceback (most recent call last):
    ValueError: tune: ...
    """
    from tritonsym.perf import tune as perf

    return perf.tune(model, example_input, budget_s)


def advise(
    model: Module, x: Tensor, symmetries: Sequence[str] | None = None, rounds: int = 5, save: bool = False
) -> Any:
    """Measure on this machine what symmetric convolutions would gain in a model: layer by layer, and all of it.

    Every convolution that `replace_layers` could replace is timed dense and symmetric, on the input that it gets from
    ``model(x)``, forward and in training (with the gradients of its input and parameters); then the whole model.

    Args:
        model: any module; it stays as it is.
        x: an input.
        symmetries: names to try; by default 'h', 'hv' and 'd4' (2-D), 'hvz' (3-D).
        rounds: samples of every time, of which the median counts.
        save: put the fastest path of every layer into the user's table for this machine (`tritonsym.tuned`), so that
            every later plan for such a layer says "Measured". On a GPU this searches for tiles, too, as `tune` does.
    Returns:
        An advice: `str` is a table, sorted by the time saved; ``.json()``; ``.plot(file)``, which needs matplotlib.
    Raises:
        ValueError: no convolution can be replaced, or an unknown symmetry.
        TypeError: not a module, or x is no tensor.

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
