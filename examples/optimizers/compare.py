"""Train one small real task with every optimizer there is, and draw all loss curves in one picture.

    python examples/optimizers/compare.py [--steps 300] [--output runs/optimizers]

The task: 1,797 handwritten digits of 8x8 grey values (they come with scikit-learn), a network of three layers. The
same weights, rows and order for all; the rates are those that a short search found. `curves.svg` has a panel for each
optimizer, with the others in grey behind it; `curves.json` has the numbers.
"""

from __future__ import annotations

import argparse
import html
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from sklearn.datasets import load_digits

from drivetrain import Catalogue, DrivetrainError, Trainer, hookimpl
from drivetrain_plugins import Accuracy, Evaluate, Loader

HELD_OUT = 360
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adafactor": {"lr": 0.04},
    "adagrad": {"lr": 0.04},
    "adam": {"lr": 0.008},
    "adamax": {"lr": 0.016},
    "adamw": {"lr": 0.008},
    "adamw-4bit": {"lr": 0.008},
    "adamw-8bit": {"lr": 0.001},
    "adamw-anyprecision": {"lr": 0.008},
    "adalomo": {"lr": 0.04},
    "ademamix": {"lr": 0.001},
    "apollo": {"lr": 0.02, "rank": 16},
    "bnb-adamw": {"lr": 0.001},
    "bnb-ademamix": {"lr": 0.001},
    "bnb-lion": {"lr": 0.0003},
    "bnb-rmsprop": {"lr": 0.004},
    "galore": {"lr": 0.01, "rank": 16},
    "grokadamw": {"lr": 0.002},
    "lbfgs": {"lr": 1, "max_iter": 4, "line_search": "strong-wolfe"},
    "lion": {"lr": 0.0003},
    "lomo": {"lr": 0.4},
    "muon": {"lr": 0.01, "adamw_lr": 2e-3},
    "nadam": {"lr": 0.008},
    "radam": {"lr": 0.003},
    "rmsprop": {"lr": 0.004},
    "schedule-free-adamw": {"lr": 0.01},
    "schedule-free-radam": {"lr": 0.02},
    "schedule-free-sgd": {"lr": 2},
    "sgd": {"lr": 0.2, "momentum": 0.9},
    "shampoo": {"lr": 1},
    "soap": {"lr": 0.012},
    "stable-adamw": {"lr": 0.0015},
}


class Network(torch.nn.Module):
    """Three linear layers; one is large enough for what keeps its state in 8 bits or in a subspace."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (64, 256, 256)
        layers = [torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.ReLU()) for a, b in zip(sizes, sizes[1:])]  # noqa: B905, RUF007
        self.body, self.head = torch.nn.Sequential(*layers), torch.nn.Linear(256, 10)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the mean cross-entropy and the logits (B, 10) of pixels (B, 64)."""
        logits = self.head(self.body(pixels))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class Curve:
    """Keep the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    @hookimpl
    def step_end(self, step: Any) -> None:
        """Keep the tensor; it is made a number at the end."""
        self.losses.append(step.loss)


def digits() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the rows to train on and those kept aside."""
    pixels, labels = load_digits(return_X_y=True)
    rows = {"pixels": torch.tensor(pixels, dtype=torch.float32) / 16, "labels": torch.tensor(labels)}
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return {k: v[order[HELD_OUT:]] for k, v in rows.items()}, {k: v[order[:HELD_OUT]] for k, v in rows.items()}


def optimizers() -> list[str]:
    """Return the names of all plugins that build an optimizer."""
    catalogue = Catalogue()
    return [name for name in catalogue.names if ".optim." in catalogue.entry(name).value and builds(name)]


def builds(name: str) -> bool:
    """Tell whether a plugin builds an optimizer itself, and does not wrap one."""
    implementation = getattr(Catalogue().entry(name).load(), "build_optimizer", None)
    return implementation is not None and not implementation.drivetrain_impl["wrapper"]


def train(name: str, steps: int) -> dict[str, Any]:
    """Train with one optimizer; return its curve, or why it does not run here."""
    rows, held_out = digits()
    torch.manual_seed(0)
    curve, started = Curve(), time.perf_counter()
    try:
        optimizer = Catalogue().entry(name).load()(**OPTIMIZERS.get(name, {}))
        plugins = [(name, optimizer), Loader(64), Evaluate(every=f"{steps} steps"), Accuracy(), curve]
        trainer = Trainer(Network(), plugins, steps=steps, seed=0, device="cpu")
        trainer.fit(rows, held_out)
    except DrivetrainError as error:
        return {"name": name, "reason": str(error)}
    found = dict(trainer.run.metrics)
    return {
        "name": name,
        "losses": torch.stack(curve.losses).tolist(),
        "accuracy": found["evaluate/accuracy"],
        "held_out_loss": found["evaluate/loss"],
        "ms_per_step": (time.perf_counter() - started) / steps * 1e3,
    }


