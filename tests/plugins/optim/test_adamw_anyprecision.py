"""`adamw-anyprecision` is AdamW in float32, and loses next to nothing in bfloat16 with Kahan summation."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, groups_by_hand, net, train_by_hand

from drivetrain import ConfigError, Trainer
from drivetrain.loop import Defaults
from drivetrain.testing import digest
from drivetrain.testing.digests import decode, encode
from drivetrain_plugins import AnyPrecisionAdamW

OPTIONS = {"lr": 0.003, "betas": (0.8, 0.95), "eps": 1e-6}


def by_hand(groups, *, lr, betas, eps, steps, gradients, dtype=torch.float64):
    """Train lists of tensors by the paper's formulas, one after the other, in `dtype`; return the weights."""
    found = []
    for group in groups:
        for p, grads in zip(group["params"], gradients[id(group)], strict=True):
            weight = p.detach().to(dtype)
            mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
            for t in range(1, steps + 1):
                grad = grads[t - 1].to(dtype)
                mean = betas[0] * mean + (1 - betas[0]) * grad
                square = betas[1] * square + (1 - betas[1]) * grad**2
                root = (square / (1 - betas[1] ** t)).sqrt() + eps
                weight = weight - lr * group["weight_decay"] * weight - lr * mean / (1 - betas[0] ** t) / root
            found.append(weight)
    return found


def build(model, **options):
    run = cpu_run(model=model)
    return AnyPrecisionAdamW(**options).build_optimizer(run, Defaults(run, model, {}).parameter_groups(run))


@pytest.mark.parametrize("kahan", [False, True])
def test_float32_equals_torch_to_rounding(kahan):
    """With weights and state in float32, twenty steps end where those of torch.optim.AdamW end."""
    data, ours, theirs = columns(30), net(), net()
    types = {"use_kahan_summation": kahan, "compensation_dtype": "float32"}
    fit(ours, [AnyPrecisionAdamW(**OPTIONS, weight_decay=0.1, **types)], data, steps=20)
    train_by_hand(theirs, data, torch.optim.AdamW(groups_by_hand(theirs, 0.1), **OPTIONS), steps=20)
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-6)


def test_kahan_in_bfloat16_follows_float64():
    """Small steps of bfloat16 weights end as near to float64's as bfloat16 can say; without the sum they are far off."""
    steps, options = 300, {**OPTIONS, "lr": 1e-4, "weight_decay": 0.1}
    worst = {}
    for kahan in (True, False):
        model = net().to(torch.bfloat16)
        optimizer = build(model, **options, use_kahan_summation=kahan)
        draws = torch.Generator().manual_seed(8)
        gradients = {
            id(group): [[(torch.randn(p.shape, generator=draws) + 0.7).bfloat16() for _ in range(steps)] for p in group["params"]]
            for group in optimizer.param_groups
        }  # fmt: skip
        few = {name: options[name] for name in ("lr", "betas", "eps")}
        wanted = by_hand(optimizer.param_groups, **few, steps=steps, gradients=gradients)
        for t in range(steps):
            for group in optimizer.param_groups:
                for p, grads in zip(group["params"], gradients[id(group)], strict=True):
                    p.grad = grads[t]
            optimizer.step()
        got = [p for group in optimizer.param_groups for p in group["params"]]
        # In units of the last digit of a bfloat16 number: half of one is what rounding the exact weight costs.
        worst[kahan] = max(
            ((p.double() - w).abs() / (w.abs() * 2.0**-8).clamp(min=2.0**-12)).max().item()
            for p, w in zip(got, wanted, strict=True)
        )
    assert worst[True] < 1.5
    assert worst[False] > 5.0


