"""The plugins of torch's optimizers take the steps of torch's classes."""

from __future__ import annotations

import attrs
import pytest
import torch
from plugin_helpers import columns, cpu_run, fit, net

from drivetrain import ConfigError
from drivetrain.testing.digests import decode, encode
from drivetrain_plugins import SGD, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

FUSED = {"fused": True}
BETAS = {"betas": (0.8, 0.95), "eps": 1e-6}
# Plugin, its options, torch's class, and the arguments that are called otherwise there or are torch's own choice.
CASES = [
    (AdamW, BETAS, torch.optim.AdamW, FUSED),
    (AdamW, {"amsgrad": True}, torch.optim.AdamW, FUSED),
    (AdamW, {"foreach": True}, torch.optim.AdamW, {}),
    (Adam, BETAS, torch.optim.Adam, FUSED),
    (Adam, {"amsgrad": True, "fused": False}, torch.optim.Adam, {}),
    (Adam, {"amsgrad": True}, torch.optim.Adam, FUSED),
    (Adam, {"foreach": True}, torch.optim.Adam, {}),
    (SGD, {"momentum": 0.9, "dampening": 0.3}, torch.optim.SGD, FUSED),
    (SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}, torch.optim.SGD, {}),
    (Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-6}, torch.optim.Adagrad, FUSED),
    (Adagrad, {"foreach": True}, torch.optim.Adagrad, {}),
    (RMSprop, {"alpha": 0.9, "eps": 1e-6}, torch.optim.RMSprop, {}),
    (RMSprop, {"momentum": 0.5, "centered": True, "foreach": True}, torch.optim.RMSprop, {}),
    (NAdam, {**BETAS, "momentum_decay": 0.1}, torch.optim.NAdam, {}),
    (NAdam, {"decoupled_weight_decay": True, "foreach": True}, torch.optim.NAdam, {}),
    (RAdam, BETAS, torch.optim.RAdam, {}),
    (RAdam, {"decoupled_weight_decay": True, "foreach": True}, torch.optim.RAdam, {}),
    (Adamax, BETAS, torch.optim.Adamax, {}),
    (Adamax, {"foreach": True}, torch.optim.Adamax, {}),
    (Adafactor, {"beta2_decay": -0.5, "eps": (1e-5, 1e-2), "d": 1.5}, torch.optim.Adafactor, {}),
    (Adafactor, {"foreach": True}, torch.optim.Adafactor, {}),
]
IDS = ["-".join([cls.__name__, *options]) for cls, options, *_ in CASES]
cases = pytest.mark.parametrize(("plugin", "options", "theirs", "own"), CASES, ids=IDS)


def two_groups(model):
    """Return groups that differ in rate and decay, as the plugin of groups makes them."""
    named = dict(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named.items() if "first" in n], "lr": 0.05, "weight_decay": 0.3},
        {"params": [(n, p) for n, p in named.items() if "first" not in n]},
    ]


def put_gradients(model, step):
    draws = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype)


def assembled(plugin, model):
    run = cpu_run(model=model)
    run.optimizer = plugin.build_optimizer(run, two_groups(model))
    return run


def twenty_steps(plugin, model, stop):
    """Take them; after `stop` steps the state goes through JSON and back, into a run made anew."""
    run = assembled(plugin, model)
    for step in range(20):
        if step == stop:
            state = decode(*encode(run.state_dict()))
            run = assembled(plugin, net().to(model.first.weight.dtype))
            run.load_state_dict(state)
        put_gradients(run.model, step)
        run.optimizer.step()
    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@cases
