"""Use what the run exported with `transformers.pipeline`, and compare its accuracy in each domain with the logged one.

python examples/sentiment/use_export.py runs/sentiment
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sentiment_data import rows
from transformers import pipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="the run's folder")
parser.add_argument("--limit", type=int, help="measure on the first rows of each domain, as the run did")
given = parser.parse_args()

classify = pipeline("text-classification", model=str(given.run / "export-hf"), device="cpu")
logged = [json.loads(line) for line in (given.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
final = {name: value for line in logged for name, value in line.items()}
different = False
for domain in ("tweets", "movies", "products", "editorials"):
    kept_aside = rows(f"evaluate/{domain}", given.limit)
    texts = [row["text"] for row in kept_aside]
    said = classify(texts, batch_size=32, truncation=True, max_length=64)
    hits = sum(answer["label"] == row["label"] for answer, row in zip(said, kept_aside, strict=True))
    accuracy, expected = hits / len(texts), final[f"evaluate/{domain}/accuracy"]
    print(f"{domain:>10}: {accuracy:.4f} by the pipeline, {expected:.4f} in the run's log")
    different = different or accuracy != expected
print(classify("It stopped working after a day."))
if different:
    sys.exit("the export does not do what the run measured")
