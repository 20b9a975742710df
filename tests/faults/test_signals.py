"""A run that is asked to stop, at any point and in any way, saves, ends with the code it documents, and goes on exactly."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import signals_worker
import torch
from conftest import Worker, environment
from faults_worker import read
from signals_programs import IMPORTING, OPEN, command, their

from drivetrain.recipe import Recipe
from drivetrain.testing import run_ranks

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138, "stop": 0}
# Where the signal is sent from in step 3, and the step whose boundary follows.
BOUNDARY = {"start": 1, "forward": 4, "backward": 4, "accumulation": 4, "evaluation": 4, "end": 10}


class Signalled(Worker):
    """A `signals_worker` process."""

    def __call__(self, folder, **job):
        """Perform a job in a fork; return its status, what it wrote to stderr and its digests."""
        answer = self.ask(folder, **job)
        assert answer["status"] != 1, answer["errors"]
        return answer


@pytest.fixture(scope="module")
def signalled(tmp_path_factory):
    """Return a function that makes a run in a forked process, to which signals are sent."""
    made = Signalled(tmp_path_factory.mktemp("signals"), "signals_worker")
    yield made
    made.close()


@pytest.fixture(scope="module")
def left_alone(signalled, tmp_path_factory):
    """Return what the run ends as when nothing happens, and the calls it makes."""
    answer = signalled(tmp_path_factory.mktemp("reference") / "run")
    assert answer["steps"] == 10
    return answer


def whole(folder):
    """Return the steps of the checkpoints there are, each read and verified."""
    names = sorted(p.name for p in (folder / "checkpoints").glob("step-*"))
    for name in names:
        read(folder / "checkpoints" / name)
    return [int(name[5:]) for name in names]


def ends_exactly(signalled, folder, left_alone, **job):
    """Go on with a run and compare its end with the reference."""
    ended = signalled(folder, **job)
    assert ended["steps"] == 10
    assert ended["digests"] == left_alone["digests"]
    assert not [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]
    assert not (folder / "stop").exists()


# --- one signal, at every point --------------------------------------------------------------------------------------


@pytest.mark.parametrize("send", CODES)
@pytest.mark.parametrize("point", BOUNDARY)
def test_asked_at_a_point(signalled, left_alone, tmp_path, point, send):
    """Wherever it comes, the step's boundary is saved, the exit code is the documented one, the rest is exact."""
    answer = signalled(tmp_path / "run", point=point, send=send)
    expected = BOUNDARY[point]
    assert answer["status"] == CODES[send], answer["errors"]
    assert whole(tmp_path / "run")[-1] == expected
    if send == "stop":
        assert answer["steps"] == expected
        if point != "end":  # the run is complete, and the file there stays for a next one
            assert answer["stopped"].endswith("run/stop")
    (tmp_path / "run" / "stop").unlink(missing_ok=True)
    ends_exactly(signalled, tmp_path / "run", left_alone)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("send", CODES)
def test_asked_while_a_row_is_read(signalled, left_alone, tmp_path, workers, send):
    """A signal that comes while rows are read, here or in a worker, waits for the step that takes or follows them."""
    answer = signalled(tmp_path / "run", point="rows", send=send, workers=workers)
    assert answer["status"] == CODES[send], answer["errors"]
    assert 1 <= whole(tmp_path / "run")[-1] < 10
    assert "Traceback" not in answer["errors"]
    ends_exactly(signalled, tmp_path / "run", left_alone, workers=workers)


def calls_of_a_save(left_alone):
    """Return the numbers of the store calls of the save after step 6, which has nothing to remove."""
    calls = left_alone["calls"]
    commits = [n for n, name in enumerate(calls, 1) if name == "rename" and calls[n] == "sync_folder"]
    return range(commits[0] + 3, commits[1] + 2)


def test_asked_inside_a_save(signalled, left_alone, tmp_path):
    """A signal at any call of a save: the save is finished, and one more step is made and saved."""
    for call in list(calls_of_a_save(left_alone))[::6]:
        folder = tmp_path / str(call)
        assert signalled(folder, call=call)["status"] == 143
        steps = whole(folder)
        assert steps == [6, 7], (call, steps)
        ends_exactly(signalled, folder, left_alone)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", ["thread", "fork"])
def test_asked_while_the_last_save_is_waited_for(signalled, left_alone, tmp_path, how, inside):
    """A signal that comes when nothing but the last save is left ends a complete run, in any place of the list."""
    job = {"how": how, "inside": inside, "every": "100 steps"}
    calls = signalled(tmp_path / "count", **{**job, "how": None})["calls"]
    last = len(calls) - calls[::-1].index("rename")  # that of the only save
    answer = signalled(tmp_path / "run", call=last, group=True, slow=0.02, **job)
    assert answer["status"] == 143, answer["errors"]
    assert whole(tmp_path / "run") == [10]
    ends_exactly(signalled, tmp_path / "run", left_alone, **job)


