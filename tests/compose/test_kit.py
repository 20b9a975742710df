"""The kit itself: a sound plugin passes its suite, and each broken promise is found by the test that is for it."""

from __future__ import annotations

import random
import subprocess
import sys

import attrs
import numpy as np
import pytest
import torch

from drivetrain import ConfigError, hookimpl, option, plugin, testing
from drivetrain.testing import PluginSuite, decode, digest, encode, make_run
from drivetrain.testing.digests import fingerprint


@plugin(role="optim", example={"share": 0.5})
class Smooth:
    """Follow a running mean of the gradients: a plugin with state that changes the run."""

    share: float = option(default=0.9, ge=0, lt=1, help="how much of the mean is kept")
    _means: dict[str, torch.Tensor] = attrs.field(init=False, factory=dict)

    @hookimpl
    def assembled(self):
        """Start anew."""
        self._means = {}

    @hookimpl
    def clip_gradients(self, step):
        """Put the mean in place of each gradient, unless the step is skipped: they may not be finite then."""
        if step.skipped is not None:
            return
        for name, p in step.run.model.named_parameters():
            if p.grad is not None:
                mean = self._means.get(name, torch.zeros_like(p)) * self.share + p.grad * (1 - self.share)
                self._means[name] = p.grad = mean

    def state_dict(self):
        return {"means": {name: mean.clone() for name, mean in self._means.items()}}

    def load_state_dict(self, state):
        self._means = dict(state["means"])


class TestSmooth(PluginSuite):
    """A third-party author's whole test file."""

    plugin = Smooth


@plugin(role="report", effect="observes")
class Meddles:
    """Says it observes, and does not."""

    @hookimpl
    def gradients_ready(self, step):
        """Change a gradient."""
        step.run.model.head.weight.grad *= 1.001


@plugin(role="report", effect="observes")
class Dices:
    """Draws from a global generator that other plugins may use."""

    @hookimpl
    def step_end(self):
        """Draw."""
        random.random()


@plugin(role="report")
class DicesWhenMade:
    """Draws when it is built."""

    def __attrs_post_init__(self):
        np.random.random()  # noqa: NPY002


@plugin(role="control")
class Remembers:
    """Keeps what the run before left, and does not save what it keeps."""

    _seen: int = attrs.field(init=False, default=0)

    @hookimpl
    def gradients_ready(self, step):
        """Do something else each time."""
        self._seen += 1
        for p in step.run.parameters:
            if p.grad is not None:
                p.grad *= 1 / self._seen


class Forgets(Remembers):
    """Starts anew with each run, but saves nothing."""

    @hookimpl
    def assembled(self):
        """Start anew."""
        self._seen = 0


@plugin(role="report", effect="observes")
class SavesOddly:
    """Has state that is neither JSON nor a tensor."""

    @staticmethod
    def state_dict():
        return {"seen": {1, 2}}

    @staticmethod
    def load_state_dict(state):
        pass


@plugin(role="report", effect="observes")
class LosesState:
    """Loads something else than it saved."""

    _count: int = attrs.field(init=False, default=0)

    @hookimpl
    def step_end(self):
        """Count."""
        self._count += 1

    def state_dict(self):
        return {"count": self._count}

    def load_state_dict(self, state):
        pass


@plugin(role="loss")
class ForgetsScale:
    """Takes the mean of means."""

    @hookimpl
    def compute_loss(self, micro):
        """Divide by the number of micro-batches, whatever their sizes."""
        return micro.outputs["loss"] / len(micro.step.micros)


@plugin(role="precision")
class LeavesOn:
    """Switches something on and off again, unless something is raised in between."""

    @hookimpl(wrapper=True)
    def forward(self):
        """Autocast without a `finally`."""
        torch.set_autocast_enabled("cpu", True)
        result = yield
        torch.set_autocast_enabled("cpu", False)
        return result


@plugin(role="precision")
class Swallows:
    """Hides an error of others."""

    @hookimpl(wrapper=True)
    def optimizer_step(self):
        """Go on as if nothing had been raised."""
        try:
            return (yield)
        except Exception:
            return None


@plugin(role="report", effect="observes")
class Costs:
    """Walks over everything in each step."""

    @hookimpl
    def step_end(self, step):
        """Walk."""
        for _ in range(100):
            list(step.run.model.named_parameters())


