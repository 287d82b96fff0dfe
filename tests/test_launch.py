"""How stored weights become rows, and their gradients weights again."""

import pytest
import torch
from interpret import CASES, build

from tritonsym import reference


def dense_weight(spec, weights):
    """The definition in `ConvSpec`, tap by tap: (groups, filters, C, taps)."""
    *tied, shared = weights if any(not block.orbits for block in spec.blocks) else [*weights, None]
    channels = (tied or [shared])[0].shape[1]
    if shared is not None:
        shared = shared.flatten(2).unflatten(0, (spec.groups, -1))
        shared = shared.transpose(1, 2) if spec.geometry.transposed else shared  # [G, stored, C, taps]
        channels = shared.shape[2]
    dense, done = torch.zeros(spec.groups, len(spec.row_table), channels, len(spec.row_table[0])).double(), 0
    for block, images in zip(spec.blocks, spec.slot_table, strict=True):
        if block.orbits:
            stored = tied.pop(0).unflatten(0, (spec.groups, -1))
        else:
            stored, done = shared[:, done : done + block.filters], done + block.filters
        for first, slots, signs in images:
            for k, (slot, sign) in enumerate(zip(slots, signs, strict=True)):
                if sign:
                    dense[:, first : first + block.filters, :, k] = sign * stored[..., slot]
    return dense


@pytest.mark.parametrize("name", CASES)
def test_rows_of_stored_weights(name):
    spec = build(**CASES[name][0])
    weights = [torch.randn(shape).double().requires_grad_() for shape in spec.weight_shapes(3)]
    rows = reference.stored_rows(spec, *weights)
    assert rows.shape == (spec.groups, spec.rows, 3) and rows.is_contiguous()
    dense = dense_weight(spec, [w.detach() for w in weights])
    of_table = torch.tensor(spec.row_table)
    found = of_table.sign().unsqueeze(-1) * rows[:, of_table.abs() - 1].detach()
    torch.testing.assert_close(found.transpose(2, 3), dense, rtol=0, atol=0)
    drows = torch.randn_like(rows)
    expected = torch.autograd.grad(rows, weights, drows)
    for got, of_weight in zip(reference.stored_gradients(spec, drows, spec.weight_shapes(3)), expected, strict=True):
        torch.testing.assert_close(got, of_weight, rtol=0, atol=0)