# --- the picture -----------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, GAP, COLUMNS = 190, 120, 26, 5
LOW, HIGH = 1e-3, 4.0  # of the loss axis, logarithmic


def smooth(losses: list[float]) -> list[float]:
    """Return a running mean over about a twentieth of the curve."""
    kept, mean = [], losses[0]
    for loss in itertools.takewhile(math.isfinite, losses):  # a line ends where the loss does
        mean += (loss - mean) / max(1, len(losses) // 20)
        kept.append(mean)
    return kept


def path(losses: list[float], steps: int) -> str:
    """Return the points of a polyline inside a panel as wide as `steps`."""
    wide, span = max(1, steps - 1), math.log(HIGH / LOW)
    places = [(i / wide, math.log(HIGH / min(HIGH, max(LOW, loss))) / span) for i, loss in enumerate(losses)]
    return " ".join(f"{x * WIDTH:.1f},{y * HEIGHT:.1f}" for x, y in places)


def draw(results: list[dict[str, Any]]) -> str:
    """Return an SVG: a panel an optimizer, the best first."""
    shown = sorted(
        (r for r in results if "losses" in r), key=lambda r: (math.isnan(r["held_out_loss"]), r["held_out_loss"])
    )
    curves = {r["name"]: path(smooth(r["losses"]), len(r["losses"])) for r in shown}
    behind = "".join(f'<polyline points="{curve}"/>' for curve in curves.values())
    total_width = COLUMNS * (WIDTH + GAP) + 30
    total_height = -(-len(shown) // COLUMNS) * (HEIGHT + 2 * GAP) + 60
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" '
            f'width="{total_width}" height="{total_height}" font-family="sans-serif" font-size="11">'
        ),
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="44" y="22" font-size="15">Training loss of each optimizer on handwritten digits (logarithmic)</text>',
        f'<defs><g id="all" fill="none" stroke="#d8d8d8" stroke-width="0.7">{behind}</g></defs>',
    ]
    for number, result in enumerate(shown):
        x, y = 44 + number % COLUMNS * (WIDTH + GAP), 54 + number // COLUMNS * (HEIGHT + 2 * GAP)
        title = f"{html.escape(result['name'])}  {100 * result['accuracy']:.1f} %"
        ticks = "".join(
            f'<text x="-4" y="{math.log(HIGH / value) / math.log(HIGH / LOW) * HEIGHT + 4:.1f}" text-anchor="end" '
            f'fill="#777" font-size="9">{value:g}</text>'
            for value in (1, 0.1, 0.01, 0.001)
            if number % COLUMNS == 0
        )
        parts.append(
            f'<g transform="translate({x},{y})"><text y="-6" font-weight="bold">{title}</text>'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>{ticks}<use href="#all"/>'
            f'<polyline points="{curves[result["name"]]}" fill="none" stroke="#c2410c" stroke-width="1.6"/>'
            f'<text x="{WIDTH}" y="{HEIGHT + 12}" text-anchor="end" fill="#777" font-size="9">'
            f"{len(result['losses'])} steps</text></g>"
        )
    return "\n".join([*parts, "</svg>"])


def main() -> None:
    """Train, print a table, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--only", nargs="*", help="names of optimizers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    results = []
    print(f"{'optimizer':22} {'loss':>8} {'held out':>9} {'right':>7} {'ms/step':>8}")
    for name in given.only or optimizers():
        result = train(name, given.steps)
        results.append(result)
        if "reason" in result:
            print(f"{name:22} does not run here: {' '.join(result['reason'].split())}")
            continue
        last = sum(result["losses"][-10:]) / len(result["losses"][-10:])
        print(
            f"{name:22} {last:8.4f} {result['held_out_loss']:9.4f} {100 * result['accuracy']:6.1f}% "
            f"{result['ms_per_step']:8.2f}"
        )
    (given.output / "curves.json").write_text(json.dumps(results), encoding="utf-8")
    (given.output / "curves.svg").write_text(draw(results), encoding="utf-8")
    print(f"\ndrawn in {given.output / 'curves.svg'}")


if __name__ == "__main__":
    main()
