"""The demo: train a plain CNN and its symmetric twin on handwritten digits, compare them, and draw a picture.

matplotlib, scikit-learn and tqdm, the extra `demo`, are imported inside the functions that use them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonsym._table import aligned
from tritonsym.convert import replace_layers
from tritonsym.plan import ModelPlan, explain
from tritonsym.testing import assert_matches_reference, assert_symmetric

EXTRAS = ("matplotlib", "sklearn", "tqdm")
BATCH = 64
#: The goal: at most this many points below the dense accuracy, with at most this share of the conv parameters.
POINTS, SHARE = 2.0, 0.6
NEXT = """What your own model would gain on this machine: python -m tritonsym advise PACKAGE:BUILDER --input 8,3,224,224
Convert it: model, report = tritonsym.replace_layers(model, conv="hv"); README.md says which symmetry fits what data
All public names, with a line each: python -m tritonsym docs"""


class Contestant:
    """A model, its optimizer, and what was measured while it trained."""

    def __init__(self, name: str, model: nn.Module, steps: int) -> None:
        self.name, self.model = name, cast(Any, model).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(model.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=4e-3, total_steps=steps)
        self.accuracy: list[float] = []  # percent of the test images, after every epoch
        self.seconds: list[float] = []  # of every training step

    @property
    def conv_parameters(self) -> int:
        layers = (m for m in self.model.modules() if isinstance(m, nn.Conv2d))
        return sum(p.numel() for layer in layers for p in layer.parameters())

    def step(self, x: Tensor, target: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), target).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()

    def test(self, x: Tensor, target: Tensor) -> None:
        self.model.eval()
        with torch.no_grad():
            self.accuracy.append(100 * (self.model(x).argmax(1) == target).double().mean().item())
        self.model.train()


def plain_cnn() -> nn.Module:
    """A CNN with three convolutions, for 8 x 8 images of ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, test images, training labels, test labels: scikit-learn's 1797 digits, a quarter for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = cast(Any, load_digits())
    parts = train_test_split(data.images, data.target, test_size=0.25, stratify=data.target, random_state=seed)
    x_train, x_test = (torch.tensor(part, dtype=torch.float32)[:, None] / 16 for part in parts[:2])
    return x_train, x_test, torch.tensor(parts[2]), torch.tensor(parts[3])


def train(contestants: list[Contestant], data: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int, seed: int) -> None:
    """Train all on the same batches, taking turns, so that their times per step are comparable."""
    from tqdm import tqdm

    shuffle = torch.Generator().manual_seed(seed)
    x_train, x_test, y_train, y_test = data
    with tqdm(total=epochs * steps_per_epoch(x_train), desc="training", unit="step") as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(x_train), generator=shuffle).split(BATCH):
                for contestant in contestants:
                    contestant.step(x_train[batch], y_train[batch])
                bar.update()
            for contestant in contestants:
                contestant.test(x_test, y_test)
            bar.set_postfix({c.name: f"{c.accuracy[-1]:.1f} %" for c in contestants})


