"""The plan says everything that is wrong, at once, before anything is built."""

from __future__ import annotations

import json

import attrs
import pytest

from drivetrain import PlanError, Trainer, hookimpl, plugin
from drivetrain.testing import BaseOptimizer
from drivetrain.testing.carriers import tiny_module
from drivetrain.testing.kinds import tensor_rows
from drivetrain_plugins import BF16, SGD, Accumulate, Accuracy, AdamW, Clip, Evaluate, Linear


def problems(*plugins, given=(), model=True, **settings):
    trainer = Trainer(tiny_module() if model else None, plugins, **(settings or {"steps": 1}))
    return trainer.plan(given=given).problems


def only(*plugins, **options):
    """Return the text of the one problem there is."""
    found = problems(BaseOptimizer(), *plugins, **options)
    assert len(found) == 1, "\n".join(map(str, found))
    assert found[0].do, "a problem says what to do"
    return str(found[0])


class OwnsTrainStep:
    @hookimpl
    def train_step(self, step):
        pass


class Pipeline:
    calls = {"compute_gradients": ("gradients_ready",)}  # noqa: RUF012

    @hookimpl
    def compute_gradients(self, step):
        pass


class OwnsPlanStep:
    @hookimpl
    def plan_step(self, run):
        pass


class WrapsForward:
    @hookimpl(wrapper=True)
    def forward(self):
        return (yield)


def test_a_sound_composition_has_no_problems():
    """The base of the other tests is fine, so that each problem below is the one that is meant."""
    assert problems(BaseOptimizer(), BF16(), Accumulate(2), Clip(), Linear()) == []


def test_two_owners_of_an_operation():
    """Both owners and the operation are named."""
    text = "\n".join(map(str, problems(AdamW(), SGD())))
    assert "two plugins own 'build_optimizer'" in text
    assert "adamw and sgd" in text


def test_a_class_instead_of_an_instance():
    """The class is named, with the way to write it."""
    text = only(("pipe", Pipeline))
    assert "plugin 'pipe' is a class" in text
    assert "write Pipeline(...)" in text


def test_a_misspelt_hook():
    """The nearest hook is offered."""

    class Misspelt:
        @hookimpl
        def step_ends(self, step):
            pass

    text = only(Misspelt())
    assert "Misspelt.step_ends: there is no hook 'step_ends'" in text
    assert "'step_end'" in text


def test_an_unmarked_hook():
    """A method named like a hook without `@hookimpl` would silently never be called."""

    class Unmarked:
        def step_end(self, step):
            pass

    assert "plugin 'unmarked', Unmarked.step_end: is named like a hook but not marked" in only(Unmarked())


def test_arguments_that_pluggy_cannot_fill():
    """Keyword-only, starred and defaulted arguments, and unknown ones, are refused in one go."""

    class Odd:
        @hookimpl
        def step_end(self, *, step):
            pass

        @hookimpl
        def zero_grad(self, **options):
            pass

        @hookimpl
        def gradients_ready(self, step, scale=1.0):
            pass

        @hookimpl
        def clip_gradients(self, run):
            pass

    text = "\n".join(map(str, problems(BaseOptimizer(), Odd())))
    assert "Odd.step_end: step cannot be filled by pluggy" in text
    assert "Odd.zero_grad: **options cannot be filled by pluggy" in text
    assert "Odd.gradients_ready: scale=1.0 cannot be filled by pluggy" in text
    assert "Odd.clip_gradients: hook 'clip_gradients' has no argument 'run'" in text
    assert "it has: step" in text


def test_an_unhashable_plugin():
    """Classes of attrs with equality cannot be registered; the message has the mend."""

    @attrs.define
    class Unhashable:
        pass

    text = only(Unhashable())
    assert "plugin 'unhashable' is not hashable" in text
    assert "eq=False" in text


def test_wrappers_that_are_none():
    """Wrappers of events, wrappers without a yield, old-style ones, and yields without a wrapper are refused."""

    class Wrong:
        @hookimpl(wrapper=True)
        def step_end(self, step):
            return (yield)

        @hookimpl(wrapper=True)
        def forward(self, micro):
            return micro

        @hookimpl(hookwrapper=True)
        def backward(self, micro):
            yield

        @hookimpl
        def compute_loss(self, micro):
            yield

    text = "\n".join(map(str, problems(BaseOptimizer(), Wrong())))
    assert "'step_end' is of kind 'event' and takes no wrappers" in text
    assert "Wrong.forward: a wrapper must yield once" in text
    assert "Wrong.backward: old-style hookwrapper" in text
    assert "Wrong.compute_loss: yields but is no wrapper" in text


