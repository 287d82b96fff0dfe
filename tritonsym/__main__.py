"""``python -m tritonsym``: what is installed, whether it computes correctly on this machine, how fast, and a demo."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tritonsym
from tritonsym import launch, plan, tuned
from tritonsym import nn as tnn
from tritonsym._table import aligned
from tritonsym.symmetry import Symmetry
from tritonsym.testing import assert_equivariant, assert_matches_reference, assert_symmetric

# --- info -------------------------------------------------------------------------------------------------------------


def info() -> int:
    """Print versions, devices and the backend in force."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    rows = [
        ("tritonsym", tritonsym.__version__),
        ("torch", torch.__version__),
        ("triton", installed("triton")),
        ("numpy", installed("numpy")),
        ("python", platform.python_version()),
        ("system", platform.platform()),
        ("cpu", f"{tuned.device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"),
    ]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        rows.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, capability {major}.{minor}"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "not available"))
    try:
        rows.append(("backend", plan.current_backend()))
    except ValueError as error:
        rows.append(("backend", f"none: {error}"))
    rows.append(("TRITONSYM_BACKEND", os.environ.get("TRITONSYM_BACKEND", "not set")))
    print("\n".join(aligned(rows)))
    return 0


# --- check ------------------------------------------------------------------------------------------------------------

LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *LOW_PRECISION, torch.complex64)


class Case(NamedTuple):
    """A layer, and the shape of its input, batch first."""

    layer: str
    options: str  # as the table shows them
    build: Callable[..., nn.Module]
    shape: tuple[int, ...]
    is_ordered: bool = False  # compares numbers: not for complex ones, nor in low precision, where near ties may flip


def _conv(name: str, ndim: int, symmetry: Any, **options: Any) -> Case:
    cls = getattr(tnn, f"{name}{ndim}d")
    options = {"kernel_size": 3, "padding": 1, "symmetry": symmetry, **options}
    shown = [str(symmetry).translate(str.maketrans("", "", "{}' "))]
    shown += [str(options[key]) for key in ("parity", "reduce") if key in options]
    is_ordered = options.get("reduce") in ("max", "min")
    return Case(cls.__name__, " ".join(shown), partial(cls, 4, 8, **options), (2, 4, *(7, 9, 5)[:ndim]), is_ordered)


def _symmetrize(over: str, reduce: str) -> Case:
    def build(**options: Any) -> nn.Module:
        return tnn.Symmetrize(nn.Sequential(nn.Linear(4, 6, **options), nn.Tanh()), over=over, reduce=reduce)

    return Case("Symmetrize", f"{over} {reduce}", build, (3, 4), is_ordered=True)


def cases() -> Iterator[Case]:
    """Every layer under several symmetries."""
    for ndim, symmetry in [(1, "h"), (2, "hv"), (2, "c4"), (2, "d4"), (2, {"h": 2, "hv": 4}), (3, "hvz")]:
        yield _conv("SymmetricConv", ndim, symmetry, share_bias=True)
        yield _conv("SymmetricConvTranspose", ndim, symmetry, share_bias=True, stride=2)
    for ndim, symmetry, parity in [(1, "h", "even"), (2, "d4", "even"), (2, "hv", "odd"), (3, "hvz", "odd")]:
        yield _conv("TiedConv", ndim, symmetry, parity=parity, free=2, bias=parity == "even")
    yield _conv("TiedConv", 2, "radial", kernel_size=5, padding=2)
    for ndim, symmetry, reduce in [(1, "h", "min"), (2, "d4", "max"), (2, "c4", "sum"), (3, "hvz", "mean")]:
        yield _conv("OrbitPoolConv", ndim, symmetry, reduce=reduce)
    for ndim, symmetry in [(1, "h"), (2, "d4"), (3, "hvz")]:
        cls, order = getattr(tnn, f"GroupConv{ndim}d"), Symmetry(symmetry).order
        build = partial(cls, 2, 3, 3, padding=1, symmetry=symmetry)
        yield Case(cls.__name__, symmetry, build, (2, 2 * order, *(7, 9, 5)[:ndim]))
    yield Case("GroupLinear", "d4", partial(tnn.GroupLinear, 3, 2, symmetry="d4"), (4, 24))
    yield Case("SymmetricLinear", "", partial(tnn.SymmetricLinear, 9, 9), (4, 9))
    yield Case("SkewLinear", "", partial(tnn.SkewLinear, 9, 9), (4, 9))
    yield Case("GlobalConv1d", "", partial(tnn.GlobalConv1d, 4, 6), (2, 4, 9))
    yield Case("TopKPool1d", "", lambda **_: tnn.TopKPool1d(2), (2, 4, 9), is_ordered=True)
    for over, reduce in [("swap", "max"), ("cyclic", "mean"), ("permutations", "logsumexp")]:
        yield _symmetrize(over, reduce)


