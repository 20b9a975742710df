"""`adalomo` takes the steps of `lomo-optim`'s AdaLomo, keeps its state on the parameters' device, and resumes."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import Crash, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, PlanError, Shuffled, Trainer, hookimpl
from drivetrain.rng import derive_seed
from drivetrain.testing.digests import decode, digest, encode
from drivetrain_plugins import Accumulate, AdaLomo, Clip, Linear

lomo_optim = pytest.importorskip("lomo_optim", reason="needs: pip install --no-deps lomo-optim")

STEPS = 20
OPTIONS = {
    "lr": 0.1,
    "eps": (1e-20, 1e-2),
    "clip_threshold": 0.8,
    "decay_rate": -0.7,
    "loss_scale": 64.0,
    "clip_grad_value": 0.05,
}


class One:
    """One group of all parameters, as the library has it."""

    @hookimpl
    def parameter_groups(self, run):
        return [{"params": list(run.model.named_parameters())}]


class Named:
    """What the library asks of a model, for some of the parameters of one."""

    def __init__(self, model, prefixes):
        self.named = [(n, p) for n, p in model.named_parameters() if n.startswith(prefixes)]

    def named_parameters(self):
        return self.named

    def parameters(self):
        return [p for _, p in self.named]


def library(monkeypatch, model, **options):
    """Return the library's optimizer on the CPU: where it asks for a CUDA tensor, it gets the tensor."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
        return lomo_optim.AdaLomo(model, **OPTIONS, **options)


def losses(model, data):
    """Yield the loss of each step, as a hand-written loop has it."""
    for step in range(STEPS):
        epoch, batch = divmod(step, 4)
        picked = Shuffled(30, 0).order(epoch)[batch * 8 : (batch + 1) * 8]
        torch.manual_seed(derive_seed(0, "step", step, 0))
        yield step, model(**{name: column[picked] for name, column in data.items()})["loss"]


def test_twenty_steps_are_the_librarys(monkeypatch):
    """Twenty steps under a schedule with every option set are those of AdaLomo.fused_backward called by hand."""
    data, ours, theirs = columns(30), net(0.2), net(0.2)
    fit(ours, [AdaLomo(**OPTIONS, weight_decay=0.3), One(), Linear()], data, steps=STEPS)
    optimizer = library(monkeypatch, theirs, weight_decay=0.3)
    for step, loss in losses(theirs, data):
        optimizer.fused_backward(loss, OPTIONS["lr"] * (STEPS - step) / STEPS)
    assert_same_weights(ours, theirs)


def test_groups_have_rates_and_decays_of_their_own(monkeypatch):
    """Two groups are updated as two of the library's optimizers would, in one backward pass."""
    data, ours, theirs = columns(30), net(), net()

    class Two:
        @hookimpl
        def parameter_groups(self, run):
            named = list(run.model.named_parameters())
            first = [(n, p) for n, p in named if n.startswith("first")]
            rest = [(n, p) for n, p in named if not n.startswith("first")]
            return [{"params": first, "lr": 0.3, "weight_decay": 0.0}, {"params": rest}]

    fit(ours, [AdaLomo(**OPTIONS, weight_decay=0.3), Two()], data, steps=STEPS)
    one = library(monkeypatch, Named(theirs, "first"))
    two = library(monkeypatch, Named(theirs, ("norm", "last")), weight_decay=0.3)
    for _, loss in losses(theirs, data):
        one.lr, two.lr = 0.3, OPTIONS["lr"]
        one.step_num, two.step_num = one.step_num + 1, two.step_num + 1
        (loss * OPTIONS["loss_scale"]).backward()
        one.grad_func(0)
        two.grad_func(0)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_exact(dtype):
    """A state from the middle, through the checkpoint's encoding, goes on bit for bit; the means stay float32."""
    data, straight, resumed, kept = columns(30), net(0.2).to(dtype), net(0.2).to(dtype), {}
    data["features"] = data["features"].to(dtype)

    class Take:
        @hookimpl
        def step_end(self, step):
            if step.run.progress.step == 7:
                kept["state"] = encode(step.run.state_dict())

    whole, _ = fit(straight, [AdaLomo(**OPTIONS), Linear(), Take()], data, steps=STEPS)
    trainer = Trainer(resumed, [AdaLomo(**OPTIONS), Linear()], device="cpu", steps=STEPS, log_every="1 step")
    run = trainer.assemble(data)
    run.load_state_dict(decode(*kept["state"]))
    run.settings.log_every.start(run)
    run.model.train()
    run.hooks.fit(run)
    assert_same_weights(straight, resumed)
    assert digest(whole.run, "optimizer") == digest(run, "optimizer")
    means = [mean for state in run.optimizer.state.values() for mean in state.values()]
    assert {mean.dtype for mean in means} == {torch.float32}
    assert all(mean.any() for mean in means)


@pytest.mark.parametrize("ending", [(), (Crash(at=2),)], ids=["ended", "interrupted"])
def test_hooks_are_removed(ending):
    """After a run, ended or interrupted, a backward pass leaves gradients as ever and moves no weight."""
    model, data = net(), columns()
    try:
        fit(model, [AdaLomo(), *ending], data, steps=3)
    except KeyboardInterrupt:
        assert ending
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model(**data)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("other", [Clip(), Accumulate()])
def test_what_cannot_be_right_is_refused_in_the_plan(other):
    """Accumulation and clipping by norm are refused before anything is built."""
    with pytest.raises(PlanError, match="adalomo"):
        fit(net(), [AdaLomo(), other], columns(), steps=2)


def test_parameters_of_more_dimensions_are_refused():
    """A convolution's weight has neither rows nor columns: refused at assembly, with its name and shape."""

    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(1, 2, 3)

        def forward(self, features, labels):
            return {"loss": self.conv(features[:, None]).mean()}

    with pytest.raises(ConfigError, match=r"conv.weight \[2, 1, 3\]"):
        fit(Convolution(), [AdaLomo()], columns(), steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"eps": (1e-30,)}, "eps must be two numbers"), ({"decay_rate": 0.8}, "decay_rate must be a number < 0")],
)
def test_values_out_of_bounds_are_refused(options, message):
    """A value out of bounds is refused with the bound and the value."""
    with pytest.raises(ValueError, match=message):
        AdaLomo(**options)
