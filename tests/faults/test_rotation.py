"""Rotation under everything that happens to a run: the newest, the best and the milestones are never lost.

Hypothesis draws sequences of saves, evaluations, errors of the store, kills, resumes, fall-backs and damage, on real
folders. What stands on the disk after each is compared with a rule that is written down here anew, in a few lines.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import tempfile
from pathlib import Path

import attrs
import faults_worker
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _manifest, _saved
from drivetrain_plugins.checkpoint._format import encode
from drivetrain_plugins.checkpoint._local import LocalShelf
from drivetrain_plugins.checkpoint._parcel import Parcel, write
from drivetrain_plugins.checkpoint._retention import Kept, Retention

METRIC = "evaluate/loss"


class Killed(BaseException):
    """The process is gone: from here on its store does nothing."""


@attrs.frozen
class Known:
    """What the test knows of a checkpoint on the disk."""

    value: float | None
    milestone: bool


def parcel(step, value, milestone):
    """Return what a save writes, as small as it can be."""
    position = {"step": step, "applied": step}
    encoded = encode({"model": {"weight": torch.full((2,), float(step))}, "progress": position}, ("model",))
    about = {
        "kind": _manifest.RUN, "metrics": encode({} if value is None else {METRIC: value}).tree, "milestone": milestone,
        "step": step, "position": position, "aliases": {}, "plugins": {}, "states": {}, "settings": {},
        "world_size": 1, "environment": {},
    }  # fmt: skip
    tensors = {f"{part}.safetensors": encoded.tensors[part] for part in ("model", "state")}
    return Parcel(f"step-{step:08d}", about, tensors, {"state.json": _manifest.dump_json(encoded.tree)})


def ranked(known, best, maximize):
    """Return the steps of the best, by a rule written down anew: finite ones, the better first, then the earlier."""
    finite = [(k.value, s) for s, k in known.items() if k.value is not None and math.isfinite(k.value)]
    return [step for _, step in sorted((-v if maximize else v, s) for v, s in finite)][:best]


values = st.sampled_from([0.1, 0.2, 0.2, 0.3, 0.5, math.nan, math.inf, -math.inf])


class Rotation(RuleBasedStateMachine):
    """One run's folder, and the processes that write to it one after the other."""

    @initialize(keep=st.integers(1, 3), best=st.integers(0, 2), maximize=st.booleans())
    def begin(self, keep, best, maximize):
        self.folder = Path(tempfile.mkdtemp())
        self.parent = self.folder / "checkpoints"
        self.rule, self.keep, self.best, self.maximize = Retention(keep, best, METRIC, maximize), keep, best, maximize
        self.step, self.source, self.known, self.foreign = 0, None, {}, 0
        self.saves = 0  # complete ones since the fall-back
        self.start()

    def teardown(self):
        shutil.rmtree(getattr(self, "folder", "/nowhere"), ignore_errors=True)

    # --- a process --------------------------------------------------------------------------------------------------

    def start(self):
        """Begin a new process, which remembers nothing."""
        self.store = faults_worker.FaultyStore()
        self.kept = Kept(LocalShelf(self.parent, self.store))
        self.kept.shelf.prepare()
        assert not list(self.parent.glob(".*")), "what was left unfinished goes at the start"

    def protected(self):
        return set() if self.source is None else {f"step-{self.source:08d}"}

    def expected(self, step, now):
        """Return what is to stand after a save, from what stood before it."""
        counted = sorted((s for s in now if s <= step), reverse=True)
        stay = {*counted[: self.keep], *ranked({s: now[s] for s in counted}, self.best, self.maximize), self.source}
        return {s for s in now if s > step or s in stay or now[s].milestone}

    def on_disk(self):
        """Return the checkpoints that stand, read without the code under test, and check that each can be read."""
        found = {}
        for path in self.parent.glob("step-*"):
            if (path / "manifest.json").exists() and ".replaced-" not in path.name:
                manifest = json.loads((path / "manifest.json").read_text())
                value = manifest["metrics"].get(METRIC)
                value = float(value["$float"]) if isinstance(value, dict) else value
                found[manifest["step"]] = Known(value, manifest["milestone"])
        return found

    def save_at(self, step, value, milestone):
        """Save, and compare what stands with the rule."""
        now = {**self.known, step: Known(value, milestone)}
        write(self.kept, parcel(step, value, milestone), self.rule, self.protected())
        self.known, self.step = self.on_disk(), step
        self.saves += 1
        assert set(self.known) == self.expected(step, now)
        assert str(self.known[step]) == str(now[step])
        assert len([s for s in self.known if s <= step]) >= min(self.keep, self.saves)

    def go_on_from(self, step):
        """A new process takes a checkpoint."""
        self.start()
        _saved.read(self.kept.shelf, f"step-{step:08d}", resume=True)
        self.step, self.source, self.saves = step, step, 1

    # --- what happens -----------------------------------------------------------------------------------------------

    @rule(steps=st.integers(1, 3), milestone=st.booleans())
    def save(self, steps, milestone):
        self.save_at(self.step + steps, None, milestone and steps == 3)

    @rule(steps=st.integers(1, 3), value=values, due=st.booleans())
    def evaluate(self, steps, value, due):
        """Measure; a value among the best of this course is saved, another one only where a save is due."""
        step = self.step + steps
        before = {s: k for s, k in self.known.items() if s < step}
        among = step in ranked({**before, step: Known(value, milestone=False)}, self.best, self.maximize)
        asked = self.rule.is_best(value, step, self.kept.entries())
        assert asked == among
        if asked or due:
            self.save_at(step, value, milestone=False)
            assert not among or step in self.known
        else:
            self.step = step

    @rule(
        steps=st.integers(1, 2),
        value=st.none() | values,
        call=st.integers(1, 60),
        code=st.sampled_from([errno.EIO, errno.ENOSPC]),
    )
    def error(self, steps, value, call, code):
        """The store fails at some call of a save; the process goes on."""
        step, first = self.step + steps, len(self.store.log)

        def act(number, name, args):
            if number == first + call:
                raise OSError(code, "injected", str(args[0]))

        self.store.act = act
        try:
            self.survive(step, value)
        finally:
            self.store.act = lambda *_: None
        self.step = step

    def survive(self, step, value):
        now = {**self.known, step: Known(value, milestone=False)}
        newest = max((s for s in self.known if s <= step), default=None)
        replaces = step in self.known
        failed = None
        try:
            write(self.kept, parcel(step, value, milestone=False), self.rule, self.protected())
        except CheckpointError as error:
            failed = error
            found = self.on_disk()
            assert set(found) <= set(self.known)
            assert set(found) >= self.expected(step, now) - {step}
            assert newest is None or newest in found
            assert not replaces or step in found
        else:
            found = self.on_disk()
            assert self.expected(step, now) <= set(found) <= set(now)
            self.saves += 1
        assert failed is None or "injected" in str(failed)
        self.known = found

    @rule(steps=st.integers(1, 2), value=st.none() | values, call=st.integers(1, 60))
    def kill(self, steps, value, call):
        """The process is killed before some call of a save; the next one goes on from the newest."""
        step, first = self.step + steps, len(self.store.log)

        def act(number, name, args):
            if number >= first + call:
                raise Killed

        self.store.act = act
        now = {**self.known, step: Known(value, milestone=False)}
        complete = False
        try:
            write(self.kept, parcel(step, value, milestone=False), self.rule, self.protected())
            complete = True
        except Killed:
            pass
        found = self.on_disk()
        assert set(found) >= self.expected(step, now) - {step}
        assert set(found) <= set(now)
        assert not complete or step in found
        self.known = found
        self.resume()

    @rule()
    def resume(self):
        """A new process goes on from the newest valid one, which no checkpoint that is good is newer than."""
        self.start()
        found = _saved.newest(self.kept.shelf, lambda reason: None) if self.known else None
        assert (found is None) == (not self.known)
        if found is not None:
            assert found.manifest["step"] == max(self.known)
            self.go_on_from(max(self.known))

    @precondition(lambda self: getattr(self, "known", None))
    @rule(data=st.data())
    def fall_back(self, data):
        """A new process goes on from an older one."""
        self.go_on_from(data.draw(st.sampled_from(sorted(self.known))))

    @precondition(lambda self: len(getattr(self, "known", ())) > 1)
    @rule()
    def damage(self):
        """The newest one is damaged between two processes: the next one goes on from that before it."""
        step = max(self.known)
        path = self.parent / f"step-{step:08d}"
        (path / "model.safetensors").write_bytes(b"damaged")
        self.start()
        reasons = []
        found = _saved.newest(self.kept.shelf, reasons.append)
        assert any(f"{path}: model.safetensors" in reason for reason in reasons)
        shutil.rmtree(path)  # or it would be counted as what its manifest says
        del self.known[step]
        assert found.manifest["step"] == max(self.known)
        self.go_on_from(max(self.known))

    @rule(steps=st.integers(1, 4), named=st.booleans())
    def stranger(self, steps, named):
        """Somebody puts a folder of their own there, perhaps one that is named like a checkpoint to come."""
        step = self.step + steps
        folder = self.parent / (f"step-{step:08d}" if named and step not in self.known else f"mine-{self.foreign}")
        if not folder.exists():
            folder.mkdir()
            (folder / "mine.txt").write_text("mine")
            self.foreign += 1

    # --- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def everything_is_there(self):
        if not hasattr(self, "known"):
            return
        assert len(list(self.parent.glob("*/mine.txt"))) == self.foreign
        assert self.source is None or self.source in self.known
        assert self.on_disk().keys() == self.known.keys()
        assert {s for s, k in self.known.items() if k.milestone} >= self.milestones()
        for step in self.known:
            _saved.read(LocalShelf(self.parent, faults_worker.LocalStore()), f"step-{step:08d}")

    def milestones(self):
        """Remember each milestone that was ever there and was not replaced or damaged."""
        standing = {s for s, k in self.known.items() if k.milestone}
        self.ever = {s for s in getattr(self, "ever", set()) if s in self.known and self.known[s].milestone} | standing
        return self.ever


QUICK = {
    "deadline": None,
    "report_multiple_bugs": False,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}
Rotation.TestCase.settings = settings(max_examples=20, stateful_step_count=14, derandomize=True, **QUICK)
TestRotation = Rotation.TestCase


@pytest.mark.slow
class TestRotationLonger(Rotation.TestCase):
    """The same, for long."""

    settings = settings(max_examples=600, stateful_step_count=30, **QUICK)