def steps_per_epoch(x: Tensor) -> int:
    return -(-len(x) // BATCH)


def run(symmetry: str | Mapping[str, int | str], epochs: int, seed: int, output: Path) -> int:
    """Train, compare, print and draw; 0 if the trained layers agree with the reference, else 1.

    Raises:
        ValueError: the symmetry fits no convolution of the model.
        ModuleNotFoundError: one of `EXTRAS` is missing.
    """
    data = digits(seed)
    torch.manual_seed(seed)
    plain = plain_cnn()
    model, report = replace_layers(plain, conv=symmetry, init="keep")
    print(report, end="\n\n")
    if not report:
        raise ValueError(f"demo: symmetry {symmetry!r} fits no convolution of the model")

    steps = epochs * steps_per_epoch(data[0])
    dense, symmetric = (Contestant(name, m, steps) for name, m in (("dense", plain), ("symmetric", model)))
    train([dense, symmetric], data, epochs, seed)
    batch = data[1][:BATCH]
    wrong, plans = disagreement(model, batch), explain(model, batch)
    print(plans, summary(dense, symmetric, plans), sep="\n\n")
    print(f"The trained model against the reference, outputs and all gradients: {wrong or 'agrees'}.")
    draw(dense, symmetric, report[0].name, output)
    print(f"Picture: {output}", NEXT, sep="\n\n")
    return 1 if wrong else 0


def disagreement(model: nn.Module, x: Tensor) -> str:
    """What is wrong with the symmetric layers of a model; empty if nothing is."""
    try:
        assert_matches_reference(model, x)
        assert_symmetric(model)
    except AssertionError as error:
        return f"DIFFERS: {error}"
    return ""


def summary(dense: Contestant, symmetric: Contestant, plans: ModelPlan) -> str:
    """The table of results and the verdict; `plans` are those of the layers for a batch."""
    problems = [plan.problem for _, plan in plans]
    full, executed = (flops // 2 // problems[0].batch for flops in (plans.dense_flops, plans.flops))
    stored = sum(p.positions * p.stored for p in problems) // problems[0].batch
    share = symmetric.conv_parameters / dense.conv_parameters
    change = symmetric.accuracy[-1] - dense.accuracy[-1]
    before, after = (1000 * statistics.median(c.seconds) for c in (dense, symmetric))
    rows = [
        ("", "dense", "symmetric", ""),
        ("test accuracy", f"{dense.accuracy[-1]:.2f} %", f"{symmetric.accuracy[-1]:.2f} %", f"{change:+.2f} points"),
        ("convolution parameters", f"{dense.conv_parameters:,}", f"{symmetric.conv_parameters:,}", f"{share:.1%}"),
        (
            "multiply-adds per image",
            f"{full:,}",
            f"{stored:,}",
            f"{stored / full:.1%}, stored weights of replaced layers",
        ),
        ("    executed", f"{full:,}", f"{executed:,}", f"{executed / full:.1%}, on the paths above"),
        ("time per training step", f"{before:.2f} ms", f"{after:.2f} ms", f"{after / before:.1%}, medians"),
    ]
    reached = "Reached" if change >= -POINTS and share <= SHARE else "NOT reached on this run"
    verdict = (
        f"\n{reached}: within {POINTS:g} points of the dense accuracy (here {change:+.2f}) with at most {SHARE:.0%} of "
        f"the convolution parameters (here {share:.1%})."
    )
    return "\n".join([*aligned(rows, right=(1, 2)), verdict])


# --- the picture ------------------------------------------------------------------------------------------------------

COLUMNS = 16
DENSE, SYMMETRIC, FRAME, TEXT = "#8a8a8a", "#1763a6", "#9fb3c8", "#555555"


def draw(dense: Contestant, symmetric: Contestant, layer: str, output: Path) -> None:
    """The filters of one layer, dense and in orbits, and the accuracy of both models after every epoch."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    before, after = (cast(Any, c.model.get_submodule(layer)) for c in (dense, symmetric))
    orbits: dict[int, list[tuple[int, str]]] = {}
    for o, (u, g) in enumerate(after.layout.filters):
        orbits.setdefault(u, []).append((o, str(g)))

    figure = Figure(figsize=(12, 6.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    filters, curves = cast(Any, figure.subfigures(1, 2, width_ratios=(1, 1.05)))
    top, bottom = filters.subplots(2, 1)
    draw_filters(top, before.weight, [[(o, "")] for o in range(before.out_channels)])
    draw_filters(bottom, after.expanded_weight(), list(orbits.values()))
    top.set_title(f"{before.out_channels} dense filters, {before.weight.numel():,} weights", loc="left", color=TEXT)
    title = f"{after.layout.stored_channels} stored filters and their images, {after.weight.numel():,} weights"
    bottom.set_title(title, loc="left", color=SYMMETRIC)
    draw_accuracy(curves.subplots(), dense, symmetric)
    figure.savefig(output, dpi=150)


def draw_filters(ax: Any, weight: Tensor, orbits: list[list[tuple[int, str]]]) -> None:
    """Draw orbits side by side, each scaled by its largest weight; those of several filters are named and framed."""
    from matplotlib.patches import Rectangle

    filters = weight.detach()[:, 0].numpy()
    height, width = filters.shape[-2:]
    named = set()
    row = column = 0
    x = right = 0.0
    for orbit in orbits:
        if column + len(orbit) > COLUMNS:
            row, column, x = row + 1, 0, 0.0
        y = row * (height + 2.2)
        scale = max(abs(filters[o]).max() for o, _ in orbit) or 1.0
        names = tuple(name for _, name in orbit)
        start = x
        for o, name in orbit:
            box = (x, x + width, y + height, y)
            ax.imshow(filters[o] / scale, cmap="RdBu_r", vmin=-1, vmax=1, extent=box, interpolation="nearest")
            if len(orbit) > 1 and (row == 0 or names not in named):
                ax.text(x + width / 2, y - 0.5, name, ha="center", va="bottom", fontsize=6, color=TEXT)
            x += width + 0.5
        if len(orbit) > 1:
            frame = Rectangle((start - 0.35, y - 0.35), x - start + 0.2, height + 0.7, fill=False, edgecolor=FRAME)
            ax.add_patch(frame)
        named.add(names)
        right = max(right, x)
        x += 0.9
        column += len(orbit)
    ax.set(xlim=(-0.6, right), ylim=((row + 1) * (height + 2.2) - 1.6, -2.2), aspect="equal", anchor="NW")
    ax.axis("off")


def draw_accuracy(ax: Any, *contestants: Contestant) -> None:
    from matplotlib.ticker import MaxNLocator

    for contestant, color in zip(contestants, (DENSE, SYMMETRIC), strict=True):
        epochs = range(1, len(contestant.accuracy) + 1)
        label = f"{contestant.name}: {contestant.accuracy[-1]:.1f} %, {contestant.conv_parameters:,} conv parameters"
        ax.plot(epochs, contestant.accuracy, color=color, linewidth=2, marker="o", markersize=4, label=label)
    # the first epochs may lie below the picture: what matters is where the curves end
    percents = [p for contestant in contestants for p in contestant.accuracy]
    lowest = min(statistics.median(percents) - 10, *(contestant.accuracy[-1] for contestant in contestants))
    ax.set(xlabel="epoch", xlim=(0.5, len(epochs) + 0.5), ylim=(10 * (lowest // 10), 100.5))
    ax.set_title("accuracy on the test digits (%)", loc="left", color=TEXT)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(color="#e8e8e8")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), frameon=False)
