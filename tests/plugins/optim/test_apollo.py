"""`apollo` takes the steps of `apollo-torch` with projections from the run's streams, and resumes bit for bit."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import assert_same_weights, columns, fit, net, train_by_hand

from drivetrain import PlanError, Trainer, hookimpl
from drivetrain.rng import derive_seed
from drivetrain.testing.digests import decode, digest, encode
from drivetrain_plugins import Accumulate, Apollo, Clip, Linear, OptimizerInBackward

apollo_torch = pytest.importorskip("apollo_torch", reason="needs: pip install --no-deps apollo-torch")

STEPS = 20
ADAMW = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-7}
KINDS = {
    "random": {"proj": "random", "scale_type": "channel", "proj_type": "std"},
    "svd": {"proj": "svd", "scale_type": "channel", "proj_type": "std"},
    "tensor": {"proj": "random", "scale_type": "tensor", "proj_type": "right"},
    "svd left": {"proj": "svd", "scale_type": "tensor", "proj_type": "left"},
}
PROJECTION = {"rank": 2, "update_proj_gap": 3, "scale": 4.0}
EACH = pytest.mark.parametrize("kind", KINDS)


def plugin(kind, **options):
    return Apollo(weight_decay=0.1, **ADAMW, **PROJECTION, **KINDS[kind], **options)


def by_hand(kind, model, seed=0, **options):
    """Return the library's optimizer over the groups a person would write; matrices draw from documented streams."""
    groups = [
        {"params": [model.first.weight, model.last.weight], "weight_decay": 0.1, **PROJECTION, **KINDS[kind]},
        {"params": [model.first.bias, model.norm.weight, model.norm.bias, model.last.bias], "weight_decay": 0.0},
    ]
    made = apollo_torch.APOLLOAdamW(groups, **ADAMW, **options)
    for number, p in enumerate(model.parameters()):
        made.state[p]["seed"] = derive_seed(seed, "apollo", number)
    return made


@pytest.mark.parametrize("front", [False, True])
@EACH
def test_twenty_steps_are_the_librarys(kind, front):
    """Twenty steps under a schedule, with groups and every option set, leave the library's weights, bit for bit."""
    data, ours, theirs = columns(30), net(), net()
    options = {"scale_front": front, "limit_growth": not front}
    _, record = fit(ours, [plugin(kind, **options), Linear()], data, steps=STEPS)
    optimizer = by_hand(kind, theirs, scale_front=front, disable_nl=front)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (STEPS - step) / STEPS)
    history = train_by_hand(theirs, data, optimizer, steps=STEPS, scheduler=schedule)
    assert_same_weights(ours, theirs)
    assert record.of("loss") == [step["loss"] for step in history]


@EACH
def test_layerwise_is_the_same_run(kind):
    """Layer-wise updates follow the schedule and leave the same weights and the same saved state as ordinary ones."""
    data, plain, layerwise, beside = columns(30), net(0.2), net(0.2), net(0.2)
    runs = [fit(plain, [plugin(kind), Linear()], data, steps=8)]
    runs.append(fit(layerwise, [plugin(kind, layerwise=True), Linear()], data, steps=8))
    runs.append(fit(beside, [plugin(kind), Linear(), OptimizerInBackward()], data, steps=8))
    assert_same_weights(plain, layerwise)
    assert_same_weights(plain, beside)
    assert len({digest(trainer.run, "model", "optimizer", "progress") for trainer, _ in runs}) == 1


@pytest.mark.parametrize("layerwise", [False, True])
@EACH
def test_resuming_is_exact(kind, layerwise):
    """A state from between two projections, through the checkpoint's encoding, goes on bit for bit: the draws too."""
    data, straight, resumed, kept = columns(30), net(0.2), net(0.2), {}

    class Take:
        @hookimpl
        def step_end(self, step):
            if step.run.progress.step == 5:
                kept["state"] = encode(step.run.state_dict())

    def parts():
        return [plugin(kind, layerwise=layerwise), Linear()]

    whole, _ = fit(straight, [*parts(), Take()], data, steps=STEPS)
    trainer = Trainer(resumed, parts(), device="cpu", steps=STEPS, log_every="1 step")
    run = trainer.assemble(data)
    run.load_state_dict(decode(*kept["state"]))
    run.settings.log_every.start(run)
    run.model.train()
    run.hooks.fit(run)
    assert_same_weights(straight, resumed)
    assert digest(whole.run, "optimizer") == digest(run, "optimizer")


def test_projections_follow_the_seed_and_draw_from_nothing_else():
    """Runs of one seed have the same projections, those of two seeds others, and no global generator is drawn from."""

    class Draws:
        """Look at the global generator around an update."""

        moved = 0

        @hookimpl(wrapper=True)
        def optimizer_step(self):
            before = torch.get_rng_state()
            result = yield
            self.moved += not torch.equal(before, torch.get_rng_state())
            return result

    def projections(seed):
        draws = Draws()
        trainer, _ = fit(net(), [plugin("random"), draws], columns(), steps=4, seed=seed)
        assert draws.moved == 0
        return [s["projector"].ortho_matrix for s in trainer.run.optimizer.state.values() if "projector" in s]

    first, again, other = projections(1), projections(1), projections(2)
    assert len(first) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("other", [Clip(), Accumulate(), OptimizerInBackward()])
def test_layerwise_is_refused_with_what_needs_whole_gradients(other):
    """Layer-wise, clipping and accumulation are refused in the plan; otherwise they are welcome."""
    with pytest.raises(PlanError, match=r"'apollo' and '.*' cannot be combined"):
        fit(net(), [plugin("random", layerwise=True), other], columns(), steps=2)
    fit(net(), [plugin("random"), other], columns(), steps=2)
