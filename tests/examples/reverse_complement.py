"""DNA has two strands: a network whose prediction is the same for a sequence and its reverse complement.

One-hot channels are in the order A C T G: the complement exchanges the first two with the last two, A with T and C
with G. So a sequence is two fields of 'h', (A, T) and (C, G), and a group convolution may come first: 'h' moves fields
exactly as the reverse complement does.
"""

import torch
from torch import Tensor, nn

import tritonsym.nn as tnn

ORDER = "ACTG"


def one_hot(sequence: str) -> Tensor:
    """One-hot channels (4, length)."""
    return nn.functional.one_hot(torch.tensor([ORDER.index(base) for base in sequence]), 4).T.float()


def reverse_complement(sequence: str) -> str:
    return sequence[::-1].translate(str.maketrans("ACTG", "TGAC"))


def network(outputs: int, fields: int = 16) -> nn.Sequential:
    """From (N, 4, length) to (N, outputs)."""
    return nn.Sequential(
        tnn.GroupConv1d(2, fields, 15, padding=7, symmetry="h"),
        tnn.GroupBatchNorm1d(fields, "h"),
        nn.ReLU(),
        tnn.GroupConv1d(fields, 2 * fields, 7, padding=3, symmetry="h"),
        tnn.GroupBatchNorm1d(2 * fields, "h"),
        nn.ReLU(),
        tnn.GroupPool("h"),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
        nn.Linear(2 * fields, outputs),
    )
