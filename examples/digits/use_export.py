"""Read digits with the exported network, with onnxruntime and numpy alone: no PyTorch takes part.

python examples/digits/use_export.py runs/digits
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from digits_data import rows

MEAN, STD = 0.3, 0.35  # the recipe's
run = Path(sys.argv[1])
session = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
kept_aside = rows("evaluate")
pixels = np.stack([row["image"] for row in kept_aside])[:, None].astype(np.float32) / 255
(name,) = [given.name for given in session.get_inputs()]
logits = session.run(None, {name: (pixels - MEAN) / STD})[0]
hits = int((logits.argmax(1) == [row["label"] for row in kept_aside]).sum())
logged = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
best = max(line["evaluate/accuracy"] for line in logged if "evaluate/accuracy" in line)
print(f"{hits / len(kept_aside):.4f} of {len(kept_aside)} digits read by onnxruntime, {best:.4f} the best in the log")
if abs(hits / len(kept_aside) - best) > 1 / len(kept_aside):
    sys.exit("the export does not do what the run measured")
