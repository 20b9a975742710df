"""Optimizers of other libraries take the library's own steps, and go on from a checkpoint bit for bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from library_helpers import (
    AO,
    BNB,
    CASES,
    Shape,
    every_type,
    fresh_manager,
    go_on,
    halve,
    import_or_skip,
    plugins_of,
    split,
    through_a_checkpoint,
    through_the_kit,
    tokens,
    wide,
)
from plugin_helpers import assert_same_weights, fit, train_by_hand

from drivetrain import Shuffled, Trainer
from drivetrain.testing import digest


@pytest.fixture(autouse=True)
def own_manager(monkeypatch):
    """Keep tests with bitsandbytes apart."""
    fresh_manager(monkeypatch)


# --- the library's steps ----------------------------------------------------------------------------------------------


@every_type
def test_run_equals_the_library_by_hand(made, dtype):
    """Twenty steps with three groups and a schedule leave the bits that the library leaves in a hand-written loop."""
    import_or_skip(made)
    data, ours, theirs = tokens(), wide(dtype), wide(dtype)
    _, record = fit(ours, plugins_of(made), data, steps=20)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")  # grokadamw asks for CUDA's autocast in each step
        optimizer = made.by_hand(theirs, split(theirs, made.decay, made.options["lr"]), **made.options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, halve)
        history = train_by_hand(theirs, data, optimizer, steps=20, scheduler=scheduler)
    assert record.of("loss") == [step["loss"] for step in history]
    assert_same_weights(ours, theirs)
    assert all(bool(p.isfinite().all()) for p in ours.parameters())
    assert record.of("loss")[-1] < record.of("loss")[0]


@pytest.mark.parametrize("name", [name for name, made in CASES.items() if made.module in (AO, BNB)])
def test_the_state_is_quantized(name):
    """What is large is kept in 8 or 4 bits, what is small or an embedding of bitsandbytes in 32."""
    made = CASES[name]
    import_or_skip(made)
    trainer, _ = fit(wide(), plugins_of(made), tokens(), steps=1)
    model, state = trainer.run.model, trainer.run.optimizer.state
    small = state[model.last.bias]
    if made.module == AO:
        bits = int(made.plugin[6])
        for p in (model.first.weight, model.embed.weight):
            moment = state[p]["exp_avg"]
            assert (type(moment).__name__, moment.codes.dtype) == (f"OptimState{bits}bit", torch.uint8)
            assert moment.codes.numel() * 8 // bits == p.numel()
        assert type(small["exp_avg"]) is torch.Tensor
        return
    eight, whole = torch.uint8, torch.float32
    bits = made.options.get("bits", 8)
    assert state[model.first.weight]["state1"].dtype == (eight if bits == 8 else whole)
    assert state[model.embed.weight]["state1"].dtype == (eight if made.options.get("embedding_bits") == 8 else whole)
    assert small["state1"].dtype == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw-8bit", "adamw-4bit"])
def test_compiled_updates_equal_the_library(name):
    """Compiled, steps are those of the library as it is: it always compiles."""
    made = CASES[name]
    import_or_skip(made)
    data, ours, theirs = tokens(), wide(), wide()
    fit(ours, plugins_of(made, compile=True), data, steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = made.by_hand(theirs, split(theirs, made.decay, made.options["lr"]), **made.options)
        train_by_hand(theirs, data, optimizer, steps=8, scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, halve))
    assert_same_weights(ours, theirs)


# --- going on ---------------------------------------------------------------------------------------------------------


@every_type
def test_resume_is_exact(made, dtype):
    """Stopped after 5 steps and written as JSON and tensors, a fresh run ends with all bits of one never stopped."""
    import_or_skip(made)
    straight = go_on(made, dtype, 12)
    stopped = go_on(made, dtype, 5)
    for through in (through_the_kit, through_a_checkpoint):
        resumed = go_on(made, dtype, 12, through(stopped.state_dict()))
        for part in ("model", "optimizer", "progress"):
            assert digest(resumed, part) == digest(straight, part), (part, through.__name__)


def test_random_rounding_follows_the_seed():
    """Stochastic rounding draws: another seed rounds otherwise, and rounding to nearest is something else again."""
    made = CASES["adamw-8bit-random"]
    import_or_skip(made)
    found = []
    for seed, changed in ((0, {}), (0, {}), (1, {}), (0, {"bf16_stochastic_round": False})):
        model = wide(torch.bfloat16)
        one_batch = {name: column[:8] for name, column in tokens().items()}
        fit(model, plugins_of(made, **changed), one_batch, steps=1, seed=seed)
        found.append(model.first.weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_blocks_of_another_size_are_not_loaded():
    """A state quantized in blocks of 256 is refused by an optimizer whose blocks are of 128."""
    made = CASES["adamw-8bit"]
    import_or_skip(made)
    state = go_on(made, torch.float32, 2).state_dict()
    run = Trainer(wide(), plugins_of(made, block_size=128), steps=12, device="cpu").assemble(tokens())
    with pytest.raises(ValueError, match="blocks of another size"):
        run.load_state_dict(state)


def test_bases_of_soap_lie_in_memory_as_they_did():
    """A product with a matrix whose rows lie one after the other may have other bits than one with columns so."""
    made = CASES["soap"]
    import_or_skip(made)
    stopped = go_on(made, torch.float32, 5)
    run = Trainer(wide(), plugins_of(made), steps=12, device="cpu", seed=4).assemble(tokens())
    run.load_state_dict(through_a_checkpoint(stopped.state_dict()))
    both = [
        [b.stride() for p in r.parameters for b in r.optimizer.state[p]["Q"] if isinstance(b, torch.Tensor)]
        for r in (stopped, run)
    ]
    assert both[0] == both[1]
    assert (1, 128) in both[0]  # columns one after the other


def test_grokking_signal_is_the_library_s_of_both_losses(tmp_path):
    """With `signal`, each evaluation gives the library its loss and that of the step before; a resumed run knows them."""
    from drivetrain_plugins import Evaluate, GrokAdamW

    made = CASES["grokadamw"]
    import_or_skip(made)
    options = {**made.options, "grokking_signal_decay_rate": 2.0}
    data = tokens()
    held_out = {"ids": data["ids"], "labels": (data["labels"] + 1) % 3}  # the better it fits, the larger is this loss

    def run_to(steps, state=None):
        model = wide()
        plugins = [
            GrokAdamW(**options, signal=True),
            ("shape", Shape(0.1, 0.004)),
            Evaluate(every="3 steps", at_end=False),
        ]
        run = Trainer(model, plugins, steps=12, device="cpu", seed=4).assemble(data, held_out)
        if state is not None:
            run.load_state_dict(state)
        for trigger in (run.settings.log_every, run.plugins["evaluate"].every):
            trigger.start(run)
        run.model.train()
        run.total_steps = steps
        run.hooks.fit(run)
        return run

    straight = run_to(12)
    resumed = run_to(12, through_the_kit(run_to(5).state_dict()))
    for part in ("model", "optimizer"):
        assert digest(resumed, part) == digest(straight, part)
    theirs = wide()
    optimizer = made.by_hand(theirs, split(theirs, 0.1, 0.004), **options)
    for step in range(12):
        if step in (3, 6, 9):
            state = run_to(step).optimizer.state_dict()["param_groups"]
            for group, known in zip(optimizer.param_groups, state, strict=True):
                group.update(train_loss=known["train_loss"], eval_loss=known["eval_loss"])
            assert optimizer._compute_grokking_signal(optimizer.param_groups[0]) > 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train_one(theirs, data, optimizer, step)
    assert_same_weights(straight.model, theirs)


def train_one(model, data, optimizer, step):
    """Take one step of a hand-written loop over shuffled rows, with seed 4."""
    epoch, batch = divmod(step, 5)
    picked = Shuffled(40, 4).order(epoch)[batch * 8 : batch * 8 + 8]
    for group, rate in zip(optimizer.param_groups, (0.004, 0.004, 0.008), strict=True):
        group["lr"] = rate * halve(step)
    model(**{name: column[picked] for name, column in data.items()})["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def test_settings_of_bitsandbytes_stay_with_their_run():
    """Neither does a run leave settings in the library's global object, nor does it find any there."""
    made = CASES["bnb-adamw"]
    import_or_skip(made)
    from bitsandbytes.optim import GlobalOptimManager

    shared, model = GlobalOptimManager.get_instance(), wide()
    shared.override_config(model.first.weight, "optim_bits", 32)  # as a run before this one may have left it
    before = dict(shared.pid2config)
    trainer, _ = fit(model, plugins_of(made), tokens(), steps=1)
    assert shared.pid2config == before
    assert trainer.run.optimizer.state[model.first.weight]["state1"].dtype == torch.uint8
