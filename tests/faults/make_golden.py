"""Write the golden checkpoints of the current schema: `python tests/faults/make_golden.py`.

Run it once, when the schema changes, and commit what it writes. What is there already stays as it is: an old
checkpoint is worth keeping because the code that wrote it is gone. `golden/index.json` says of each what it must hold.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from pathlib import Path

import faults_worker
import numpy as np
import torch
from faults_worker import Job

from drivetrain import Trainer
from drivetrain_plugins import Evaluate
from drivetrain_plugins.checkpoint import _convert, _manifest
from drivetrain_plugins.checkpoint._place import checkpoint_at
from drivetrain_plugins.checkpoint._store import LocalStore

GOLDEN = Path(__file__).parent / "golden"
INDEX = GOLDEN / "index.json"
NAME = "step-00000004"


def trainer(folder: Path, *, steps: int, what: str = "run", on_change: str = "error"):
    """Return the trainer of the golden runs, and its rows."""
    made, rows = faults_worker.build(Job(folder=str(folder), steps=steps), LocalStore())
    checkpoint = made.plugins["checkpoint"]
    checkpoint.what, checkpoint.on_change, checkpoint.milestones = what, on_change, "4 steps"
    plugins = [*made.plugins.items(), ("evaluate", Evaluate(every="2 steps"))]
    return Trainer(made.model, plugins, output=folder, steps=steps, seed=11, log_every=3), rows


def run(folder: Path, what: str) -> Path:
    """Train 4 steps and return the last checkpoint."""
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the rows draw from the global one
    made, rows = trainer(folder, steps=4, what=what)
    made.fit(rows, evaluate=faults_worker.Augmented(10))
    return folder / "checkpoints" / NAME


def describe(path: Path) -> dict:
    """Return what a golden checkpoint must hold: its files, and the parts of its state by a digest of their own."""
    saved = faults_worker.read(path)
    return {
        "files": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.iterdir())},
        "digests": {part: faults_worker.digest(value) for part, value in saved.tree.items()},
        "weight": saved.tree["model"]["project.bias"].tolist(),
        "draws": following(saved.tree) if saved.manifest["kind"] == _manifest.RUN else [],
    }


def following(tree) -> list[str]:
    """Return the numbers that Python's and NumPy's generators give next, from the saved states alone."""
    states = tree["random"][0] if isinstance(tree["random"], list) else tree["random"]
    own, legacy = random.Random(), np.random.RandomState()
    version, internal, gauss = states["python"]
    own.setstate((version, tuple(internal), gauss))
    kind, key, *rest = states["numpy"]
    legacy.set_state((kind, np.asarray(key, dtype=np.uint32), *rest))
    return [own.random().hex(), float(legacy.random_sample()).hex()]


def main() -> None:
    """Write what is missing."""
    torch.set_num_threads(1)
    index = json.loads(INDEX.read_text()) if INDEX.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        made = {what: run(Path(scratch) / what, what) for what in ("run", "weights")}
        made["sharded"] = Path(scratch) / "sharded" / NAME
        _convert.convert(checkpoint_at(made["run"]), checkpoint_at(made["sharded"]), "sharded", 2)
        for form, source in (("full", made["run"]), ("sharded", made["sharded"]), ("weights", made["weights"])):
            target = GOLDEN / f"schema-{_manifest.SCHEMA}" / form / NAME
            if not target.exists():
                shutil.copytree(source, target)
                index.pop(str(target.relative_to(GOLDEN)), None)
    for path in sorted(GOLDEN.glob("**/step-*")):
        index.setdefault(str(path.relative_to(GOLDEN)), describe(path))
    INDEX.write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
