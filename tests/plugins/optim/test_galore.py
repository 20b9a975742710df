"""`galore` takes the steps of `galore-torch`, resumes bit for bit, and updates layer-wise with the schedule applied."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import CLASSES, Crash, assert_same_weights, columns, fit, net, train_by_hand

from drivetrain import ConfigError, PlanError, Trainer, hookimpl
from drivetrain.testing.digests import decode, digest, encode
from drivetrain_plugins import Accumulate, Clip, GaLore, Linear, OptimizerInBackward

galore_torch = pytest.importorskip("galore_torch", reason="needs: pip install --no-deps galore-torch")

STEPS = 20
TYPES = ("std", "reverse_std", "right", "left", "full")
ADAMW = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-7}
ADAFACTOR = {"lr": 0.02, "clip_threshold": 0.9, "decay_rate": -0.7}
PROJECTION = {"rank": 2, "update_proj_gap": 3, "scale": 0.5}


def plugin(base="adamw", proj_type="std", **options):
    given = ADAMW if base == "adamw" else ADAFACTOR
    return GaLore(base=base, proj_type=proj_type, weight_decay=0.1, **given, **PROJECTION, **options)


def by_hand(base, proj_type, model):
    """Return the library's optimizer over the groups a person would write for a `Net`."""
    groups = [
        {
            "params": [model.first.weight, model.last.weight],
            "weight_decay": 0.1,
            **PROJECTION,
            "proj_type": proj_type,
        },
        {"params": [model.first.bias, model.norm.weight, model.norm.bias, model.last.bias], "weight_decay": 0.0},
    ]
    if base == "adamw":
        return galore_torch.GaLoreAdamW(groups, **ADAMW, no_deprecation_warning=True)
    return galore_torch.GaLoreAdafactor(groups, **ADAFACTOR, scale_parameter=False, relative_step=False)


@pytest.mark.parametrize("base", ["adamw", "adafactor"])
@pytest.mark.parametrize("proj_type", TYPES)
def test_twenty_steps_are_the_librarys(base, proj_type):
    """Twenty steps under a schedule, with groups and every option set, leave the library's weights, bit for bit."""
    data, ours, theirs = columns(30), net(), net()
    _, record = fit(ours, [plugin(base, proj_type), Linear()], data, steps=STEPS)
    optimizer = by_hand(base, proj_type, theirs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (STEPS - step) / STEPS)
    history = train_by_hand(theirs, data, optimizer, steps=STEPS, scheduler=schedule)
    assert_same_weights(ours, theirs)
    assert record.of("loss") == [step["loss"] for step in history]


@pytest.mark.parametrize("base", ["adamw", "adafactor"])
@pytest.mark.parametrize("proj_type", TYPES)
def test_layerwise_is_the_same_run(base, proj_type):
    """Layer-wise updates follow the schedule and leave the same weights and the same saved state as ordinary ones."""
    data, plain, layerwise, beside = columns(30), net(0.2), net(0.2), net(0.2)
    runs = [fit(plain, [plugin(base, proj_type), Linear()], data, steps=8)]
    runs.append(fit(layerwise, [plugin(base, proj_type, layerwise=True), Linear()], data, steps=8))
    runs.append(fit(beside, [plugin(base, proj_type), Linear(), OptimizerInBackward()], data, steps=8))
    assert_same_weights(plain, layerwise)
    assert_same_weights(plain, beside)
    assert len({digest(trainer.run, "model", "optimizer", "progress") for trainer, _ in runs}) == 1


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("base", ["adamw", "adafactor"])
@pytest.mark.parametrize("proj_type", TYPES)
def test_resuming_is_exact(base, proj_type, layerwise):
    """A state from between two projections, through the checkpoint's encoding, goes on bit for bit."""
    data, straight, resumed, kept = columns(30), net(0.2), net(0.2), {}

    class Take:
        @hookimpl
        def step_end(self, step):
            if step.run.progress.step == 5:
                kept["state"] = encode(step.run.state_dict())

    def parts():
        return [plugin(base, proj_type, layerwise=layerwise), Linear()]

    whole, _ = fit(straight, [*parts(), Take()], data, steps=STEPS)
    trainer = Trainer(resumed, parts(), device="cpu", steps=STEPS, log_every="1 step")
    run = trainer.assemble(data)
    run.load_state_dict(decode(*kept["state"]))
    assert encode(run.state_dict()["optimizer"])[0] == encode(decode(*kept["state"])["optimizer"])[0]
    run.settings.log_every.start(run)
    run.model.train()
    run.hooks.fit(run)
    assert_same_weights(straight, resumed)
    assert digest(whole.run, "optimizer") == digest(run, "optimizer")


def test_bfloat16_weights_resume_exactly():
    """Projections of bfloat16 weights survive the way through a checkpoint with their own dtype and layout."""
    data, kept = columns(30), {}
    data["features"] = data["features"].bfloat16()

    class Take:
        @hookimpl
        def step_end(self, step):
            if step.run.progress.step == 5:
                kept["state"] = encode(step.run.state_dict())

    straight, resumed = net().bfloat16(), net().bfloat16()
    fit(straight, [plugin(), Take()], data, steps=9)
    trainer = Trainer(resumed, [plugin()], device="cpu", steps=9, log_every="1 step")
    run = trainer.assemble(data)
    run.load_state_dict(decode(*kept["state"]))
    run.settings.log_every.start(run)
    run.model.train()
    run.hooks.fit(run)
    assert_same_weights(straight, resumed)


