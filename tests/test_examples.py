"""The example networks keep what they promise."""

from pathlib import Path

import pytest
import torch
from examples import board_game, equivariant_unet3d, reverse_complement

from tritonsym.testing import assert_equivariant


def trained(model, *inputs):
    """After a step, so that statistics and weights are no longer those of the start."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(y.square().mean() for y in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    return model.eval().requires_grad_(False)


def test_unet():
    x = torch.randn(1, 2, 8, 12, 4)
    model = trained(equivariant_unet3d.UNet(2, 3, fields=2), x)
    y = model(x)
    for axes in ((2,), (3, 4), (2, 3, 4)):
        assert (model(x.flip(axes)) - y.flip(axes)).abs().max() < 1e-5 * y.abs().max().clamp(min=1)
    assert_equivariant(model, x, "hvz")


@pytest.mark.parametrize("length", [40, 41])
def test_dna(length):
    bases = "".join(reverse_complement.ORDER[i] for i in torch.randint(4, (length,)))
    both = [
        reverse_complement.one_hot(sequence)[None] for sequence in (bases, reverse_complement.reverse_complement(bases))
    ]
    assert torch.equal(both[1], both[0].flip(-1).roll(2, 1))
    model = trained(reverse_complement.network(3), torch.cat(both))
    torch.testing.assert_close(model(both[0]), model(both[1]))
    assert_equivariant(model, both[0], "h", in_type="regular")


def test_board_game():
    x = torch.randn(2, 17, 19, 19)
    model = trained(board_game.Tower(fields=2, blocks=2), x)
    policy, value = model(x)
    for turned in (lambda t: t.rot90(1, (-2, -1)), lambda t: t.flip(-1), lambda t: t.mT):
        moved, same = model(turned(x))
        board = turned(policy[:, :-1].view(2, 19, 19)).flatten(1)
        torch.testing.assert_close(moved, torch.cat([board, policy[:, -1:]], 1))
        torch.testing.assert_close(same, value)
    assert_equivariant(model.trunk, x, "d4")


def test_they_are_short():
    for module in (board_game, equivariant_unet3d, reverse_complement):
        assert len(Path(module.__file__).read_text().splitlines()) <= 60
