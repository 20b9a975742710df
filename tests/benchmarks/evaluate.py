"""What an evaluation costs beside loops written by hand: `python tests/benchmarks/evaluate.py`.

A linear classifier with 1,000 classes on 20,000 rows, batch 8, one thread: its loss and its accuracy. Streaming
contenders keep two numbers; the others keep all logits (80 MB) for a function that is called once at the end, as
metrics that are no means over rows need it. transformers' Trainer keeps all logits, or what its option
preprocess_logits_for_metrics leaves of them. Fresh processes run interleaved; reported is the CPU time of the
evaluation after a short one that warms up, the median over rounds, its ratio to the loop by hand that does the same,
and by how much memory grew at its peak. All must find the same accuracy.

Trainer's default joins its arrays again at every batch, which takes a time that grows with the square of the rows:
`--slow-rows` limits the rows it is given, and its row of the table says so.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch starts; waiting threads would count as work

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    Columns = dict[str, torch.Tensor]

CLASSES, FEATURES, BATCH, WARM_ROWS = 1000, 32, 8, 80


class Classifier(torch.nn.Module):
    """Return the mean loss and the logits (B, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = torch.nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def columns(rows: int) -> Columns:
    """Rows of which the classifier gets about a third right."""
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(rows, FEATURES, generator=draws)
    with torch.no_grad():
        best = Classifier()(x, torch.zeros(rows, dtype=torch.int64))["logits"].argmax(-1)
    wrong = torch.rand(rows, generator=draws) < 2 / 3
    return {"x": x, "labels": torch.where(wrong, (best + 1) % CLASSES, best)}


def share(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The function of all predictions, which may be logits or classes."""
    best = predictions.argmax(-1) if predictions.ndim > labels.ndim else predictions
    return {"accuracy": float((best == labels).mean())}


def raw_streaming(data: Columns, _: Columns) -> Callable[[Columns], float]:
    """The loop people write: slices of the columns, a sum of losses, a count of hits."""
    model = Classifier()

    def evaluate(data: Columns) -> float:
        x, labels, rows = data["x"], data["labels"], len(data["labels"])
        model.eval()
        total, hits = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        with torch.no_grad():
            for start in range(0, rows, BATCH):
                batch = {"x": x[start : start + BATCH], "labels": labels[start : start + BATCH]}
                outputs = model(**batch)
                total += outputs["loss"] * len(batch["labels"])
                hits += (outputs["logits"].argmax(-1) == batch["labels"]).sum()
        model.train()
        assert total.item() > 0
        return hits.item() / rows

    return evaluate


def raw_loader(data: Columns, _: Columns) -> Callable[[Columns], float]:
    """The loop with torch's DataLoader over rows, as tutorials have it."""
    model = Classifier()

    def evaluate(data: Columns) -> float:
        rows = [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
        model.eval()
        total, hits = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        with torch.no_grad():
            for batch in torch.utils.data.DataLoader(rows, batch_size=BATCH):
                outputs = model(**batch)
                total += outputs["loss"] * len(batch["labels"])
                hits += (outputs["logits"].argmax(-1) == batch["labels"]).sum()
        model.train()
        assert total.item() > 0
        return hits.item() / len(rows)

    return evaluate


def raw_full(data: Columns, _: Columns) -> Callable[[Columns], float]:
    """The same with all logits in an array that is made once."""
    model = Classifier()

    def evaluate(data: Columns) -> float:
        x, labels, rows = data["x"], data["labels"], len(data["labels"])
        model.eval()
        total = torch.zeros((), dtype=torch.float64)
        logits, kept = torch.empty(rows, CLASSES), torch.empty(rows, dtype=torch.int64)
        with torch.no_grad():
            for start in range(0, rows, BATCH):
                batch = {"x": x[start : start + BATCH], "labels": labels[start : start + BATCH]}
                outputs = model(**batch)
                total += outputs["loss"] * len(batch["labels"])
                logits[start : start + BATCH] = outputs["logits"]
                kept[start : start + BATCH] = batch["labels"]
        model.train()
        assert total.item() > 0
        return share(logits.numpy(), kept.numpy())["accuracy"]

    return evaluate


def drivetrain(metric: str) -> Callable[[Columns, Columns], Callable[[Columns], float]]:
    """`evaluate` with one metric."""

    def prepare(data: Columns, warm: Columns) -> Callable[[Columns], float]:
        from drivetrain import Trainer
        from drivetrain_plugins import SGD, Accuracy, Evaluate, Loader, MetricsFunction

        plugin = Accuracy() if metric == "accuracy" else MetricsFunction(share)
        trainer = Trainer(Classifier(), [SGD(lr=0.1), Loader(BATCH), Evaluate(), plugin], steps=1, device="cpu")
        trainer.assemble(warm, {"all": data, "warm": warm})
        return lambda given: trainer.evaluate("evaluate/all" if given is data else "evaluate/warm")["accuracy"]

    return prepare


def transformers(preprocess: bool) -> Callable[[Columns, Columns], Callable[[Columns], float]]:
    """Trainer of transformers, with everything off that is no evaluation."""

    def prepare(data: Columns, warm: Columns) -> Callable[[Columns], float]:
        from transformers import Trainer, TrainingArguments

        class Rows(torch.utils.data.Dataset[Any]):
            def __init__(self, data: Columns) -> None:
                self.data = data

            def __len__(self) -> int:
                return len(self.data["labels"])

            def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
                return {name: column[index] for name, column in self.data.items()}

        folder = tempfile.mkdtemp(prefix="drivetrain-benchmark-")
        arguments = TrainingArguments(
            output_dir=folder, per_device_eval_batch_size=BATCH, use_cpu=True, report_to="none", disable_tqdm=True
        )
        extra: dict[str, Any] = {}
        if preprocess:
            extra["preprocess_logits_for_metrics"] = lambda logits, _: logits.argmax(-1)
        trainer = Trainer(
            model=Classifier(),
            args=arguments,
            compute_metrics=lambda given: share(given.predictions, given.label_ids),
            **extra,
        )
        Path(folder).rmdir()
        return lambda given: trainer.evaluate(Rows(given))["eval_accuracy"]

    return prepare


CONTENDERS: dict[str, tuple[Callable[[Columns, Columns], Callable[[Columns], float]], str]] = {
    "raw, streaming": (raw_streaming, "raw, streaming"),
    "raw, DataLoader": (raw_loader, "raw, streaming"),
    "drivetrain, accuracy": (drivetrain("accuracy"), "raw, streaming"),
    "Trainer, argmax kept": (transformers(preprocess=True), "raw, streaming"),
    "raw, all logits": (raw_full, "raw, all logits"),
    "drivetrain, metrics-function": (drivetrain("function"), "raw, all logits"),
    "Trainer, all logits": (transformers(preprocess=False), "raw, all logits"),
}
SLOW = "Trainer, all logits"


def peak_mb(reset: bool = False) -> float:
    """Return the peak of this process's memory since it was reset, where the system can do that."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    if reset:
        clear.write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def one(name: str, rows: int) -> None:
    """Run one contender in this process and print what it took."""
    torch.set_num_threads(1)
    data, warm = columns(rows), columns(WARM_ROWS)
    evaluate = CONTENDERS[name][0](data, warm)
    evaluate(warm)
    before, start = peak_mb(reset=True), time.process_time()
    found = evaluate(data)
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "mb": peak_mb() - before, "accuracy": found}))


def spawn(name: str, rows: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, "--rows", str(rows)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=CONTENDERS)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--slow-rows", type=int, default=5_000, help="rows for Trainer's default, which runs once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], choices=CONTENDERS)
    given = parser.parse_args()
    if given.one:
        one(given.one, given.rows)
        return
    names = [name for name in CONTENDERS if name not in given.skip]
    slow_rows = min(given.rows, given.slow_rows)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(given.rounds):
        for name in names:
            if name != SLOW or slow_rows == given.rows:
                results[name].append(spawn(name, given.rows))
            elif number == 0:
                results[name].append(spawn(name, slow_rows))
    found = {result["accuracy"] for name, of in results.items() for result in of if name != SLOW}
    print(f"accuracy: {sorted(found)}; the same: {len(found) == 1}")
    if len(found) > 1:
        sys.exit("the contenders do not agree")
    base = {name: statistics.median(r["seconds"] for r in results[name]) for name in names if name != SLOW}
    print(f"{'contender':<30}{'rows':>8}{'CPU s':>9}{'us/batch':>10}{'ratio':>8}{'peak MB':>9}")
    for name in names:
        rows = slow_rows if name == SLOW else given.rows
        seconds = statistics.median(r["seconds"] for r in results[name])
        memory = statistics.median(r["mb"] for r in results[name])
        each = seconds / -(-rows // BATCH)
        raw = base.get(CONTENDERS[name][1])
        ratio = "" if raw is None else f"{each / (raw / -(-given.rows // BATCH)):.2f}"
        print(f"{name:<30}{rows:>8}{seconds:>9.3f}{each * 1e6:>10.1f}{ratio:>8}{memory:>9.1f}")


if __name__ == "__main__":
    main()
