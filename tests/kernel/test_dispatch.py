"""Frozen dispatch and pluggy agree: in order, results and exceptions."""

from __future__ import annotations

import itertools

import pytest

from drivetrain import Catalogue, Trainer, event, hookimpl, operation
from drivetrain.dispatch import Manager, callables, freeze
from drivetrain.testing import BaseOptimizer, Recorder, digest, example, make_run
from drivetrain.testing.carriers import tiny_module
from drivetrain.testing.kinds import tensor_rows
from drivetrain_plugins import BF16, SGD, Accumulate, Accuracy, Checkpoint, Clip, Evaluate, JsonlLog, Linear, Loader


class InnerError(Exception):
    pass


class OuterError(Exception):
    pass


def passes(trace, name):
    trace.append(f"{name} in")
    result = yield
    trace.append(f"{name} out {result}")
    return result


def changes(trace, name):
    result = yield
    return (name, result)


def forgets(trace, name):
    yield


def swallows(trace, name):
    try:
        return (yield)
    except BaseException as error:
        trace.append(f"{name} swallowed {type(error).__name__}")
        return f"{name} instead"


def replaces(trace, name):
    try:
        return (yield)
    except Exception as error:
        raise OuterError(name) from error


def cleans(trace, name):
    try:
        return (yield)
    finally:
        trace.append(f"{name} cleaned")


def raises_before(trace, name):
    trace.append(f"{name} raises")
    raise OuterError(name)
    yield


def raises_after(trace, name):
    yield
    raise OuterError(name)


def yields_twice(trace, name):
    yield
    trace.append(f"{name} again")
    yield


def yields_twice_after_an_error(trace, name):
    try:
        yield
    except BaseException:
        yield


def never_yields(trace, name):
    return
    yield


def raises_stop(trace, name):
    yield
    raise StopIteration(name)  # noqa: PLR1708 - to see what becomes of it


def returns(trace):
    trace.append("inner")
    return 7


def returns_none(trace):
    trace.append("inner")


def raises(trace):
    raise InnerError(1)


def raises_stop_iteration(trace):
    raise StopIteration(5)


def raises_runtime(trace):
    raise RuntimeError("inner")


def interrupts(trace):
    raise KeyboardInterrupt


WRAPPERS = [
    passes, changes, swallows, replaces, cleans, raises_after, forgets, raises_before, yields_twice,
    yields_twice_after_an_error, never_yields, raises_stop,
]  # fmt: skip
INNERS = [returns, returns_none, raises, raises_stop_iteration, raises_runtime, interrupts, None]


def wrapper_plugin(trace, behaviour, name):
    class Plugin:
        @hookimpl(wrapper=True)
        def forward(self, micro):
            return (yield from behaviour(trace, name))

    return Plugin()


def owner_plugin(trace, behaviour):
    class Plugin:
        @hookimpl
        def forward(self):
            return behaviour(trace)

    return Plugin()


def outcome(call, trace):
    trace.clear()
    try:
        ended = ("returned", call("micro"))
    except BaseException as error:  # KeyboardInterrupt is one of them
        said = error.args if isinstance(error, (InnerError, OuterError, StopIteration)) else None
        ended = ("raised", type(error), said, type(error.__cause__))
    return ended, list(trace)


@pytest.mark.parametrize("inner", INNERS, ids=lambda f: f.__name__ if f else "nobody")
def test_wrappers_agree(inner):
    """Every nesting of two (and of three of the commoner) wrappers around every inner call ends the same way, with one trace."""
    trace, manager = [], Manager()
    made = {(b, number): wrapper_plugin(trace, b, f"w{number}") for b in WRAPPERS for number in range(3)}
    if inner is not None:
        manager.register(owner_plugin(trace, inner), "owner")

    def pluggys(micro):
        return manager.hook.forward(micro=micro)

    up_to_two = [itertools.product(WRAPPERS, repeat=depth) for depth in range(3)]
    for behaviours in itertools.chain(*up_to_two, itertools.product(WRAPPERS[:6], repeat=3)):
        if {yields_twice, yields_twice_after_an_error} & set(behaviours[:-1]):
            continue  # not the outermost: see the next test
        wrappers = [made[behaviour, number] for number, behaviour in enumerate(behaviours)]
        for wrapper in wrappers:
            manager.register(wrapper)
        frozen = freeze(manager.hook.forward, "operation")
        assert outcome(frozen, trace) == outcome(pluggys, trace), [b.__name__ for b in behaviours]
        for wrapper in wrappers:
            manager.unregister(wrapper)


@pytest.mark.parametrize("faulty", [yields_twice, yields_twice_after_an_error])
def test_a_second_yield_unwinds_the_wrappers_around_it(faulty):
    """Where pluggy leaves the outer wrappers to the garbage collector, frozen dispatch unwinds them with the error."""
    trace, manager = [], Manager()
    manager.register(owner_plugin(trace, returns if faulty is yields_twice else raises), "owner")
    manager.register(wrapper_plugin(trace, faulty, "faulty"), "faulty")
    manager.register(wrapper_plugin(trace, cleans, "outer"), "outer")
    with pytest.raises(RuntimeError, match="second yield"):
        callables(manager).forward("micro")
    assert trace[-1] == "outer cleaned"


