"""Going on with other plugins, other versions of their states, and other settings of the optimizer."""

from __future__ import annotations

import copy
import hashlib
import json
import logging

import attrs
import pytest
import torch
from checkpoint_runs import ROWS, Tied, trainer

from drivetrain import CheckpointError, Trainer, hookimpl, option, plugin
from drivetrain_plugins import SGD, AdamW, Checkpoint, Linear, Loader
from drivetrain_plugins.checkpoint import _manifest


@plugin(role="control")
class Counts:
    """A plugin that counts steps, and whose state has no version of its own."""

    often: int = option(1)
    _steps: int = attrs.field(init=False, default=0)

    @hookimpl
    def assembled(self, run):
        self._steps = 0

    @hookimpl
    def step_end(self, step):
        self._steps += 1

    def state_dict(self):
        return {"steps": self._steps}

    def load_state_dict(self, state):
        self._steps = state["steps"]


class Later(Counts):
    """The same plugin, which now has a second version of its state."""

    state_version = 2

    def state_dict(self):
        return {"taken": {"steps": self._steps}}

    def load_state_dict(self, state):
        self._steps = state["taken"]["steps"]


class Migrates(Later):
    """A version that reads the state of the first one."""

    def migrate_state(self, state, version):
        assert version == 1
        return {"taken": state}


@plugin(role="report", effect="observes")
class Watches(Counts):
    """A stateful plugin that observes only."""


@plugin(role="control")
class Tilt:
    """A plugin that changes the run and has no state."""

    angle: float = option(1.0)


def go_on(folder, *plugins, until, on_change="warn", **settings):
    """Go on from the newest checkpoint and return the trainer."""
    checkpoint = Checkpoint(every="2 steps", keep=9, on_change=on_change)
    made = trainer(folder, *plugins, checkpoint=checkpoint, steps=until, **settings)
    made.fit(ROWS, resume=True)
    return made


def told(caplog):
    return [r.getMessage() for r in caplog.records]


# --- plugins ---------------------------------------------------------------------------------------------------------


def test_a_new_plugin_starts_fresh_and_is_told(tmp_path, caplog):
    """A stateful plugin that was not there is refused by default; allowed, it starts from nothing, which is said."""
    trainer(tmp_path, steps=2).fit(ROWS)
    with pytest.raises(CheckpointError, match=r"\+ counts .*\n.*allow it: checkpoint.on_change = 'warn'"):
        go_on(tmp_path, Counts(), until=4, on_change="error")
    counts = Counts()
    with caplog.at_level(logging.WARNING, "drivetrain"):
        go_on(tmp_path, counts, until=5)
    assert counts._steps == 3
    assert "checkpoint: without a saved state, starting fresh: counts" in told(caplog)


