"""The example that kills a run: the run that is killed ends as the one left alone, and the script says so if it does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import BUCKET, S3Server

SCRIPT = Path(__file__).parents[2] / "examples" / "survive" / "survive.sh"


def survive(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script with the commands of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **variables}
    command = ["bash", str(SCRIPT), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def digests(printed: str) -> dict[str, dict[str, str]]:
    """Return {run: {file: SHA-256}} of what the script printed."""
    return {
        run: dict(re.findall(r"^  ([0-9a-f]{64})  (\S+)$", part, flags=re.MULTILINE))
        for run, part in re.findall(r"^(alone|killed)\n((?:  .*\n)+)", printed, flags=re.MULTILINE)
    }


def check_same(done: subprocess.CompletedProcess[str], kills: int) -> None:
    """Assert that so many kills hit, each start went on from a checkpoint, and both runs left the same files."""
    assert done.returncode == 0, done.stdout + done.stderr
    killed = re.findall(r"^ +\d+  (step \d+|the beginning|-) +(step \d+|its start) ", done.stdout, flags=re.MULTILINE)
    assert len(killed) == kills
    assert [after for _, after in killed].count("its start") <= (kills + 2) // 4
    assert [source for source, _ in killed if source.startswith("step")]
    left = digests(done.stdout)
    assert left["alone"] == left["killed"]
    assert [name.rpartition("/")[2] for name in left["alone"].values()] == [
        "model.safetensors", "log.jsonl", "model.safetensors", "state.json", "state.safetensors",
    ]  # fmt: skip


@pytest.mark.slow  # continuous integration runs the script itself
def test_killed_three_times():
    """Three SIGKILLs of the process group, one of them at a start, change no bit of weights, state and log."""
    check_same(survive("--kills", "3", "--steps", "30", "--seed", "5"), 3)  # the first one is well after a save


@pytest.mark.slow
def test_killed_twenty_times():
    """Nor do twenty."""
    check_same(survive(), 20)


@pytest.mark.slow
def test_killed_with_checkpoints_in_a_store():
    """The same where checkpoints are in an object store, which shows that a save is over by one object alone."""
    server = S3Server()
    try:
        keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": server.url}
        check_same(survive("--kills", "6", "--steps", "60", "--store", f"s3://{BUCKET}/runs", **keys), 6)
    finally:
        server.close()


def test_the_comparison_tells():
    """A second run with another seed ends with other weights and another log, and the script with status 1."""
    done = survive("--kills", "0", "--steps", "4", "--spoil", "run.seed=8")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFERENT: the run that was killed did not end as the one that was left alone" in done.stderr
    left = digests(done.stdout)
    assert left["alone"].keys().isdisjoint(left["killed"].keys())


def test_a_run_that_fails_is_no_success(tmp_path: Path):
    """Where a start fails for another reason than a kill, the script ends with its words; the same folder is refused."""
    done = survive("--kills", "1", "--steps", "4", "--spoil", "adamw.lr=-1", "--output", str(tmp_path / "runs"))
    assert done.returncode == 1
    assert "FAILED: the run ended with status 2 before kill 1" in done.stderr
    assert "adamw.lr" in done.stderr
    again = survive("--kills", "1", "--output", str(tmp_path / "runs"))
    assert again.returncode == 2
    assert "holds runs already" in again.stderr


@pytest.mark.parametrize(("options", "told"), [(["--kill", "3"], "unknown option --kill"), (["--kills", "few"], "few")])
def test_wrong_options(options: list[str], told: str):
    """What the script does not understand is named, and nothing is run."""
    done = survive(*options)
    assert done.returncode == 2
    assert told in done.stderr