def test_twenty_steps_equal_torch_by_hand(plugin, options, theirs, own, dtype):
    """The same gradients, with two groups of other options, leave the bits of torch's class; so after a resume."""
    by_hand = net().to(dtype)
    optimizer = theirs(two_groups(by_hand), **{"lr": 0.02, "weight_decay": 0.1, **options, **own})
    for step in range(20):
        put_gradients(by_hand, step)
        optimizer.step()
    for stop in (None, 10):
        run = twenty_steps(plugin(lr=0.02, weight_decay=0.1, **options), net().to(dtype), stop)
        for ours, other in zip(run.model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(ours, other)
        kept = [run.optimizer.state[p] for p in run.model.parameters()]
        for ours, other in zip(kept, (optimizer.state[p] for p in by_hand.parameters()), strict=True):
            assert ours.keys() == other.keys()
            assert all(torch.equal(ours[name], other[name]) for name in ours)


@cases
def test_every_option_reaches_torch(plugin, options, theirs, own):
    """The groups of the optimizer carry the plugin's options, and every argument of torch's class that has a meaning."""
    made = plugin(lr=0.02, weight_decay=0.1, **options)
    optimizer = made.build_optimizer(cpu_run(), [{"params": list(net().named_parameters())}])
    assert isinstance(optimizer, theirs)
    given = {field.name for field in attrs.fields(plugin)}
    assert set(optimizer.defaults) - given <= {"maximize", "differentiable", "decoupled_weight_decay"}
    (group,) = optimizer.param_groups
    for name in given - {"fused", "foreach"}:
        assert group[name] == getattr(made, name), name
    for name, value in {**own, **options}.items():
        assert group[name] == value, name


FASTEST = [
    (AdamW, True, True), (Adam, True, True), (SGD, True, True), (Adagrad, True, False),
    (RMSprop, None, None), (NAdam, None, None), (RAdam, None, None), (Adamax, None, None), (Adafactor, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("plugin", "fused_on_cpu", "fused_on_cuda"), FASTEST)
def test_the_fastest_form_of_the_device_is_taken(plugin, fused_on_cpu, fused_on_cuda):
    """Fused where torch has the kernel, else foreach on a GPU and the loop on a CPU; decided once, when built."""
    for device, fused in (("cpu", fused_on_cpu), ("cuda", fused_on_cuda), ("meta", fused_on_cpu and False)):
        run = cpu_run()
        run.device = torch.device(device)
        (group,) = plugin().build_optimizer(run, [{"params": list(net().named_parameters())}]).param_groups
        assert group.get("fused") == fused
        if plugin is not AdamW or not fused:
            assert group["foreach"] == (device == "cuda" and not fused)


def test_complex_parameters_are_not_fused():
    """A type that the fused kernel does not take is updated all the same, unless it was asked for."""
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    groups = [{"params": [("z", parameter)]}]
    optimizer = Adam().build_optimizer(cpu_run(), groups)
    parameter.grad = torch.full_like(parameter, 1j)
    optimizer.step()
    assert not torch.equal(parameter, torch.ones_like(parameter))
    with pytest.raises(ConfigError, match="floating-point parameters"):
        Adam(fused=True).build_optimizer(cpu_run(), groups)


BOTH = {"fused": True, "foreach": True}


@pytest.mark.parametrize(
    ("plugin", "device", "message"),
    [
        *[(cls(**BOTH), "cpu", "is either fused or foreach") for cls in (AdamW, Adam, SGD, Adagrad)],
        *[(cls(fused=True), "meta", "has a fused kernel for .* only") for cls in (AdamW, Adam, SGD, Adagrad)],
        (Adagrad(fused=True), "cuda", "has a fused kernel for .* on cpu only"),
        *[
            (cls(capturable=True), "cpu", "can be captured in a graph on cuda")
            for cls in (AdamW, Adam, RMSprop, NAdam, RAdam, Adamax)
        ],
    ],
    ids=lambda value: type(value).__name__ if attrs.has(type(value)) else None,
)
def test_what_torch_refuses_in_a_step_is_refused_when_built(plugin, device, message):
    """What cannot be had is refused before step 0, with the plugin's name, what was asked for and what to do."""
    run = cpu_run()
    run.device = torch.device(device)
    with pytest.raises(ConfigError, match=message) as caught:
        plugin.build_optimizer(run, [{"params": list(net().named_parameters())}])
    (problem,) = caught.value.problems
    assert problem.what.startswith(type(plugin).__name__.lower())
    assert problem.received
    assert problem.do


def test_a_refusal_reaches_the_user_before_step_0():
    """The error of a run names the plugin."""
    with pytest.raises(ConfigError, match="adam is either fused or foreach"):
        fit(net(), [Adam(**BETAS, **BOTH)], columns(), steps=1)


@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        *[(cls, {"betas": (0.9,)}, "betas must be two numbers") for cls in (Adam, NAdam, RAdam, Adamax)],
        *[
            (cls, {"lr": 0.0}, "lr must be a number > 0")
            for cls in (Adam, Adafactor, Adagrad, RMSprop, NAdam, RAdam, Adamax)
        ],
        (RMSprop, {"alpha": 1.0}, "alpha must be a number >= 0 and < 1"),
        (Adafactor, {"beta2_decay": 0.1}, "beta2_decay must be a number"),
        (Adafactor, {"d": 0.5}, "d must be a number >= 1"),
        (Adafactor, {"eps": (1e-3, None)}, "eps must be a number or None, and a number"),
        (Adafactor, {"eps": (-1.0, 1e-3)}, "eps must be a number >= 0"),
        (Adagrad, {"lr_decay": -1}, "lr_decay must be a number >= 0"),
        (NAdam, {"momentum_decay": -1}, "momentum_decay must be a number >= 0"),
    ],
)
def test_values_out_of_bounds_are_refused(plugin, options, message):
    """A value out of bounds is refused with the bound and the value."""
    with pytest.raises(ValueError, match=message):
        plugin(**options)