@pytest.mark.parametrize(("kahan", "left"), [(True, 0.9048), (False, 1.0)])
def test_decay_is_compensated_too(kahan, left):
    """A weight of 1 that decays by 1e-4 a thousand times ends at exp(-0.1); summed plainly, bfloat16 never moves it."""
    weight = torch.nn.Linear(3, 2, bias=False).to(torch.bfloat16)
    torch.nn.init.ones_(weight.weight)
    optimizer = build(weight, lr=1e-3, weight_decay=0.1, use_kahan_summation=kahan)
    weight.weight.grad = torch.zeros_like(weight.weight)
    for _ in range(1000):
        optimizer.step()
    torch.testing.assert_close(weight.weight.float(), torch.full((2, 3), left), rtol=0, atol=2.0**-8)


TYPES = [
    {},
    {"use_kahan_summation": True},
    {"momentum_dtype": "bfloat16", "variance_dtype": "bfloat16"},
    {"momentum_dtype": "float16", "use_kahan_summation": True, "compensation_dtype": "float16"},
]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_state_has_its_types_and_resume_is_exact(types, weights):
    """The state has the types that were chosen, and keeps them and all bits through JSON and tensors."""
    plugin = AnyPrecisionAdamW(**OPTIONS, weight_decay=0.1, **types)

    def go_on(steps, state=None):
        data = {name: c.to(weights) if c.is_floating_point() else c for name, c in columns().items()}
        run = Trainer(net().to(weights), [plugin], steps=12, device="cpu").assemble(data)
        if state is not None:
            run.load_state_dict(state)
        run.settings.log_every.start(run)
        run.model.train()
        run.total_steps = steps
        run.hooks.fit(run)
        return run

    straight, stopped = go_on(12), go_on(5)
    kept = next(iter(stopped.optimizer.state.values()))
    names = {"exp_avg": "momentum_dtype", "exp_avg_sq": "variance_dtype"}
    names |= {"compensation": "compensation_dtype"} if plugin.use_kahan_summation else {}
    assert {name: value.dtype for name, value in kept.items() if name != "step"} == {
        name: getattr(torch, getattr(plugin, chosen)) for name, chosen in names.items()
    }
    resumed = go_on(12, decode(*encode(stopped.state_dict())))
    assert digest(resumed) == digest(straight)
    # and without drivetrain's own care for types, as a user of the optimizer alone would load it
    fresh = build(resumed.model, **OPTIONS, weight_decay=0.1, **types)
    fresh.load_state_dict(straight.optimizer.state_dict())
    again, before = fresh.state_dict()["state"], straight.optimizer.state_dict()["state"]
    assert encode({str(n): v for n, v in again.items()})[0] == encode({str(n): v for n, v in before.items()})[0]
    for number, state in before.items():
        for name in names:
            assert again[number][name].dtype == state[name].dtype
            assert torch.equal(again[number][name], state[name])


def test_kahan_changes_nothing_of_a_fresh_start():
    """The first step of float32 weights is the plain one: there is nothing to compensate yet."""
    data, plain, kahan = columns(8), net(), net()
    fit(plain, [AnyPrecisionAdamW(lr=0.01)], data, steps=1)
    fit(kahan, [AnyPrecisionAdamW(lr=0.01, use_kahan_summation=True, compensation_dtype="float32")], data, steps=1)
    assert_same_weights(plain, kahan)


def test_parameters_without_a_gradient_stay():
    """A parameter that a step gives no gradient keeps its weights and has no state, and starts later as new."""
    model = net()
    optimizer = build(model, **OPTIONS, weight_decay=0.1)
    before = model.last.weight.detach().clone()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    optimizer.step()
    assert torch.equal(model.last.weight, before)
    assert model.last.weight not in optimizer.state
    model.last.weight.grad = torch.ones_like(model.last.weight)
    optimizer.step()
    assert (optimizer.state[model.first.weight]["step"], optimizer.state[model.last.weight]["step"]) == (2, 1)
    step = (1 - 0.003 * 0.1) * before - 0.003
    torch.testing.assert_close(model.last.weight.detach(), step, rtol=1e-5, atol=1e-6)


def test_sparse_gradients_are_refused():
    """Sparse gradients are refused before step 0."""
    with pytest.raises(ConfigError, match="adamw-anyprecision takes no sparse gradients"):
        build(torch.nn.Embedding(3, 2, sparse=True))
