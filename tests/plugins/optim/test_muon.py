"""`muon` is `torch.optim.Muon` for matrices and `torch.optim.AdamW` for the rest."""

from __future__ import annotations

import logging

import pytest
import torch
from plugin_helpers import columns, cpu_run, fit, net

from drivetrain import ConfigError, hookimpl
from drivetrain.loop import Defaults
from drivetrain.testing.digests import decode, encode
from drivetrain_plugins import Linear, Muon


class Language(torch.nn.Module):
    """A model with every kind of two-dimensional parameter."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.bags = torch.nn.EmbeddingBag(7, 4)
        self.recurrent = torch.nn.LSTM(4, 4)
        self.convolution = torch.nn.Conv1d(4, 4, 3)
        self.norm = torch.nn.LayerNorm(4)
        self.table_bias = torch.nn.Parameter(torch.zeros(2, 4))
        self.free = torch.nn.Parameter(torch.zeros(2, 4))
        self.heads = torch.nn.Linear(4, 4, bias=False)  # of attention: no head
        self.tied = torch.nn.Linear(4, 7)
        self.tied.weight = self.embed.weight
        self.lm_head = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 7))
        self.logits = torch.nn.Linear(4, 7)

    def get_output_embeddings(self):
        return self.logits


def build(plugin, model):
    run = cpu_run(model=model)
    run.optimizer = plugin.build_optimizer(run, Defaults(run, model, {}).parameter_groups(run))
    return run


def names(run, cls):
    (inner,) = [one for one in run.optimizer.optimizers if isinstance(one, cls)]
    return [name for group in inner.param_groups for name in group["param_names"]]


def test_matrices_are_the_hidden_ones(caplog):
    """Embeddings, what is tied to them, heads, biases, norms and convolutions are AdamW's; the log says so."""
    model = Language()
    with caplog.at_level(logging.INFO, "drivetrain"):
        run = build(Muon(), model)
    matrices = ["free", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "heads.weight"]
    assert names(run, torch.optim.Muon) == matrices
    others = names(run, torch.optim.AdamW)
    assert sorted([*matrices, *others]) == sorted(name for name, _ in model.named_parameters())
    assert f"muon updates 4 matrices: {', '.join(matrices)}" in caplog.text
    assert f"adamw updates {len(others)} others: {', '.join(others)}" in caplog.text


def test_patterns_name_parts_or_whole_names():
    """`exclude` takes patterns; a part of a name must fit as a whole."""
    assert names(build(Muon(exclude=["free", "recurrent.weight_i*"]), Language()), torch.optim.Muon) == [
        "recurrent.weight_hh_l0", "heads.weight", "lm_head.0.weight", "lm_head.1.weight",
    ]  # fmt: skip


def put_gradients(model, step):
    draws = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draws)


def by_hand(model, adjust):
    """Return the two optimizers a person would make for a `Net` whose last layer is its head."""
    scaled = {"original": "original", "match-rms-adamw": "match_rms_adamw"}[adjust]
    options = {"lr": 0.05, "momentum": 0.8, "nesterov": False, "ns_steps": 4, "adjust_lr_fn": scaled}
    spared = [model.first.bias, model.norm.weight, model.norm.bias, model.last.bias]
    rest = [{"params": [model.last.weight]}, {"params": spared, "weight_decay": 0.0}]
    return (
        torch.optim.Muon([model.first.weight], weight_decay=0.1, **options),
        torch.optim.AdamW(rest, lr=0.02, betas=(0.7, 0.9), eps=1e-6, weight_decay=0.1, fused=True),
    )


@pytest.mark.parametrize("adjust", ["original", "match-rms-adamw"])
@pytest.mark.parametrize("stop", [None, 10])
def test_twenty_steps_equal_torch_by_hand(adjust, stop):
    """The same gradients leave the bits of the two classes used by hand, also when the state is saved in between."""
    plugin = Muon(
        lr=0.05, momentum=0.8, nesterov=False, ns_steps=4, weight_decay=0.1, adjust_lr=adjust,
        adamw_lr=0.02, adamw_betas=(0.7, 0.9), adamw_eps=1e-6, exclude=["last"],
    )  # fmt: skip
    theirs = net()
    both = by_hand(theirs, adjust)
    run = build(plugin, net())
    for step in range(20):
        if step == stop:
            state = decode(*encode(run.state_dict()))
            run = build(plugin, net())
            run.load_state_dict(state)
        for model in (run.model, theirs):
            put_gradients(model, step)
        run.optimizer.step()
        for one in both:
            one.step()
    for left, right in zip(run.model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left, right)


class Rates:
    """Keep the rates of every step."""

    def __init__(self):
        self.seen = []

    @hookimpl
    def optimizer_step(self, step):
        self.seen.append([group["lr"] for one in step.run.optimizer.optimizers for group in one.param_groups])
        step.run.optimizer.step()


def test_both_follow_the_schedule():
    """At each step the rates that the two update with are their own, times the schedule's factor."""
    rates = Rates()
    fit(net(), [Muon(lr=0.05, adamw_lr=0.02, exclude=["last"]), Linear(), rates], columns(), steps=4)
    assert rates.seen == [[0.05 * factor, 0.02 * factor] for factor in (1.0, 0.75, 0.5, 0.25)]


def test_a_model_without_matrices_is_refused():
    """Where AdamW would do everything, nobody is let believe that Muon trains."""
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.LayerNorm(4))
    with pytest.raises(ConfigError, match="muon finds no matrix among the parameters") as caught:
        build(Muon(), model)
    assert "0.weight" in str(caught.value)
    with pytest.raises(ConfigError, match="muon finds no matrix"):
        fit(net(), [Muon(exclude=["*"])], columns(), steps=1)


def test_a_model_of_matrices_alone_needs_no_adamw():
    """Without anything else there is one optimizer."""
    (inner,) = build(Muon(), torch.nn.Linear(4, 4, bias=False)).optimizer.optimizers
    assert isinstance(inner, torch.optim.Muon)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adamw_betas": (0.9,)}, "adamw_betas must be two numbers"),
        ({"exclude": "lm_head"}, "exclude must be a list of patterns"),
        ({"adjust_lr": "match_rms_adamw"}, "did you mean 'match-rms-adamw'"),
        ({"ns_steps": 100}, "ns_steps must be a number >= 1 and < 100"),
        ({"lr": 0}, "lr must be a number > 0"),
    ],
)
def test_values_out_of_bounds_are_refused(options, message):
    """A value out of bounds is refused with the bound and the value."""
    with pytest.raises(ValueError, match=message):
        Muon(**options)
