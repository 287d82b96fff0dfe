"""Golden plans: the path that `auto` takes for every named layer, so that none changes by accident.

A line of `golden_plans.txt` holds case, mode, target and path. After an intended change, rewrite it:
``python tests/test_plans.py > tests/golden_plans.txt``.
"""

from pathlib import Path

import pytest
import torch

from tritonsym import plan, shift

GOLDEN = Path(__file__).with_name("golden_plans.txt")


def planned():
    from tritonsym.perf.cases import CPU, GPU

    for cases, target in ((CPU, "cpu"), (GPU, "sm_90")):
        for case in cases:
            with torch.device("meta"):
                layer = case.build(case.dtypes[0], "meta")
                *_, x = case.input(case.dtypes[0], "meta").values()
            for mode in case.modes:
                problem = layer.problem(x, target, mode == "training")
                yield f"{case.name} {mode} {target} {plan.plan(problem).path}"


def test_plans_are_the_golden_ones(monkeypatch):
    for package in ("triton", "tqdm"):
        pytest.importorskip(package)
    with monkeypatch.context() as patch:
        patch.setattr(shift, "mkl_is_slow", lambda: False)
        plan.forget()
        found = list(planned())
    plan.forget()
    assert found == GOLDEN.read_text().splitlines()


if __name__ == "__main__":
    shift.mkl_is_slow = lambda: False
    print(*planned(), sep="\n")
