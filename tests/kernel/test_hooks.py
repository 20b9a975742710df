"""The hooks: what the contract says about them is what happens."""

from __future__ import annotations

import inspect

import pytest

from drivetrain import ConfigError, Exporter, Hooks, Trainer, hookimpl
from drivetrain.hooks import DEFAULT_CALLS
from drivetrain.loop import Defaults
from drivetrain.testing import BaseOptimizer, Recorder, digest, make_micro, make_run, make_step, saboteur
from drivetrain.testing.carriers import tiny_module
from drivetrain.testing.kinds import tensor_rows
from drivetrain.testing.probes import Sabotage, Watch
from drivetrain_plugins import SGD, Accumulate, Accuracy, Checkpoint, Clip, Evaluate

NAMES = [name for name, value in vars(Hooks).items() if hasattr(value, "drivetrain_kind")]
ASSEMBLY = ["add_hooks", "build_model", "build_dataset", "build_collator", "build_sampler", "build_batches"]
STEP = [
    "plan_step", "train_step", "count_items", "compute_gradients", "accumulate", "prepare", "forward", "compute_loss",
    "backward", "prepare", "forward", "compute_loss", "backward", "gradients_ready", "clip_gradients", "grad_norm",
    "optimizer_step", "zero_grad", "step_end",
]  # fmt: skip


def test_every_hook_declares_its_kind_and_carrier():
    """Each method of the contract is a hook with a kind; a hot one takes exactly one carrier."""
    methods = [name for name, value in vars(Hooks).items() if inspect.isfunction(value)]
    assert methods == NAMES
    for name in NAMES:
        hook = getattr(Hooks, name)
        assert hook.drivetrain_kind in ("operation", "event", "collect")
        if hook.drivetrain_hot:
            assert len(inspect.signature(hook).parameters) == 2, name


def test_defaults_are_of_operations():
    """The kernel has a default for operations only, and for each that its own defaults call."""
    implemented = [name for name in NAMES if hasattr(Defaults, name)]
    assert {getattr(Hooks, name).drivetrain_kind for name in implemented} == {"operation"}
    called = {name for calls in DEFAULT_CALLS.values() for name in calls}
    without = {n for n in called if getattr(Hooks, n).drivetrain_kind == "operation"} - set(implemented)
    assert without == {"clip_gradients", "evaluate", "save"}  # optional: nothing happens, or nobody asks


def record(tmp_path, *plugins, **settings):
    recorder = Recorder()
    trainer = Trainer(tiny_module(), [recorder, *plugins], output=tmp_path, device="cpu", **settings)
    trainer.fit(tensor_rows(32), tensor_rows(12, start=1000))
    return recorder


def test_the_whole_run_in_order(tmp_path):
    """Every hook of a run with evaluation and checkpoints is fired where the contract draws it."""
    plugins = [SGD(lr=0.1), Accumulate(2), Clip(), Evaluate(every="2 steps"), Accuracy(), Checkpoint(every="2 steps")]
    recorder = record(tmp_path, *plugins, steps=2, log_every=2)
    names = recorder.names
    built = names[: names.index("fit")]
    assert [n for n in built if n in ASSEMBLY][:5] == ASSEMBLY[1:6]
    rest = ["transforms", "parameter_groups", "build_optimizer", "count_steps", "build_schedule", "assembled"]
    assert built[-6:] == rest
    evaluation = ["evaluate", "metrics", *["prepare", "forward", "compute_loss"] * 2, "log", "evaluated"]
    boundary = ["log", "agree", *evaluation, "save", "saved"]
    assert names[names.index("fit") :] == ["fit", "epoch", *STEP, *STEP, *boundary]


def test_the_recorder_knows_the_step(tmp_path):
    """`step_end` is fired when the counters have moved; everything before it belongs to the step that is under way."""
    recorder = record(tmp_path, SGD(lr=0.1), Evaluate(), steps=3)
    assert [number for name, number in recorder.events if name == "train_step"] == [0, 1, 2]
    assert [number for name, number in recorder.events if name == "step_end"] == [1, 2, 3]


def test_no_default_runs_beside_an_owner():
    """An owner that returns None keeps the default from running too: `backward` adds its gradients once."""

    class OwnBackward:
        @hookimpl
        def backward(self, micro):
            micro.loss.backward()

    ours, theirs = make_run(OwnBackward()), make_run()
    ours.hooks.fit(ours)
    theirs.hooks.fit(theirs)
    assert digest(ours) == digest(theirs)


def test_every_hot_operation_can_be_owned():
    """Each operation of a step can be taken over; here by owners that do what the default does."""

    class OwnsAll:
        @hookimpl
        def count_items(self, step):
            step.num_rows = step.num_items = sum(m.num_rows for m in step.micros)
            for micro in step.micros:
                micro.run, micro.step, micro.scale = step.run, step, micro.num_items / step.num_items

        @hookimpl
        def prepare(self, micro):
            micro.batch = dict(micro.batch)

        @hookimpl
        def forward(self, micro):
            return micro.run.model(**micro.batch)

        @hookimpl
        def compute_loss(self, micro):
            return micro.outputs["loss"] * micro.scale

        @hookimpl
        def optimizer_step(self, step):
            step.run.optimizer.step()

        @hookimpl
        def zero_grad(self, step):
            step.run.optimizer.zero_grad()

        @hookimpl
        def agree(self, votes):
            return votes

    ours, theirs = make_run(OwnsAll(), Accumulate(2)), make_run(Accumulate(2))
    ours.hooks.fit(ours)
    theirs.hooks.fit(theirs)
    assert digest(ours) == digest(theirs)


