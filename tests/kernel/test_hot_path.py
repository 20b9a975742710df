"""What a step may not do, counted in fresh processes by the benchmark's own counters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "step_overhead.py"
STEPS, LOG_EVERY, NUMBERS_LOGGED = 400, 50, 2  # loss and gradient norm leave the device at a log


def measure(contender: str, what: str) -> dict[str, float | str]:
    command = [sys.executable, str(BENCHMARK), "--one", contender, "--steps", str(STEPS), "--what", what]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def syncs() -> dict[str, float | str]:
    return measure("drivetrain", "syncs")


def test_a_step_with_ten_plugins_makes_no_host_sync(syncs: dict[str, float | str]) -> None:
    """`Tensor.item`, `tolist`, `__bool__`, `__int__` and `__float__` are called at the log interval only."""
    assert syncs["syncs"] <= NUMBERS_LOGGED / LOG_EVERY + 1e-9


def test_a_step_with_ten_plugins_makes_few_python_calls() -> None:
    """A step stays below the calls of a hand-written loop (501), which is what its cost follows."""
    assert measure("drivetrain", "calls")["calls"] <= 300


def test_ten_plugins_train_the_same_bits_as_a_hand_written_loop(syncs: dict[str, float | str]) -> None:
    """Fused AdamW, linear schedule, clipping and logging by plugins end in the parameters of the loop by hand."""
    assert syncs["sha"] == measure("raw", "time")["sha"]
