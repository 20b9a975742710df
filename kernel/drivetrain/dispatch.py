"""pluggy for registration, order and cold hooks; plain bound functions for the hot path.

A pluggy call costs 2 to 3 us and up to four times that between torch operations. So when a run starts, each hot hook
is frozen into a function of its carrier: the owner's own bound method where nobody wraps it. Frozen and unfrozen
dispatch agree in order, results and exceptions (`tests/kernel/test_dispatch.py` runs both).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pluggy

from drivetrain.hooks import Hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Call = Callable[[Any], Any]


class Manager(pluggy.PluginManager):
    """A plugin manager that closes once the hot hooks are frozen, and withholds defaults that have an owner."""

    def __init__(self) -> None:
        """Know the kernel's hooks."""
        super().__init__("drivetrain")
        self.closed = False
        self.withheld: set[str] = set()  # operations that a plugin owns
        self.add_hookspecs(Hooks)

    def register(self, plugin: object, name: str | None = None) -> str | None:
        """Register as pluggy does, or refuse once the run has started."""
        if self.closed:
            raise RuntimeError(f"plugin {name!r} cannot be registered: the run has started and its hooks are frozen")
        return super().register(plugin, name)

    def add_hookspecs(self, module_or_class: Any) -> None:
        """Declare hooks as pluggy does; a class that another plugin of the run has brought is passed over."""
        if not any(self.spec_of(name) in vars(module_or_class).values() for name in self.names):
            super().add_hookspecs(module_or_class)

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        """Leave out the kernel's default where the operation has an owner.

        An owner that returns None (as `Tensor.backward` does) would otherwise fall through to the default.
        """
        if getattr(plugin, "is_drivetrain_default", False) and name in self.withheld:
            return None
        return super().parse_hookimpl_opts(plugin, name)

    def spec_of(self, name: str) -> Any:
        """Return the function that declares hook `name`."""
        spec = getattr(self.hook, name).spec
        return spec.function

    @property
    def names(self) -> list[str]:
        """Return the names of all declared hooks."""
        return [n for n, caller in vars(self.hook).items() if not n.startswith("_") and caller.spec is not None]


def _adapt(impl: pluggy.HookImpl) -> Call:
    """Return the implementation as a function of one carrier; it may take none."""
    if impl.argnames:
        return impl.function
    function = impl.function
    return lambda _carrier: function()


def _wrap(wrapper: Call, inner: Call) -> Call:
    """Nest `inner` in a new-style hook wrapper, as pluggy's teardown does it."""

    def call(carrier: Any) -> Any:
        generator = wrapper(carrier)
        try:
            next(generator)
        except StopIteration:
            raise RuntimeError(f"wrapper {wrapper} did not yield") from None
        try:
            result = inner(carrier)
        except BaseException as error:  # noqa: BLE001 - a wrapper sees everything, as in pluggy
            try:
                generator.throw(error)
            except StopIteration as stop:
                return stop.value
            except RuntimeError as raised:
                # A StopIteration thrown into a generator comes out as a RuntimeError; hand on the original.
                if isinstance(error, StopIteration) and raised.__cause__ is error:
                    raise error from None
                raise
        else:
            try:
                generator.send(result)
            except StopIteration as stop:
                return stop.value
        generator.close()
        raise RuntimeError(f"wrapper {wrapper} has a second yield")

    return call


def _nothing(_carrier: Any) -> None:
    return None


def _each(listeners: tuple[Call, ...]) -> Call:
    def call(carrier: Any) -> None:
        for listener in listeners:
            listener(carrier)

    return call


def freeze(caller: pluggy.HookCaller, kind: str) -> Call:
    """Return a function of the carrier that does what `caller(carrier=carrier)` would."""
    impls = caller.get_hookimpls()
    plain = [_adapt(i) for i in reversed(impls) if not i.wrapper]
    if kind == "event":
        return _each(tuple(plain)) if len(plain) > 1 else plain[0] if plain else _nothing
    call = plain[0] if plain else _nothing
    for impl in (i for i in impls if i.wrapper):  # innermost first
        call = _wrap(_adapt(impl), call)
    return call


def _by_name(caller: pluggy.HookCaller, argnames: Iterable[str]) -> Callable[..., Any]:
    names = tuple(argnames)

    def call(*arguments: Any) -> Any:
        return caller(**dict(zip(names, arguments, strict=True)))

    return call


def callables(manager: Manager, *, frozen: bool = True) -> Hooks:
    """Close the manager and return every hook as a positional function, hot ones frozen.

    `frozen=False` leaves all of them to pluggy: slower, and the reference for the parity test.
    """
    manager.closed = True
    made = SimpleNamespace()
    for name in manager.names:
        caller, spec = getattr(manager.hook, name), manager.spec_of(name)
        if frozen and spec.drivetrain_hot:
            setattr(made, name, freeze(caller, spec.drivetrain_kind))
        else:
            setattr(made, name, _by_name(caller, caller.spec.argnames))
    return cast("Hooks", made)