def test_wrappers_nest_in_the_order_of_the_list():
    """The first plugin of the list is called first and is the outermost; every listener is called in that order."""
    trace = []

    def named(name):
        class Traces:
            @hookimpl(wrapper=True)
            def forward(self):
                trace.append(f"{name} in")
                result = yield
                trace.append(f"{name} out")
                return result

            @hookimpl
            def step_end(self):
                trace.append(f"{name} hears")

        return Traces()

    run = make_run(("a", named("a")), ("b", named("b")), steps=1)
    run.hooks.fit(run)
    assert trace == ["a in", "b in", "b out", "a out", "a hears", "b hears"]


def test_a_failure_is_heard_while_the_wrappers_are_still_up():
    """`failed` is fired before the wrappers of `fit` unwind, with the error, which names the plugin and the hook."""
    watch = Watch()
    run = make_run(watch)
    trainer = Trainer(tiny_module(), [watch, BaseOptimizer(), saboteur("forward")], steps=4, device="cpu")
    with pytest.raises(Sabotage) as caught:
        trainer.fit(tensor_rows(40))
    assert watch.heard == [caught.value]
    assert watch.unwound
    assert caught.value.__notes__ == ["in plugin 'saboteur', hook 'forward', step 1"]
    assert run.progress.step == 0


def test_a_failure_of_assembly_names_plugin_and_hook():
    """An error before step 0 is annotated as one in the loop is."""
    trainer = Trainer(tiny_module(), [BaseOptimizer(), saboteur("parameter_groups")], steps=4, device="cpu")
    with pytest.raises(Sabotage) as caught:
        trainer.fit(tensor_rows(40))
    assert caught.value.__notes__ == ["in plugin 'saboteur', hook 'parameter_groups', step 0"]


class Around:
    """Wrap a hot and a cold hook, and raise behind the inner call where the test asks for it."""

    def __init__(self, raises=False):
        self.raises = raises

    @hookimpl(wrapper=True)
    def fit(self):
        return (yield)

    @hookimpl(wrapper=True)
    def forward(self):
        outputs = yield
        if self.raises:
            raise Sabotage
        return outputs


@pytest.mark.parametrize("frozen", [True, False])
def test_a_wrapper_is_blamed_for_its_own_failures_only(frozen):
    """An error that passes through a plugin's wrappers names nobody; one that a wrapper raises names it."""
    broken = tiny_module()
    broken.forward = lambda **batch: 1 / 0
    for model, raises, note in (
        (broken, False, "in step 0"),
        (None, True, "in plugin 'around', hook 'forward', step 0"),
    ):
        trainer = Trainer(model or tiny_module(), [Around(raises), BaseOptimizer()], steps=1, device="cpu")
        trainer.frozen = frozen
        with pytest.raises((Sabotage, ZeroDivisionError)) as caught:
            trainer.fit(tensor_rows(8))
        assert caught.value.__notes__ == [note]


def test_exporters_are_collected_by_format(tmp_path):
    """Each plugin adds its formats; asking for one that nobody has is told which there are."""

    class Writes:
        @hookimpl
        def export(self):
            return [Exporter("names", lambda run, path: path.write_text("\n".join(dict(run.model.named_parameters()))))]

    trainer = Trainer(tiny_module(), [Writes(), BaseOptimizer()], steps=1, device="cpu")
    trainer.assemble(tensor_rows(8))
    trainer.export("names", tmp_path / "names.txt")
    assert "head.weight" in (tmp_path / "names.txt").read_text()
    with pytest.raises(ConfigError, match=r"no plugin of this run exports 'onnx'. It has: \['names'\]"):
        trainer.export("onnx", tmp_path / "x")


def test_load_and_loaded():
    """`loaded` is fired with what `load` found, after it; a load that finds nothing is no failure with "auto"."""
    heard = []

    class Loads:
        found = None

        @hookimpl
        def load(self, run, path):
            heard.append(("load", path))
            return self.found

        @hookimpl
        def loaded(self, path):
            heard.append(("loaded", path))

    trainer = Trainer(tiny_module(), [Loads(), BaseOptimizer()], steps=1, device="cpu")
    trainer.fit(tensor_rows(8), resume="auto")
    Loads.found = "there"
    Trainer(tiny_module(), [Loads(), BaseOptimizer()], steps=1, device="cpu").fit(tensor_rows(8), resume="there")
    assert [name for name, _ in heard] == ["load", "load", "loaded"]
    assert heard[-1] == ("loaded", "there")


def test_carriers_call_one_hook():
    """`make_step` and `make_micro` are enough to test one method of a plugin."""
    micro = make_micro(forward=True)
    assert micro.loss.ndim == 0
    assert micro.outputs["logits"].shape == (8, 3)
    step = make_step(gradients=True)
    Clip(norm=0.01).clip_gradients(step)
    total = step.run.hooks.grad_norm(step)
    assert float(total) == pytest.approx(0.01, rel=1e-4)
    assert float(step.grad_norm) > 0.01