@pytest.mark.parametrize(
    ("owner", "inner"), [(Pipeline, WrapsForward), (OwnsTrainStep, WrapsForward), (OwnsTrainStep, Clip)]
)
def test_a_hook_that_can_never_run(owner, inner):
    """Whoever owns an outer operation makes the inner ones unreachable, at any depth; both sides are named."""
    text = only(owner(), inner())
    hook = "clip_gradients" if inner is Clip else "forward"
    name = "clip" if inner is Clip else "wraps-forward"
    assert f"hook {hook!r} of {name!r} can never run" in text
    assert {Pipeline: "'pipeline' owns 'compute_gradients'", OwnsTrainStep: "'owns-train-step' owns 'train_step'"}[
        owner
    ] in text


def test_an_owner_that_says_what_it_calls_makes_nothing_unreachable():
    """`calls` names the operations that an owner still fires."""

    class Counts:
        @hookimpl
        def gradients_ready(self, step):
            pass

    assert problems(BaseOptimizer(), Pipeline(), Counts()) == []


def test_a_fact_that_nobody_reads():
    """Accumulation is refused under a `plan_step` that does not say it reads it, and allowed under one that does."""
    text = only(Accumulate(4), OwnsPlanStep())
    assert "accumulation=4 would not be read" in text
    assert "'owns-plan-step' owns 'plan_step'" in text

    class Reads(OwnsPlanStep):
        reads = ("accumulation",)

    assert problems(BaseOptimizer(), Accumulate(4), Reads()) == []


def test_words():
    """Required words must be provided, and conflicting ones must not meet; both plugins are named."""
    text = only(Accuracy())
    assert "plugin 'accuracy' requires 'evaluation', which no plugin of this run provides" in text
    assert problems(BaseOptimizer(), Accuracy(), Evaluate()) == []

    @plugin(role="precision", provides=["precision"])
    class Other:
        pass

    text = only(BF16(), Other())
    assert "plugins 'bf16' and 'other' cannot be combined" in text


def test_what_is_missing():
    """Model, optimizer and length are asked for, with the plugins that would bring them."""
    text = "\n".join(map(str, problems(model=False, seed=1)))
    assert "the run has no model" in text
    assert "hf-model" in text
    assert "the run has no optimizer" in text
    assert "adamw" in text
    assert "the run has no length" in text


def test_evaluation_data_that_nobody_evaluates():
    """Data given for nothing is a mistake."""
    assert "no plugin evaluates" in only(given=["train", "evaluate"])


def test_everything_at_once():
    """`fit` raises one error that holds every problem of every kind."""

    class Misspelt:
        @hookimpl
        def forwards(self):
            pass

    trainer = Trainer(tiny_module(), [AdamW(), SGD(), Misspelt(), OwnsTrainStep(), Clip(), Accuracy()])
    with pytest.raises(PlanError) as caught:
        trainer.fit(tensor_rows(8))
    assert len(caught.value.problems) == 5
    for part in ("5 problems:", "build_optimizer", "'forwards'", "'clip_gradients'", "'evaluation'", "no length"):
        assert part in str(caught.value)


def test_names_are_told_apart():
    """Two plugins of one kind need labels, and both then act."""
    with pytest.raises(PlanError, match="plugin 'clip' is listed twice"):
        Trainer(tiny_module(), [Clip(), Clip()])

    class Hears:
        @hookimpl
        def step_end(self):
            pass

    plan = Trainer(tiny_module(), [("hears:a", Hears()), ("hears:b", Hears()), SGD()], steps=1).plan()
    assert plan.hooks["step_end"].listeners == ["hears:a", "hears:b"]


def test_the_list_is_the_order():
    """The first of the list is the outermost wrapper and the first to hear; `tryfirst` is told as the reason."""

    class Both:
        @hookimpl(wrapper=True)
        def forward(self):
            return (yield)

        @hookimpl
        def step_end(self):
            pass

    class Pushy:
        @hookimpl(tryfirst=True)
        def step_end(self):
            pass

    plan = Trainer(tiny_module(), [("one", Both()), ("two", Both()), Pushy(), SGD()], steps=1).plan()
    assert plan.hooks["forward"].wrappers == ["one", "two"]
    assert plan.hooks["forward"].owner == "drivetrain"
    assert plan.hooks["step_end"].listeners == ["pushy", "one", "two"]
    assert "tryfirst" in plan.hooks["step_end"].reason


def test_the_plan_prints_and_is_stored(tmp_path):
    """A plan is a drawing with every plugin in its place, and JSON beside the run."""
    trainer = Trainer(tiny_module(), [SGD(lr=0.25), BF16()], steps=1, output=tmp_path, device="cpu")
    drawn = str(trainer.plan())
    assert "lr=0.25" in drawn
    forward = next(line for line in drawn.splitlines() if line.strip().startswith("forward"))
    assert "wrapped by bf16" in forward
    trainer.fit(tensor_rows(8))
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(trainer.plan().as_dict()))