@pytest.mark.parametrize("failing", [None, 0, 1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_events_agree(count, failing):
    """Listeners hear an event in the same order, and the first that raises ends it."""
    trace, manager = [], Manager()

    def listener(number):
        class Plugin:
            @hookimpl
            def step_end(self, step):
                trace.append((number, step))
                if number == failing:
                    raise InnerError(number)
                return "ignored"

        return Plugin()

    for number in reversed(range(count)):
        manager.register(listener(number), str(number))
    plain, frozen = callables(manager, frozen=False), callables(manager)

    def one(call):
        trace.clear()
        try:
            call("carrier")
        except InnerError as error:
            return error.args, list(trace)
        return None, list(trace)

    assert one(frozen.step_end) == one(plain.step_end)
    heard = list(range(count if failing is None else min(failing + 1, count)))
    assert [number for number, _ in trace] == heard


def test_nothing_is_kept_of_a_call():
    """After an error, nothing of the dispatch holds the carrier: memory can be given back while recovering."""
    import gc
    import weakref

    class Carrier:
        pass

    trace, manager = [], Manager()
    manager.register(owner_plugin(trace, raises), "owner")
    manager.register(wrapper_plugin(trace, cleans, "w"), "w")
    carrier = Carrier()
    seen = weakref.ref(carrier)
    gc.disable()
    try:
        with pytest.raises(InnerError) as caught:
            callables(manager).forward(carrier)
        del caught, carrier
        assert seen() is None
    finally:
        gc.enable()


def test_registering_after_the_freeze_is_refused():
    """A plugin that comes when the run has started would be half heard, so it is refused by name."""
    run_manager = Manager()
    callables(run_manager)
    with pytest.raises(RuntimeError, match="'late' cannot be registered: the run has started"):
        run_manager.register(BaseOptimizer(), "late")


def plugins():
    return [
        SGD(lr=0.05, momentum=0.9), Linear(warmup=0.25), Clip(norm=0.5), BF16(), Accumulate(2), Loader(batch_size=4),
        Evaluate(every="2 steps"), Accuracy(), JsonlLog(), Checkpoint(every="3 steps"),
    ]  # fmt: skip


def test_a_whole_run_agrees(tmp_path):
    """A run of ten plugins fires the same hooks at the same steps and ends bit-identical, frozen and not."""
    ended = []
    for frozen in (True, False):
        recorder = Recorder()
        trainer = Trainer(tiny_module(), [*plugins(), recorder], output=tmp_path / str(frozen), steps=8, device="cpu")
        trainer.frozen = frozen
        trainer.fit(tensor_rows(40), tensor_rows(12, start=1000))
        ended.append((digest(trainer.run), recorder.events, trainer.run.metrics))
    assert ended[0] == ended[1]
    assert ended[0][1].count(("forward", 3)) == 2


def test_hooks_of_plugins_are_frozen_too():
    """A hook that a plugin brings is checked, called by position, and frozen where it is hot."""
    heard = []

    class Specs:
        @operation(hot=True)
        def squeeze(self, step):
            """Return a number."""

        @event()
        def squeezed(self, run, amount):
            """Hear of it."""

    class Brings:
        @hookimpl
        def add_hooks(self, manager):
            manager.add_hookspecs(Specs)

        @hookimpl
        def squeeze(self, step):
            return step * 2

    class Hears:
        @hookimpl
        def squeezed(self, amount):
            heard.append(amount)

        @hookimpl(wrapper=True)
        def squeeze(self):
            return (yield) + 1

    run = make_run(Hears(), Brings())
    assert run.hooks.squeeze(4) == 9
    run.hooks.squeezed(run, 5)
    assert heard == [5]
    assert run.plan.hooks["squeeze"].owner == "brings"
    assert run.plan.hooks["squeeze"].wrappers == ["hears"]


def test_the_catalogue_of_the_kit_refuses_discovery(empty_catalogue):
    """With `empty_catalogue` a test cannot depend on what happens to be installed."""
    assert empty_catalogue.names == []
    with pytest.raises(pytest.fail.Exception, match="looked for installed plugins"):
        Catalogue()


def test_example_settings_name_the_kit(kit_dir):
    """The example of a plugin becomes an instance whose files exist."""
    assert kit_dir.joinpath("text-train.jsonl").is_file()
    assert example("jsonl", kit_dir).train == str(kit_dir / "text-train.jsonl")


def test_two_plugins_may_bring_the_same_hooks():
    """Who fires a hook and who hears it bring one class; another class with a hook of that name is refused."""

    class Specs:
        @event()
        def squeezed(self, run, amount):
            """Hear of it."""

    class Others:
        @event()
        def squeezed(self, run, amount):
            """Hear of something else."""

    heard = []

    class Brings:
        def __init__(self, specs=Specs):
            self.specs = specs

        @hookimpl
        def add_hooks(self, manager):
            manager.add_hookspecs(self.specs)

        @hookimpl
        def squeezed(self, amount):
            heard.append(amount)

    run = make_run(("brings:a", Brings()), ("brings:b", Brings()))
    run.hooks.squeezed(run, 5)
    assert heard == [5, 5]
    with pytest.raises(ValueError, match="squeezed"):
        make_run(("brings:a", Brings()), ("brings:b", Brings(Others)))