@plugin(role="report", effect="observes")
class Undocumented:
    """Has an option without help and a hook without a docstring."""

    depth: int = option(default=1)

    @hookimpl
    def step_end(self):
        pass


@plugin(role="report", effect="observes", example={"size": 2})
class Doubles:
    """Has an option that is another one when it is read back."""

    size: int = option(default=1, converter=lambda value: value * 2, help="doubled")


@plugin(role="control")
class Refuses:
    """Refuses a run without a reason."""

    @hookimpl
    def assembled(self, run):
        """Refuse in the company of `clip`."""
        if "clip" in run.plugins:
            raise ConfigError("no")


BROKEN = [
    (Meddles, "test_neutrality", {}, "came out different"),
    (Dices, "test_neutrality", {}, "global generator"),
    (DicesWhenMade, "test_building_draws_nothing", {}, "assert"),
    (Remembers, "test_fitting_twice", {}, "assert"),
    (Forgets, "test_exact_resume", {"workers": 0}, "model differs after resuming"),
    (SavesOddly, "test_state_round_trip", {}, "neither a JSON value nor a tensor"),
    (LosesState, "test_state_round_trip", {}, "assert"),
    (ForgetsScale, "test_loss_equivalence", {}, "not close"),
    (LeavesOn, "test_teardown", {}, "autocast"),
    (Swallows, "test_teardown", {}, "DID NOT RAISE"),
    (Costs, "test_cost", {}, "calls a step"),
    (Undocumented, "test_declaration", {}, "docstring"),
    (Doubles, "test_options_round_trip", {}, "assert"),
    (Refuses, "test_composes_with", {"other": "clip"}, "names neither"),
]


@pytest.mark.parametrize(("broken", "test", "arguments", "message"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_promise_is_found(broken, test, arguments, message, kit_folder, tmp_path, monkeypatch):  # noqa: PLR0917 - fixtures
    """The suite fails a plugin that breaks one promise, in the test of that promise, and says which."""
    monkeypatch.setattr("drivetrain.testing.suite.PATIENCE_S", 0.05)
    suite = type("Suite", (PluginSuite,), {"plugin": broken})()
    options = dict(arguments)
    if test == "test_cost":
        options["record_property"] = lambda *_: None
    if test not in ("test_declaration", "test_options_round_trip", "test_building_draws_nothing"):
        options["tmp_path"] = tmp_path
    try:
        with pytest.raises((AssertionError, TypeError, pytest.fail.Exception), match=message):
            getattr(suite, test)(kit_folder=kit_folder, **options)
    finally:
        torch.set_autocast_enabled("cpu", False)


def test_digests_see_every_bit():
    """Two runs that differ in one bit of one tensor, in a dtype, a name or a counter have different digests."""
    one, two = make_run(), make_run()
    assert digest(one) == digest(two)
    with torch.no_grad():
        two.model.head.bias[0] = torch.nextafter(two.model.head.bias[0], torch.tensor(9.0))
    assert digest(one) != digest(two)
    assert digest(one, "optimizer", "progress") == digest(two, "optimizer", "progress")
    two.progress.items += 1
    assert digest(one, "progress") != digest(two, "progress")
    zeros = torch.zeros(4)
    trees = [
        {"a": zeros},
        {"b": zeros},
        {"a": -zeros},
        {"a": zeros.double()[:2]},
        {"a": zeros.view(2, 2)},
        {"a": zeros.int()},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)


def test_states_survive_json():
    """A nested state comes back from JSON and tensors as it went; keys that JSON would change are refused."""
    tree = {"a": [1, 2.5, None, {"b": torch.tensor([1, 2])}], "c": (True, "x"), "d": {}}
    text, tensors = encode(tree)
    assert fingerprint(decode(text, tensors)) == fingerprint(tree)
    with pytest.raises(TypeError, match=r"state\['a'\] has keys that are no strings"):
        encode({"a": {1: 2}})


def test_loading_the_pytest_plugin_costs_nothing():
    """A session that asks for none of the fixtures imports no torch for having drivetrain installed."""
    code = "import sys, drivetrain.testing.pytest_plugin; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_resolve():
    """Everything the kit offers can be imported, and is listed once."""
    assert sorted(testing.__all__) == sorted(testing._HOME)
    assert all(getattr(testing, name).__name__ == name for name in testing.__all__)
