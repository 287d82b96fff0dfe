"""Layers whose weights are tied by a symmetry: mirrored and rotated filters, symmetric matrices, order-free models."""

from tritonsym import functional, nn, testing
from tritonsym.convert import load_cnn_symmetry, materialize, replace_layers
from tritonsym.dispatch import Plan, backend, explain, path
from tritonsym.packing import pack, pack_tril, pack_triu, unpack, unpack_tril, unpack_triu
from tritonsym.symmetry import FilterLayout, Symmetry

__version__ = "0.1.0"

__all__ = [
    "FilterLayout",
    "Plan",
    "Symmetry",
    "__version__",
    "backend",
    "explain",
    "functional",
    "load_cnn_symmetry",
    "materialize",
    "nn",
    "pack",
    "pack_tril",
    "pack_triu",
    "path",
    "replace_layers",
    "testing",
    "unpack",
    "unpack_tril",
    "unpack_triu",
]
