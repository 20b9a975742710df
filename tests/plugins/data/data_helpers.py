"""What the tests of data plugins share: runs that hear of bad rows, readers that are stopped, real text."""

from __future__ import annotations

import itertools
import json
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import torch
from plugin_helpers import cpu_run

from drivetrain import BadRow, DataError, Settings


def strict_run(**fields):
    """Return a run in which a bad row is an error, as it is by default."""

    def refuse(run, reason):
        raise DataError(reason)

    return cpu_run(hooks=SimpleNamespace(bad_row=refuse), **fields)


def lenient_run(seed=0, **fields):
    """Return a run in which bad rows are left out, and the list of what was told of them."""
    told = []
    hooks = SimpleNamespace(bad_row=lambda run, reason: told.append(reason))
    return cpu_run(hooks=hooks, settings=Settings(seed=seed), **fields), told


def wrapped(plugin, rows, split="train", run=None):
    """Send `rows` through the plugin's wrapper of `build_dataset` as what is inside it returns."""
    run = strict_run() if run is None else run
    names = type(plugin).build_dataset.__code__.co_varnames[1 : type(plugin).build_dataset.__code__.co_argcount]
    wrapper = plugin.build_dataset(**{n: {"run": run, "split": split}[n] for n in names})
    next(wrapper)
    try:
        wrapper.send(rows)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the wrapper yielded twice")


def drain(stream, epoch=0, position=None, count=None):
    """Return the rows that a stream gives from `position` on (the first `count`), and the reader's position then."""
    torch.default_generator.manual_seed(7 + epoch)
    reader = stream.open(epoch, position)
    rows = list(itertools.islice(reader, count))
    return rows, json.loads(json.dumps(reader.position()))


def assert_goes_on(stream, *, epoch=0, every=1):
    """Stop after each number of rows, go on from the position through JSON, and see that nothing differs."""
    whole, _ = drain(stream, epoch)
    for count in range(0, len(whole) + 1, every):
        before, position = drain(stream, epoch, count=count)
        after, _ = drain(stream, epoch, position if count else None)
        assert before + after == whole, count
    return whole


def standard_library(count=400):
    """Return paragraphs of the interpreter's own sources as rows {"text", "label"}: real text that is everywhere."""
    rows = []
    for label, name in enumerate(("argparse", "logging/__init__", "tarfile")):
        source = (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text("utf-8")
        rows += [{"text": part.strip(), "label": label} for part in source.split("\n\n") if part.strip()][:count]
    return rows


def write_jsonl(path, rows):
    """Write rows, one a line, and return the path as text."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def reasons(rows):
    """Return what the bad rows among `rows` say."""
    return [row.reason for row in rows if isinstance(row, BadRow)]
