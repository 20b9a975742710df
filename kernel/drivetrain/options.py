"""Declaring a plugin and its options: a plugin is an attrs class with hook implementations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

import attrs

from drivetrain.errors import ConfigError, MissingDependency, Problem, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType

T = TypeVar("T")
ROLES = (
    "data", "order", "collate", "loss", "optim", "schedule", "precision", "memory", "parallel",
    "checkpoint", "evaluate", "report", "export", "model", "control",
)  # fmt: skip


def option(
    default: Any = attrs.NOTHING,
    *,
    help: str = "",  # noqa: A002 - the word users of click and argparse know
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[object] | None = None,
    converter: Callable[[Any], Any] | None = None,
    secret: bool = False,
    factory: Callable[[], Any] | None = None,
    init: bool = True,
) -> Any:
    """Declare one option of a plugin with its bounds; a bad value is refused with the bound and the value.

    `init=False` makes it a plain attribute that a run sets and nobody can pass.
    """
    bounds = [(">=", ge), (">", gt), ("<=", le), ("<", lt)]
    limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
    shown: Callable[[Any], str] = (lambda _: "***") if secret else repr

    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if limits and part is not None:
                number = isinstance(part, (int, float)) and not isinstance(part, bool)
                tests = {
                    ">=": lambda v, b: v >= b,
                    ">": lambda v, b: v > b,
                    "<=": lambda v, b: v <= b,
                    "<": lambda v, b: v < b,
                }
                if not number or not all(bound is None or tests[sign](part, bound) for sign, bound in bounds):
                    raise ValueError(f"{attribute.name} must be a number {limits}. Received: {shown(value)}")
        if choices is not None and value not in choices:
            hint = nearest(value, map(str, choices)) if isinstance(value, str) else ""
            raise ValueError(
                f"{attribute.name} must be one of {list(choices)}. Received: {shown(value)} {hint}".rstrip()
            )

    start: dict[str, Any] = {"default": default} if factory is None else {"factory": factory}
    return attrs.field(
        **start,
        validator=check,
        converter=converter,
        metadata={"help": help, "limits": limits, "choices": choices, "secret": secret},
        init=init,
        repr=not secret,
    )


@dataclass_transform(eq_default=False, field_specifiers=(attrs.field, option))
def plugin(
    *,
    role: str,
    effect: str = "changes",
    provides: Sequence[str] = (),
    requires: Sequence[str] = (),
    conflicts: Sequence[str] = (),
    example: Mapping[str, object] | None = None,
    companions: Mapping[str, Mapping[str, object]] | None = None,
    rows: str | None = None,
) -> Callable[[type[T]], type[T]]:
    """Make a class a plugin: attrs fields are its options, equality is identity (pluggy needs it hashable).

    Args:
        role: where it stands in the catalogue, one of `ROLES`.
        effect: "observes" promises bit-identical weights with and without it (the kit proves it); "changes" means
            that the composition tests compare it with a reference.
        provides: words other plugins may require or conflict with.
        requires: words some plugin of the run must provide.
        conflicts: words (or plugin names) that must not be in the same run.
        example: small settings with which the kit can run it; "{kit}" stands for the kit's folder of fixtures.
        companions: first-party plugins that the kit's runs of it need, by name, with their settings, for instance
            `{"hf-model": {"path": "{kit}/model", "task": "masked-lm"}}`; "NAME?" are settings of one that it does not
            need, added to that plugin's example where it is there.
        rows: the kind of the kit's rows that it takes (see `drivetrain.testing.files.KINDS`); whatever fits if None.
    """
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}: {nearest(role, ROLES)}")

    def decorate(cls: type[T]) -> type[T]:
        made: Any = attrs.define(cls, eq=False, slots=False)
        made.role, made.effect, made.example = role, effect, dict(example or {})
        made.companions, made.rows = dict(companions or {}), rows
        for word, value in (("provides", provides), ("requires", requires), ("conflicts", conflicts)):
            if not isinstance(getattr(made, word, None), property):
                setattr(made, word, tuple(value))
        return made  # type: ignore[no-any-return]

    return decorate


def option_fields(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """Return the options of a plugin class by name (its public attrs fields)."""
    fields = attrs.fields(cls) if attrs.has(cls) else ()
    return {field.alias: field for field in fields if field.init}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    own = type(value).__module__.startswith("drivetrain") and "__str__" in vars(type(value))
    return str(value) if own else f"<{type(value).__module__}.{type(value).__qualname__}>"


def option_values(plugin: object, *, changed: bool = False) -> dict[str, Any]:
    """Return a plugin's options as JSON can hold them; secrets become "***", objects their type's name.

    `changed=True` leaves out those that have their default.
    """
    values = {}
    for name, field in option_fields(type(plugin)).items():
        default: Any = field.default
        default = default.factory() if hasattr(default, "factory") else default
        value = _plain(getattr(plugin, field.name))
        if not (changed and value == _plain(default)):
            values[name] = "***" if field.metadata.get("secret") else value
    return values


def import_object(target: str, *, plugin: str) -> Any:
    """Return the object that "package.module:name" names, or say what is wrong with the name."""
    module, _, name = target.partition(":")
    where = f"plugin {plugin!r}"
    if not module or not name:
        raise ConfigError([Problem('an importable object is written "package.module:name"', repr(target), where=where)])
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        do = f"install {error.name!r}, or put its folder on the path (a recipe's own folder is on it)"
        raise ConfigError([Problem(f"{target!r} cannot be imported", str(error), do, where)]) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError([Problem(f"{module!r} has no {name!r}", do=nearest(part, dir(found)), where=where)])
        found = getattr(found, part)
    return found


def require(module: str, *, plugin: str, extra: str | None = None) -> ModuleType:
    """Import a heavy library for `plugin`, or say how to install it: with an extra, or with drivetrain itself."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"plugin {plugin!r} needs the package {error.name or module!r}"
        do = f"pip install 'drivetrain[{extra}]'" if extra else "pip install drivetrain"
        raise MissingDependency([Problem(what, str(error), do)]) from error
