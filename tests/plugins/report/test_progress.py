"""`progress`: a bar for people, lines for logs."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, net

from drivetrain import hookimpl
from drivetrain_plugins import SGD, Evaluate, Progress

NUMBER = r"-?\d+(\.\d+)?(e[-+]\d+)?"
ON_A_TERMINAL = """
from plugin_helpers import columns, fit, net
from drivetrain_plugins import SGD, Evaluate, Progress

fit(net(), [Progress(), SGD(lr=0.1), Evaluate()], columns(), columns(8), steps=30)
"""


def test_lines_by_hand(capsys):
    """The hook, called by hand, writes step, total, numbers and rate to stderr, and nothing to stdout."""
    run, plugin = cpu_run(total_steps=10), Progress()
    around = plugin.fit(run)
    next(around)
    run.progress.step, run.progress.items = 5, 40
    plugin.log(run, {"loss": 0.123456, "learning_rate": 1e-5, "epoch": 1.0})
    plugin.log(run, {"evaluate/loss": 2.0})
    with pytest.raises(StopIteration):
        next(around)
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert re.fullmatch(rf"step 5/10  loss 0.1235  learning_rate 1e-05  {NUMBER} items/s  left \d+ s", first)
    assert second == "step 5/10  evaluate/loss 2"


def test_time_left_follows_the_rate(capsys, monkeypatch):
    """Forty items of eight a step in 10 seconds leave 5 steps of 2 seconds."""
    import time

    run, plugin = cpu_run(total_steps=10), Progress()
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    around = plugin.fit(run)
    next(around)
    for step, items in ((5, 40), (9, 72)):
        run.progress.step, run.progress.items = step, items
        plugin.log(run, {"loss": 1.0})
    around.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("4 items/s  left 10 s")
    assert second.endswith("1.6 items/s  left 5 s")  # the newest interval: 32 items in 20 seconds


def test_other_ranks_are_quiet(capsys):
    """Only the first rank writes."""
    run, plugin = cpu_run(total_steps=10, rank=1, world_size=2), Progress()
    around = plugin.fit(run)
    next(around)
    plugin.log(run, {"loss": 1.0})
    around.close()
    assert capsys.readouterr() == ("", "")


def test_run_without_a_terminal_prints_a_line_for_each_log(capsys):
    """Each log is one plain line with no escape codes; the last one has no time left."""
    _, record = fit(net(), [Progress(), SGD(lr=0.1), Evaluate()], columns(), columns(8), steps=3)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert "\x1b" not in err
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3", "step 3/3"]
    assert [f"loss {value:.4g}" in line for line, value in zip(lines, record.of("loss"), strict=False)] == [True] * 3
    assert ["left" in line for line in lines] == [True, True, False, False]


def test_a_run_that_fails_is_not_hidden(capsys):
    """The exception of a run comes through."""

    class Fail:
        @hookimpl
        def step_end(self, step):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(net(), [Progress(), SGD(), Fail()], columns(), steps=3)


def test_it_only_observes():
    """Weights with and without it are bit-identical."""
    with_it, without = net(dropout=0.2), net(dropout=0.2)
    fit(with_it, [Progress(), SGD(lr=0.1)], columns(), steps=4)
    fit(without, [SGD(lr=0.1)], columns(), steps=4)
    assert_same_weights(with_it, without)


def test_a_terminal_gets_a_bar():
    """Under a pseudo-terminal there is a bar that ends at the last step, with the newest numbers and no lines."""
    main, terminal = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TERM": "xterm-256color",
        "COLUMNS": "160",
    }
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stderr=terminal, stdout=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert process.wait(timeout=60) == 0, text
    assert "━" in text
    assert "30/30" in text
    assert re.search(rf"evaluate/loss {NUMBER}", text)
    assert "left" in text
    assert "step 30/30" not in text