def _checks(layer: nn.Module, x: Tensor) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks of a layer, by name: every path that computes it, its weights, and its equivariance."""

    def on_path(path: str) -> None:
        with plan.path(path):
            assert_matches_reference(layer, x)

    has_weights = not isinstance(layer, tnn.TopKPool1d | tnn.Symmetrize)
    for path in plan.PATHS if has_weights else ("reference",):
        if path in ("implicit_gemm", "fused") and not launch.runs_on(x.device):
            continue
        try:
            with plan.path(path):
                if has_weights:
                    plan.explain(layer, x)
        except ValueError:
            continue
        yield path, partial(on_path, path)
    if has_weights:
        yield "symmetric", partial(assert_symmetric, layer)
    if not isinstance(layer, tnn.SymmetricLinear):
        yield "equivariant", partial(assert_equivariant, layer, x)


def check(devices: Sequence[torch.device]) -> int:
    """Compare every layer with the reference on these devices, and print a table; 1 if anything is wrong, else 0."""
    start = time.perf_counter()
    rows = failures = 0
    line = "{:<34}  {:<9}  {:<6}  {:<37}  {}"
    print(line.format("layer", "dtype", "device", "checked", "result"))
    for device, case, dtype in product(devices, cases(), DTYPES):
        if (case.is_ordered and (dtype.is_complex or dtype in LOW_PRECISION)) or not _has(device, dtype):
            continue
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            layer = case.build(device="cpu", dtype=dtype).to(device)
            x = torch.randn(case.shape, dtype=dtype).to(device)
        names, wrong = [], []
        for name, run in _checks(layer, x):
            names.append(name)
            try:
                run()
            except Exception as error:
                wrong.append(f"    {name}: {type(error).__name__}: {error}")
        label = f"{case.layer} {case.options}"
        columns = (label, str(dtype).removeprefix("torch."), str(device), " ".join(names))
        print(line.format(*columns, "FAIL" if wrong else "ok"), *wrong, sep="\n")
        rows += 1
        failures += bool(wrong)
    verdict = f"{failures} of {rows} FAILED" if failures else f"all {rows} ok"
    print(f"{verdict}, {time.perf_counter() - start:.1f} s")
    return 1 if failures else 0


def _has(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        torch.ones(1, dtype=dtype, device=device).sum()
    except (RuntimeError, TypeError):
        return False
    return True


# --- command line -----------------------------------------------------------------------------------------------------


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.ones(1, device=device).item()
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"device {text!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _picture(text: str) -> Path:
    path = Path(text)
    folder = path.absolute().parent
    if path.suffix not in (".png", ".pdf", ".svg") or path.is_dir() or not folder.is_dir():
        raise argparse.ArgumentTypeError(f"expected a .png, .pdf or .svg file in an existing folder, got {text!r}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tritonsym",
        description="Check the library on this machine, measure its speed, and list what it offers.",
        epilog=f"""example: python -m tritonsym advise tritonsym.demo:plain_cnn --input 8,1,8,8

{EXIT_CODES}
More on each command: python -m tritonsym COMMAND --help""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: python -m tritonsym {name} {example}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    add("info", "versions, devices and the backend in force", "")
    text = "compare every layer, several symmetries and dtypes, with the reference on this machine"
    command = add("check", text, "--device cpu")
    command.add_argument("--device", type=_device, help="e.g. cpu or cuda:1 (default: the CPU, and CUDA if available)")
    command = add("docs", "list the public names, show one in full, or list the files", "TiedConv2d")
    command.add_argument("name", nargs="?", help="a public name, e.g. TiedConv2d or nn.TiedConv2d")
    command.add_argument("--files", action="store_true", help="list the files of the library instead")
    text = "train a small CNN and its symmetric twin on handwritten digits and draw both"
    command = add("demo", text, "--symmetry d4 --epochs 10")
    command.add_argument("--epochs", type=_positive, default=30, help="default: %(default)s")
    command.add_argument(
        "--symmetry",
        default="hv",
        help="of the filters: a name, or counts and percents such as 'h:50%%,hv:25%%' (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--output", type=_picture, default=Path("demo.png"), help="picture (default: %(default)s)")
    for name, (text, _) in PERF.items():  # it parses its own options: see tritonsym.perf
        commands.add_parser(name, help=text, add_help=False)
    return parser


#: The exit codes of all commands.
EXIT_CODES = """exit codes: 0 all is well; 1 something is wrong, slower or missing; 2 wrong arguments; 75 --budget is
spent and cases are left; 130 interrupted"""
#: Commands in `tritonsym.perf`: their help, and the packages they need.
PERF: dict[str, tuple[str, tuple[str, ...]]] = {
    "advise": ("time the convolutions of your model dense and symmetric; table, JSON, plot", ()),
    "bench": ("time every path against the dense layer; plots, JSON, comparison with an older run", ("matplotlib",)),
    "tune": ("find the fastest path and tiles for layers on this GPU, and use them from now on", ()),
}


def _lacks(command: str, extra: str, packages: Sequence[str]) -> bool:
    """Whether packages that a command needs are missing; prints which, and how to install them."""
    if missing := [name for name in packages if find_spec(name) is None]:
        print(f'The {command} needs {", ".join(missing)}: pip install "tritonsym[{extra}]"', file=sys.stderr)
    return bool(missing)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command in PERF:
        if not {"-h", "--help"} & {*rest} and _lacks(args.command, "perf", PERF[args.command][1]):
            return 1
        return import_module(f"tritonsym.perf.{args.command}").main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "info":
        return info()
    if args.command == "check":
        cuda = ["cuda"] if torch.cuda.is_available() else []
        return check([args.device] if args.device else list(map(torch.device, ["cpu", *cuda])))
    if args.command == "docs":
        from tritonsym import docs

        try:
            print(docs.files() if args.files else docs.whole(args.name) if args.name else docs.names())
        except ValueError as error:
            parser.error(str(error))
        return 0

    from tritonsym import demo

    if _lacks("demo", "demo", demo.EXTRAS):
        return 1
    try:
        return demo.run(args.symmetry, args.epochs, args.seed, args.output)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
