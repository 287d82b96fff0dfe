"""What test_distributed.py runs in each of two processes, which communicate by gloo."""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import tritonsym
import tritonsym.nn as tnn
from tritonsym import functional


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        tnn.SymmetricConv2d(3, 8, 3, symmetry="hv"), nn.ReLU(),
        tnn.GroupConv2d(2, 2, 3, padding=1, symmetry="hv"), tnn.GroupBatchNorm2d(2, "hv").eval(),
        tnn.TiedConv2d(8, 8, 3, symmetry="d4", free=2),
        tnn.OrbitPoolConv2d(8, 8, 3, symmetry="h"), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        tnn.GroupLinear(2, 2, symmetry="hv"),
        tnn.SymmetricLinear(8, 8),
    )  # fmt: skip


def refused(function, words):
    try:
        function()
    except (TypeError, ValueError) as error:
        assert words in str(error), error
        return
    raise AssertionError(f"not refused: {words}")


def run(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(1)
    x, alone = torch.randn(4, 3, 9, 9), net()
    alone(x).square().mean().backward()
    mine = x[2 * rank : 2 * rank + 2]

    parallel = nn.parallel.DistributedDataParallel(net())
    parallel(mine).square().mean().backward()
    for ours, theirs in zip(parallel.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert [*parallel.state_dict()] == [f"module.{key}" for key in alone.state_dict()]

    sharded = fully_shard(net())
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    sharded(mine).square().mean().backward()
    for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    optimizer.step()
    torch.optim.SGD(alone.parameters(), lr=0.1).step()
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    if rank == 0:  # saved from a sharded model, loaded into a plain one
        plain = copy.deepcopy(net())
        plain.load_state_dict(state)
        torch.testing.assert_close(plain(x), alone(x))
    refused(lambda: tritonsym.materialize(sharded), "0.weight is a DTensor; materialize a model that is not sharded")
    dense = fully_shard(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))
    _, report = tritonsym.replace_layers(nn.Sequential(dense, nn.Conv2d(4, 4, 3)), "h", inplace=True)
    assert [row.name for row in report] == ["1"], report
    assert "convert the model before sharding" in report.skipped[0].reason

    mesh = init_device_mesh("cpu", (2,))
    matrix = distribute_tensor(torch.randn(6, 6), mesh, [Shard(0)])
    packed = distribute_tensor(torch.randn(tritonsym.packing.packed_shape(6)), mesh, [Shard(0)])
    for function in (functional.gram, functional.newton_schulz, functional.symmetric_mm, tritonsym.unpack):
        refused(lambda: function(packed if function is tritonsym.unpack else matrix), "full_tensor()")  # noqa: B023
    refused(lambda: functional.symmetric_linear(torch.randn(2, 6), packed), "is a DTensor; gather it first")
    for ours, theirs in zip(sharded.modules(), alone.modules(), strict=True):
        if hasattr(ours, "expanded_weight"):
            dense = ours.expanded_weight()
            assert type(dense) is torch.Tensor
            torch.testing.assert_close(dense, theirs.expanded_weight())
            ours.weight.grad = theirs.weight.grad = None
            dense.square().sum().backward()
            theirs.expanded_weight().square().sum().backward()
            torch.testing.assert_close(ours.weight.grad.full_tensor(), theirs.weight.grad)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(int(sys.argv[1]), sys.argv[2])