def test_a_state_that_nobody_takes_is_told(tmp_path, caplog):
    """The state of a plugin that is gone is left out, and that is said; without the plugin it is not saved again."""
    trainer(tmp_path, Counts(), steps=2).fit(ROWS)
    with pytest.raises(CheckpointError, match=r"- counts "):
        go_on(tmp_path, until=4, on_change="error")
    with caplog.at_level(logging.WARNING, "drivetrain"):
        go_on(tmp_path, until=4)
    assert "checkpoint: left out, as this run does not have the plugins: the state of counts" in told(caplog)
    state = json.loads((tmp_path / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert "counts" not in state["plugins"]


def test_a_plugin_that_stays_keeps_its_state(tmp_path):
    """Whoever comes, goes or changes places, a plugin that is in both runs has its state."""
    counts = Counts()
    trainer(tmp_path, counts, Tilt(), steps=2).fit(ROWS)
    for now in ([Tilt(), counts], [counts], [("other", Tilt()), counts]):
        counts._steps = 0
        go_on(tmp_path, *now, until=3)
        assert counts._steps == 3


def test_the_order_is_refused_or_told(tmp_path, caplog):
    """The same plugins in another order are another run: refused by default, told when allowed."""
    trainer(tmp_path, Counts(), Tilt(), steps=2).fit(ROWS)
    with pytest.raises(CheckpointError, match="~ order: was adamw, counts, tilt; is adamw, tilt, counts"):
        go_on(tmp_path, Tilt(), Counts(), until=4, on_change="error")
    go_on(tmp_path, Tilt(), Counts(), until=4)
    assert sum("~ order: was" in text for text in told(caplog)) == 1


def test_observers_never_matter(tmp_path, caplog):
    """Plugins that only observe come, go, move and change without a word, also stateful ones; one that stays goes on."""
    watches = Watches()
    trainer(tmp_path, ("watches", watches), steps=2).fit(ROWS)
    later = ("watches", Watches(often=7))
    go_on(tmp_path, later, until=4, on_change="error")
    assert later[1]._steps == 4
    go_on(tmp_path, ("another", Watches()), later, until=6, on_change="error")
    assert later[1]._steps == 6
    assert told(caplog) == []
    go_on(tmp_path, until=8, on_change="error")
    assert told(caplog) == [
        "checkpoint: left out, as this run does not have the plugins: the state of another, watches"
    ]


# --- versions of states ----------------------------------------------------------------------------------------------


def test_an_older_state_is_migrated(tmp_path, caplog):
    """A plugin with migrate_state() reads its earlier versions, and that is said; the next save has the new one."""
    trainer(tmp_path, ("counts", Counts()), steps=2).fit(ROWS)
    counts = Migrates()
    go_on(tmp_path, ("counts", counts), until=4)
    assert counts._steps == 4
    assert "checkpoint: the state of plugin 'counts' was migrated from version 1 to 2" in told(caplog)
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert manifest["states"] == {"counts": 2}
    again = Later()
    go_on(tmp_path, ("counts", again), until=5)
    assert again._steps == 5


def test_an_older_state_without_a_migration_is_refused(tmp_path):
    """A plugin with a later version of its state and no way to read the earlier one is refused, also with "accept"."""
    trainer(tmp_path, ("counts", Counts()), steps=2).fit(ROWS)
    for policy in ("warn", "accept"):
        with pytest.raises(CheckpointError, match="'counts' has version 1, the plugin has 2 and no migrate_state"):
            go_on(tmp_path, ("counts", Later()), until=4, on_change=policy)


def test_a_newer_state_is_refused(tmp_path):
    """A state that a later version of the plugin wrote is refused, with what to do."""
    trainer(tmp_path, ("counts", Migrates()), steps=2).fit(ROWS)
    with pytest.raises(CheckpointError, match=r"version 2, .* reads up to 1: install the version that wrote it"):
        go_on(tmp_path, ("counts", Counts()), until=4)


# --- settings of the optimizer ---------------------------------------------------------------------------------------


class Batches:
    """The batches and the rate of every step, to be taken again by hand."""

    effect = "observes"

    def __init__(self):
        self.rows, self.rates = [], []

    @hookimpl
    def gradients_ready(self, step):
        self.rows.append([micro.batch["x"].clone() for micro in step.micros])
        self.rates.append(step.learning_rate)


def by_hand(saved, optimizer, batches, rates, **settings):
    """Take steps with plain torch from a finished run's weights and moments; return the parameters.

    Args:
        saved: the trainer of the run before.
        optimizer: torch's class.
        batches: a list of rows for each step.
        rates: the rate of each step.
        settings: of the optimizer; weight_decay is for weights only.
    """
    model = Tied()
    model.load_state_dict(saved.run.model.state_dict())
    named = dict(model.named_parameters())
    decay = settings.pop("weight_decay", 0.0)
    weights = [p for n, p in named.items() if not n.endswith("bias")]
    biases = [p for n, p in named.items() if n.endswith("bias")]
    groups = [{"params": weights, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}]
    made = optimizer(groups, lr=rates[0], **settings)
    before = dict(saved.run.model.named_parameters())
    for name, parameter in named.items():
        made.state[parameter] = copy.deepcopy(saved.run.optimizer.state[before[name]])
    for (rows,), rate in zip(batches, rates, strict=True):
        for group in made.param_groups:
            group["lr"] = rate
        made.zero_grad()
        model(rows).backward()
        made.step()
    return dict(model.named_parameters())


CHANGES = {
    "lr": (AdamW(lr=0.01), AdamW(lr=0.002), torch.optim.AdamW, {"fused": True}, 0.002),
    "weight decay": (AdamW(lr=0.01), AdamW(lr=0.01, weight_decay=0.5), torch.optim.AdamW, {"fused": True, "weight_decay": 0.5}, 0.01),
    "betas and eps": (
        AdamW(lr=0.01), AdamW(lr=0.01, betas=(0.5, 0.9), eps=1e-3), torch.optim.AdamW,
        {"fused": True, "betas": (0.5, 0.9), "eps": 1e-3}, 0.01,
    ),
    "momentum": (SGD(lr=0.1, momentum=0.9), SGD(lr=0.02, momentum=0.5), torch.optim.SGD, {"momentum": 0.5}, 0.02),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_new_setting_holds_from_the_next_step(tmp_path, case, caplog):
    """Refused by default with how to allow it; allowed, it is told, and every step is that of plain torch with it."""
    before, after, optimizer, settings, rate = CHANGES[case]
    saved = trainer(tmp_path, optimizer=before, steps=3)
    saved.fit(ROWS)
    (option_name, *_) = [f.name for f in attrs.fields(type(after)) if getattr(after, f.name) != getattr(before, f.name)]
    with pytest.raises(CheckpointError, match=rf"(?s){option_name} was .*, is .*checkpoint.on_change = 'warn'"):
        go_on(tmp_path, optimizer=after, until=6, on_change="error")
    batches = Batches()
    made = go_on(tmp_path, batches, optimizer=after, until=6)
    assert batches.rates == [rate] * 3
    expected = by_hand(saved, optimizer, batches.rows, batches.rates, **settings)
    for name, parameter in made.run.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert sum("settings of this run" in text for text in told(caplog)) == 1


def test_groups_may_be_joined_and_parted(tmp_path):
    """A weight decay that goes and comes again makes one group of two, and two of one; each parameter keeps its own."""
    rates = (AdamW(lr=0.01, weight_decay=0.1), AdamW(lr=0.01), AdamW(lr=0.01, weight_decay=0.3))
    trainer(tmp_path, optimizer=rates[0], steps=2).fit(ROWS)
    for number, (optimizer, groups) in enumerate(zip(rates[1:], (1, 2), strict=True), 1):
        before = go_on(tmp_path, optimizer=rates[number - 1], until=2 * number, on_change="error").run
        checkpoint = Checkpoint(on_change="warn")
        run = trainer(tmp_path, optimizer=optimizer, checkpoint=checkpoint, steps=9).assemble(ROWS)
        run.hooks.load(run, None)
        assert len(run.optimizer.param_groups) == groups
        assert sorted({g["weight_decay"] for g in run.optimizer.param_groups}) == sorted({0.0, optimizer.weight_decay})
        old, new = dict(before.model.named_parameters()), dict(run.model.named_parameters())
        for name, parameter in new.items():
            then, now = before.optimizer.state[old[name]], run.optimizer.state[parameter]
            assert then.keys() == now.keys()
            assert all(torch.equal(then[key], now[key]) for key in then), name
        go_on(tmp_path, optimizer=optimizer, until=2 * number + 2)


def test_a_new_rate_with_a_schedule(tmp_path):
    """With a schedule the new rate is what the factor of each step is applied to, from the first step on."""
    saved = trainer(tmp_path, Linear(), StopAt(3), optimizer=AdamW(lr=0.01), steps=8)
    saved.fit(ROWS)
    batches = Batches()
    made = go_on(tmp_path, Linear(), batches, optimizer=AdamW(lr=0.04), until=8)
    assert batches.rates == pytest.approx([0.04 * (8 - n) / 8 for n in range(3, 8)], rel=1e-12)
    expected = by_hand(saved, torch.optim.AdamW, batches.rows, batches.rates, fused=True)
    assert all(torch.equal(p, expected[n]) for n, p in made.run.model.named_parameters())


class StopAt:
    """Stop after a step."""

    effect = "observes"

    def __init__(self, step):
        self.step = step

    @hookimpl
    def step_end(self, step):
        if step.run.progress.step == self.step:
            step.run.request_stop("as asked")


def test_what_was_asked_for_last_wins(tmp_path, caplog):
    """Through several resumes the newest setting holds; it is told once, and not again where nothing changes."""
    trainer(tmp_path, optimizer=AdamW(lr=0.01), steps=2).fit(ROWS)
    for until, rate, tells in ((4, 0.02, 1), (6, 0.02, 0), (8, 0.01, 1), (10, 0.01, 0)):
        caplog.clear()
        batches = Batches()
        made = go_on(tmp_path, batches, optimizer=AdamW(lr=rate), until=until, on_change="warn" if tells else "error")
        assert batches.rates == [rate, rate]
        assert {g["lr"] for g in made.run.optimizer.param_groups} == {rate}
        assert sum("takes the settings of this run" in text for text in told(caplog)) == tells


def test_accept_takes_the_new_value_too(tmp_path):
    """The old value is never kept: with "accept", which does not list the differences, the new one holds as well."""
    trainer(tmp_path, optimizer=AdamW(lr=0.01), steps=2).fit(ROWS)
    batches = Batches()
    go_on(tmp_path, batches, optimizer=AdamW(lr=0.5), until=3, on_change="accept")
    assert batches.rates == [0.5]


def test_moments_are_as_saved(tmp_path):
    """A new rate leaves the moments and the step counts as they were saved."""
    (saved := trainer(tmp_path, optimizer=AdamW(lr=0.01), steps=3)).fit(ROWS)
    checkpoint = Checkpoint(on_change="warn")
    run = trainer(tmp_path, optimizer=AdamW(lr=0.5), checkpoint=checkpoint, steps=4).assemble(ROWS)
    run.hooks.load(run, None)
    then, now = (list(r.optimizer.state.values()) for r in (saved.run, run))
    for a, b in zip(then, now, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_another_batch_size_keeps_its_place_in_the_rows(tmp_path, caplog):
    """On one rank another batch size is another run; allowed, it goes on at the next row, and no row comes twice."""
    trainer(tmp_path, Loader(batch_size=8), steps=2).fit(ROWS)
    with pytest.raises(CheckpointError, match="~ loader: batch_size was 8, is 4"):
        go_on(tmp_path, Loader(batch_size=4), until=4, on_change="error")
    whole = Batches()
    trainer(tmp_path / "whole", Loader(batch_size=8), whole, steps=4).fit(ROWS)
    batches = Batches()
    go_on(tmp_path, Loader(batch_size=4), batches, until=6)
    left = torch.cat([rows for (rows,) in batches.rows])
    assert torch.equal(left, torch.cat([rows for (rows,) in whole.rows[2:]]))


def test_a_batch_size_may_make_up_for_ranks(tmp_path, caplog):
    """A checkpoint of two ranks with 4 rows each goes on with one rank and 8 rows, and with no other number."""
    trainer(tmp_path, Loader(batch_size=4), steps=2).fit(ROWS)
    path = tmp_path / "checkpoints" / "step-00000002"
    as_of_two_ranks(path)
    with pytest.raises(CheckpointError, match="~ loader: batch_size was 4, is 16"):
        go_on(tmp_path, Loader(batch_size=16), until=4, on_change="error")
    assert go_on(tmp_path, Loader(batch_size=8), until=4, on_change="error").run.progress.step == 4
    assert any("world size was 2, is 1" in text for text in told(caplog))


def as_of_two_ranks(path):
    """Change a checkpoint as if two ranks had written it."""
    state = json.loads((path / "state.json").read_text())
    state["random"] = state["random"] * 2
    raw = _manifest.dump_json(state)
    (path / "state.json").write_bytes(raw)
    content = _manifest.parse((path / "manifest.json").read_bytes())
    content["files"]["state.json"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    content = {k: v for k, v in content.items() if k not in ("magic", "schema", "sha256")}
    (path / "manifest.json").write_bytes(_manifest.seal({**content, "world_size": 2}))


# --- memory layout ---------------------------------------------------------------------------------------------------


class Convolution(torch.nn.Module):
    """One convolution."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.inner(x).square().mean()


def test_channels_last_goes_on_bit_for_bit(tmp_path):
    """Where parameters are not laid out in the order of their indices, their moments are laid out as they are."""
    rows = {"x": torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(1))}

    def made(folder, steps):
        torch.default_generator.manual_seed(0)
        model = Convolution().to(memory_format=torch.channels_last)
        plugins = [AdamW(lr=0.01), Checkpoint(every="2 steps")]
        return Trainer(model, plugins, output=folder, steps=steps)

    (whole := made(tmp_path / "whole", 5)).fit(rows)
    made(tmp_path / "run", 2).fit(rows)
    (resumed := made(tmp_path / "run", 5)).fit(rows, resume=True)
    assert not whole.run.model.inner.weight.is_contiguous()
    for a, b in zip(whole.run.model.parameters(), resumed.run.model.parameters(), strict=True):
        assert torch.equal(a, b)