def test_a_save_signal_saves_and_goes_on(signalled, left_alone, tmp_path):
    """SIGUSR2 makes one more checkpoint, twice in one step too, and the run comes to its end unchanged."""
    answer = signalled(tmp_path / "run", point="forward", step=6, send="SIGUSR2", times=2, keep=9)
    assert answer["digests"] == left_alone["digests"]
    assert whole(tmp_path / "run") == [3, 6, 7, 9, 10]


@pytest.mark.parametrize("inside", [False, True])
def test_returning_instead_of_ending(signalled, left_alone, tmp_path, inside):
    """With exit=False `fit` returns, says which signal it was, and the run goes on exactly; in any place of the list."""
    job = {"inside": inside, "options": {"exit": False}}
    answer = signalled(tmp_path / "run", point="backward", **job)
    assert (answer["status"], answer["steps"], answer["stopped"]) == (0, 4, "SIGTERM")
    ends_exactly(signalled, tmp_path / "run", left_alone, **job)


@pytest.mark.parametrize(
    ("how", "point", "last"),
    [
        ("thread", "backward", 4),
        ("fork", "backward", 4),
        ("fork", "fork", 4),
        ("thread", "end", 10),
        ("fork", "end", 10),
    ],
)
def test_asked_while_saves_go_on_beside(signalled, left_alone, tmp_path, how, point, last):  # noqa: PLR0917 - fixtures
    """The process ends when the last save has: in any place of the list, whether a thread or a child writes it."""
    for inside in (False, True):
        folder = tmp_path / str(inside)
        answer = signalled(folder, point=point, how=how, inside=inside, group=True, slow=0.02)
        assert answer["status"] == 143, answer["errors"]
        assert whole(folder)[-1] == last
        ends_exactly(signalled, folder, left_alone, how=how)


# --- twice, and to everyone ------------------------------------------------------------------------------------------


def test_the_second_one_leaves_at_once(signalled, left_alone, tmp_path):
    """The same signal once more, at calls all over a save, ends the process there; nothing is torn, the rest is exact."""
    unfinished = 0
    for number, call in enumerate(list(calls_of_a_save(left_alone))[::4]):
        folder, send = tmp_path / str(call), ("SIGTERM", "SIGINT", "SIGUSR1")[number % 3]
        answer = signalled(folder, call=call, send=send, times=2, same_s=0.0)
        assert answer["status"] == CODES[send]
        assert whole(folder)[-1] in (3, 6)
        unfinished += any(p.name.startswith(".tmp-") for p in (folder / "checkpoints").iterdir())
        ends_exactly(signalled, folder, left_alone)
    assert unfinished >= 4  # it left where it was, instead of tidying up


def test_the_second_one_leaves_within_a_step(signalled, left_alone, tmp_path):
    """With the real pause between two, the process ends inside its step, and no checkpoint is made of it."""
    answer = signalled(tmp_path / "run", point="backward", times=2, pause=0.51)
    assert answer["status"] == 143
    assert whole(tmp_path / "run") == [3]
    ends_exactly(signalled, tmp_path / "run", left_alone)


def test_sent_twice_is_asked_once(signalled, tmp_path):
    """Who signals a process and then its group, as `timeout` does, does not cut the save off."""
    answer = signalled(tmp_path / "run", point="backward", times=2)
    assert answer["status"] == 143
    assert whole(tmp_path / "run") == [3, 4]


