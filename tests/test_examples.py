"""The examples do what they promise. Muon's test is in test_matrices.py."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from examples import board_game, mirror_unet, reverse_complement, symmetric_couplings

from tritonsym.testing import assert_equivariant, assert_symmetric


def trained(model, *inputs):
    """The model after one training step, which changes its statistics and weights."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(y.square().mean() for y in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    return model.eval().requires_grad_(False)


def test_unet():
    x = torch.randn(1, 2, 8, 12, 4)
    model = trained(mirror_unet.UNet(2, 3, fields=2), x)
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


def test_couplings():
    spins = 24
    model = symmetric_couplings.Couplings(spins)
    patterns = torch.randn(6, spins).sign()
    losses = symmetric_couplings.fit(model, patterns)
    assert losses[-1] < 0.3 * losses[0]
    assert_symmetric(model)
    with torch.no_grad():
        matrix, bias = model.couplings.expanded_weight(), model.couplings.bias
        off_diagonal = matrix - matrix.diag().diag()
        torch.testing.assert_close(model.field(patterns), patterns @ off_diagonal + bias)
        torch.testing.assert_close(
            model.energy(patterns), -((patterns @ matrix) * patterns).sum(1) / 2 - patterns @ bias
        )
        damaged = patterns.clone()
        damaged[:, 3] *= -1
        found = model.recall(damaged)
        assert torch.equal(found, patterns) and (model.energy(found) < model.energy(damaged)).all()


@pytest.mark.models
def test_exchange_symmetry_in_keras():
    example = import_module("examples.exchange_symmetry_keras")
    pairs, targets = example.distances(128, 3)
    model = example.network(3)
    losses = model.fit(pairs.numpy(), targets.numpy(), epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    y, swapped = (torch.as_tensor(model.predict(p.numpy(), verbose=0)) for p in (pairs, pairs.flip(1)))
    assert torch.equal(y, swapped) and y.std() > 0


@pytest.mark.models
def test_deploy_to_onnx(tmp_path):
    example = import_module("examples.deploy_onnx")
    model, file = example.trained(), tmp_path / "model.onnx"
    example.export(model, torch.randn(2, 3, 16, 16), file)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 16, 16)
        torch.testing.assert_close(example.run(file, x), model(x).detach(), rtol=1e-3, atol=1e-4)


def test_they_are_short_and_named_after_their_users():
    files = {file.stem: file for file in (Path(__file__).parent / "examples").glob("*.py")}
    equivariant = {"board_game", "mirror_unet", "reverse_complement"}
    assert files.keys() == equivariant | {"deploy_onnx", "exchange_symmetry_keras", "muon", "symmetric_couplings"}
    assert all(len(file.read_text().splitlines()) <= 60 for file in files.values())