class Model(torch.nn.Module):
    """An embedding tied to one head, another head, two layers and a small one."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 8)
        self.attention = torch.nn.Linear(8, 8)
        self.mlp = torch.nn.Linear(8, 16)
        self.small = torch.nn.Linear(16, 2)
        self.tied = torch.nn.Linear(8, 20, bias=False)
        self.tied.weight = self.embed.weight
        self.head = torch.nn.Linear(8, 20)

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([], ["attention.weight", "mlp.weight"]),
        (["mlp|small"], ["mlp.weight"]),
        (["^att", "head"], ["attention.weight", "head.weight"]),
    ],
)
def test_which_matrices_are_projected(targets, expected):
    """By default all linear layers but heads that are embeddings, and none that its rank would not make smaller."""
    model = Model()
    run = Trainer(model, [GaLore(rank=2, targets=targets)], steps=1, device="cpu").assemble(columns())
    groups = run.optimizer.param_groups
    assert sorted(n for group in groups if "rank" in group for n in group["param_names"]) == expected
    assert sorted(n for group in groups for n in group["param_names"]) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "targets": ["decoder"]}, "a target finds no nn.Linear(.|\n)*'decoder'(.|\n)*first, last"),
        ({"rank": CLASSES + 7}, "no matrix to project"),
        ({"rank": 2, "base": "adamw-8bit"}, "needs CUDA"),
    ],
)
def test_what_cannot_be_is_refused_at_assembly(options, message):
    """A target that finds nothing, a rank that leaves nothing and a base without its device are refused."""
    with pytest.raises(ConfigError, match=message):
        fit(net(), [GaLore(**options)], columns(), steps=2)


@pytest.mark.parametrize("other", [Clip(), Accumulate(), OptimizerInBackward()])
def test_layerwise_is_refused_with_what_needs_whole_gradients(other):
    """Layer-wise, clipping and accumulation are refused in the plan; otherwise they are welcome."""
    with pytest.raises(PlanError, match=r"'galore' and '.*' cannot be combined"):
        fit(net(), [plugin(layerwise=True), other], columns(), steps=2)
    fit(net(), [plugin(), other], columns(), steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "adafactor", "eps": 1e-8}, "eps is no option of the base 'adafactor'"),
        ({"base": "adamw", "decay_rate": -0.5}, "decay_rate is no option of the base 'adamw'"),
        ({"base": "adamw", "min_8bit_size": 1}, "min_8bit_size is no option of the base 'adamw'"),
        ({"base": "sgd"}, "base must be one of"),
        ({"targets": ["("]}, "targets are regular expressions"),
        ({"targets": "attn"}, "targets is a list of regular expressions"),
        ({"rank": 0}, "rank must be a number >= 1"),
    ],
)
def test_values_out_of_bounds_are_refused(options, message):
    """Options that the chosen base would not read, and values out of bounds, are refused."""
    with pytest.raises(ValueError, match=message):
        GaLore(**options)


def test_hooks_are_removed_after_a_failure():
    """A layer-wise run that is interrupted leaves a model whose backward pass moves nothing."""
    model, data = net(), columns()
    with pytest.raises(KeyboardInterrupt):
        fit(model, [plugin(layerwise=True), Crash(at=2)], data, steps=4)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model(**data)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_8bit_base_as_far_as_it_goes_without_cuda(layerwise, monkeypatch):
    """Without the library's wait for CUDA the 8-bit base runs here: its steps are the library's, and resuming is exact."""
    monkeypatch.setattr("drivetrain_plugins.optim.galore.CUDA_ONLY", ())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    data, straight, resumed, theirs, kept = columns(30), net(), net(), net(), {}

    class Take:
        @hookimpl
        def step_end(self, step):
            if step.run.progress.step == 5:
                kept["state"] = encode(step.run.state_dict())

    def parts():
        small = {"min_8bit_size": 1, "weight_decay": 0.1, "layerwise": layerwise}
        return [GaLore(base="adamw-8bit", **ADAMW, **PROJECTION, **small), Linear()]

    fit(straight, [*parts(), Take()], data, steps=STEPS)
    trainer = Trainer(resumed, parts(), device="cpu", steps=STEPS, log_every="1 step")
    run = trainer.assemble(data)
    run.load_state_dict(decode(*kept["state"]))
    assert {state["state1"].dtype for state in run.optimizer.state.values()} == {torch.uint8}
    run.settings.log_every.start(run)
    run.model.train()
    run.hooks.fit(run)
    assert_same_weights(straight, resumed)
    weights = {"params": [theirs.first.weight, theirs.last.weight], "weight_decay": 0.1}
    others = [theirs.first.bias, theirs.norm.weight, theirs.norm.bias, theirs.last.bias]
    groups = [{**weights, **PROJECTION, "proj_type": "std"}, {"params": others, "weight_decay": 0.0}]
    optimizer = galore_torch.GaLoreAdamW8bit(groups, **ADAMW, min_8bit_size=1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (STEPS - step) / STEPS)
    train_by_hand(theirs, data, optimizer, steps=STEPS, scheduler=schedule)
    assert_same_weights(straight, theirs)
