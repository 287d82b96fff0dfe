"""Layers whose weights are tied by a symmetry: mirrored and rotated filters, symmetric matrices, order-free models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tritonsym import functional, nn, testing
from tritonsym.convert import init_, materialize, replace_layers
from tritonsym.importers import load_cnn_symmetry
from tritonsym.packing import pack, pack_tril, pack_triu, unpack, unpack_tril, unpack_triu
from tritonsym.plan import Plan, backend, explain, path
from tritonsym.symmetry import FilterLayout, Symmetry

if TYPE_CHECKING:
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
        ImportError: the packages of "tritonsym[perf]" are missing.
        ValueError: the input is not on a GPU, or no such layer is called in a dtype that kernels compute.
    """
    try:
        from tritonsym.perf import tune as perf
    except ImportError as error:
        raise ImportError(f'tune needs {error.name}: pip install "tritonsym[perf]"') from error
    return perf.tune(model, example_input, budget_s)


__all__ = [
    "FilterLayout",
    "Plan",
    "Symmetry",
    "__version__",
    "backend",
    "explain",
    "functional",
    "init_",
    "load_cnn_symmetry",
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