@pytest.mark.parametrize("send", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
@pytest.mark.parametrize("point", ["forward", "rows", "fork"])
def test_sent_to_the_whole_group(signalled, left_alone, tmp_path, send, point):
    """Ctrl-C, a terminal's or a scheduler's signal reaches the workers too: they leave it to the run, and say nothing."""
    answer = signalled(tmp_path / "run", point=point, send=send, workers=2, group=True)
    assert answer["status"] == CODES.get(send, 0), answer["errors"]
    assert "Traceback" not in answer["errors"]
    assert (whole(tmp_path / "run")[-1] == 10) == (send == "SIGUSR2")
    ends_exactly(signalled, tmp_path / "run", left_alone, workers=2)


def test_a_process_with_open_workers_ends():
    """Workers that no signal of the group ends leave when the process that asked them does, in the middle too."""
    program = [sys.executable, "-c", OPEN]
    ended = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("send", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_sent_to_a_group_of_spawned_workers(signalled, left_alone, tmp_path, send, method):
    """The same where workers are processes of their own, which inherit nothing."""
    job = {"workers": 2, "start_method": method}
    answer = signalled(tmp_path / "run", point="forward", send=send, group=True, **job)
    assert answer["status"] == CODES[send], answer["errors"]
    assert "Traceback" not in answer["errors"]
    assert whole(tmp_path / "run") == [3, 4]
    ends_exactly(signalled, tmp_path / "run", left_alone)


def at_random_times(signalled, left_alone, tmp_path, trials):
    """Send signals to the group at random moments, from outside; go on until the run is over."""
    seed = int(os.environ.get("DRIVETRAIN_FAULT_SEED") or random.SystemRandom().randrange(2**32))
    print(f"DRIVETRAIN_FAULT_SEED={seed}")
    draws, stopped = random.Random(seed), 0
    for trial in range(trials):
        folder, workers = tmp_path / str(trial), draws.choice([0, 2])
        for _ in range(3):
            send = draws.choice(["SIGTERM", "SIGINT", "SIGUSR1"])
            answer = signalled(folder, after=draws.uniform(0.02, 0.5), send=send, workers=workers, slow=0.02)
            # 0: it was over before; else before `fit`, where the signal does what it always does, or within
            assert answer["status"] in (0, CODES[send], -getattr(signal, send)), answer["errors"]
            stopped += answer["status"] > 1
            whole(folder)
        ends_exactly(signalled, folder, left_alone, workers=workers)
    assert stopped > trials // 2


def test_asked_at_random_times(signalled, left_alone, tmp_path):
    """Signals at random moments from outside, three runs in a row: the end has the bits it would have had."""
    at_random_times(signalled, left_alone, tmp_path, 6)


@pytest.mark.slow
def test_asked_at_many_random_times(signalled, left_alone, tmp_path):
    """The same, 60 times."""
    at_random_times(signalled, left_alone, tmp_path, 60)


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_one_of_two_ranks_is_asked(tmp_path):
    """A signal to rank 1 alone stops both ranks at the same step with one checkpoint and one code; the rest is exact."""
    reference = run_ranks(signals_worker.fit_rank, str(tmp_path / "reference"), False, None, "")
    asked = run_ranks(signals_worker.fit_rank, str(tmp_path / "run"), False, 5, "SIGTERM")
    assert [(rank["code"], rank["step"]) for rank in asked] == [(143, 6)] * 2
    assert asked[1]["stopped"] == "SIGTERM"
    assert whole(tmp_path / "run") == [4, 6]
    assert all(rank["handler"] for rank in asked)
    ended = run_ranks(signals_worker.fit_rank, str(tmp_path / "run"), True, None, "")
    assert [rank["code"] for rank in ended] == [None, None]
    assert [rank["digests"] for rank in ended] == [rank["digests"] for rank in reference]


# --- processes of their own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("send", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_asked_during_the_import(send):
    """Before `fit` a signal does what it does to any process."""
    program = [sys.executable, "-c", IMPORTING, send]
    ignored = signal.getsignal(getattr(signal, send)) == signal.SIG_IGN  # as in a background job of a shell; inherited
    ended = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == (0 if ignored else -getattr(signal, send)), ended.stderr


@pytest.mark.parametrize("send", ["SIGINT", *(pytest.param(s, marks=pytest.mark.slow) for s in ("SIGTERM", "SIGUSR1"))])
def test_the_command_line_ends_with_the_code(tmp_path, monkeypatch, send):
    """`drivetrain run` exits with the documented code, and `drivetrain resume` goes on to the same weights."""
    asked = their(tmp_path / "asked")
    ended = command(asked, "run", "recipe.toml", SEND=send)
    assert ended.returncode == CODES[send], ended.stderr
    assert "Traceback" not in ended.stderr
    assert f"preemption: {send}: the run stops after step 3" in ended.stderr
    assert whole(asked / "run") == [3]
    ended = command(asked, "resume", "run")
    assert ended.returncode == 0, ended.stderr
    alone = their(tmp_path / "alone")
    monkeypatch.chdir(alone)
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.set_num_threads(1)
    Recipe.load(Path("recipe.toml")).trainer().fit()
    sys.modules.pop("their_model")
    last = "run/checkpoints/step-00000008/model.safetensors"
    assert (asked / last).read_bytes() == (alone / last).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_under_timeout(tmp_path, workers):
    """`timeout`, which sends its signal to the process and to its group, gets a saved run."""
    script = textwrap.dedent(f"""
        import torch
        from faults_worker import Augmented, Tiny
        from drivetrain import Trainer
        from drivetrain_plugins import AdamW, Checkpoint, Loader, Preemption
        plugins = [Preemption(), AdamW(lr=1e-3), Loader(workers={workers}), Checkpoint(every="100 minutes")]
        Trainer(Tiny(), plugins, output="run", epochs=10**6).fit(Augmented())
    """)
    for trial in range(5):
        folder = tmp_path / str(trial)
        folder.mkdir()
        run = ["timeout", "--preserve-status", "8", sys.executable, "-c", script]
        ended = subprocess.run(run, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
        assert ended.returncode == 143, ended.stderr
        assert "Traceback" not in ended.stderr
        assert len(whole(folder / "run")) == 1
