"""Recipes: a run as a TOML file, in which a table is a plugin and its keys are that plugin's options.

    [run]
    epochs = 3
    [plugins.adamw]
    lr = 5e-5

The order of the tables is the order of the plugins; a second of a kind takes a label: `[plugins."checkpoint:best"]`.
Values are taken strictly ("1e-4" is no number, true is no 1), and everything that is wrong is reported at once.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, TypeAlias, Union, get_args, get_origin, get_type_hints

import attrs
import cattrs

from drivetrain.catalogue import Catalogue
from drivetrain.errors import ConfigError, Problem, RecipeError, nearest
from drivetrain.options import option_fields
from drivetrain.state import Settings
from drivetrain.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain.plan import Plan

    Option: TypeAlias = attrs.Attribute[Any]
    At: TypeAlias = tuple[str, ...]

MAX_BYTES = 1_000_000
_UNIONS: tuple[Any, ...] = (Union, UnionType)


@attrs.define
class Recipe:
    """A run as data; `problems` are those known before any plugin is imported, raised together with the others."""

    tables: dict[str, Any]
    places: dict[At, str] = attrs.field(factory=lambda: {(): "recipe"}, repr=False)  # table and key -> "FILE:LINE"
    problems: list[Problem] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        """Check that tables are tables."""
        for name in [n for n in self.tables if n not in ("run", "plugins", "folder")]:
            do = f"{nearest(name, ['run', 'plugins'])}; a plugin is [plugins.{name}]"
            self._blame(f"unknown table {name!r}", self.tables[name], do, (name,), "unknown")
        named = self._table(self.tables, "plugins")
        self.tables = {
            "folder": str(self.tables.get("folder", Path.cwd())),
            "run": self._table(self.tables, "run"),
            "plugins": {name: self._table(named, "plugins", name) for name in named},
        }

    @classmethod
    def load(
        cls, path: str | Path, set: Sequence[str] = (), with_: Sequence[str] = (), without: Sequence[str] = ()  # noqa: A002
    ) -> Recipe:  # fmt: skip
        """Read a recipe and change it.

        Args:
            path: a TOML file, or the `recipe.json` of a run's folder.
            set: "adamw.lr=1e-4" or "run.seed=3"; the value is read as TOML, and is a plain string where it is none.
            with_: plugins to add after the others.
            without: plugins to leave out.

        Raises:
            RecipeError: the file cannot be read. What it says is checked by `plan` and `trainer`.
        """
        path = Path(path)
        is_json = path.suffix == ".json"
        try:
            text = _text(path)
            data = {"folder": str(path.absolute().parent), **(json if is_json else tomllib).loads(text)}
            if not is_json and data["folder"] != str(path.absolute().parent):
                raise ValueError("unknown table 'folder'")  # noqa: TRY301
        except (OSError, ValueError, TypeError, RecursionError) as error:
            line = re.search(r"line (\d+)", str(error))
            do = "a recipe is TOML (https://toml.io) in UTF-8, without a byte order mark"
            where = f"{path}:{line[1]}" if line else str(path)
            raise RecipeError([Problem(f"the recipe cannot be read: {error}", do=do, where=where)]) from None
        recipe = cls(data, {(): str(path)} if is_json else _places(text, str(path)))
        recipe.change(set, with_, without)
        return recipe

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Take what `as_dict` returned."""
        return cls(dict(data))

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, changes included, and its folder; a secret stays "env:NAME"."""
        return self.tables

    def change(self, set: Sequence[str] = (), with_: Sequence[str] = (), without: Sequence[str] = ()) -> None:  # noqa: A002
        """Add plugins, leave plugins out, and set options, in this order (see `load`)."""
        plugins = self.tables["plugins"]
        for name in with_:
            plugins.setdefault(name, {})
            self.places.setdefault(("plugins", name), f"--with {name}")
        for name in without:
            flag = (f"--without {name}",)
            self.places[flag] = flag[0]
            if plugins.pop(name, None) is None:
                self._blame(f"the recipe has no plugin {name!r}", do=nearest(name, plugins), at=flag, kind="unknown")
        for key, equals, text in (item.partition("=") for item in set):
            *above, last = at = (*(() if key.startswith("run.") else ("plugins",)), *key.split("."))
            table: Any = self.tables
            flag = (f"--set {key}",)
            self.places[flag] = flag[0]
            for part in above:
                table = table.get(part) if isinstance(table, dict) else None
            if not equals or not all(at) or len(at) < 2 + (at[0] == "plugins"):
                do = "write for example --set adamw.lr=1e-4"
                self._blame("not PLUGIN.OPTION=VALUE", key + equals + text, do, flag)
            elif not isinstance(table, dict):
                owner, _, _ = key.partition(".")
                do = f"{nearest(owner, ['run', *plugins])}; --with adds a plugin; a list is set as a whole"
                self._blame(f"the recipe has no table {key.rpartition('.')[0]!r}", text, do, flag, "unknown")
            else:
                table[last], self.places[at] = _parse(text), flag[0]

    def trainer(self, catalogue: Catalogue | None = None) -> Trainer:
        """Import the plugins named, and only them, and return a trainer with them.

        Raises:
            RecipeError: something is wrong; all of it is listed, with file and line.
        """
        trainer, problems = self._resolve(catalogue or Catalogue())
        if problems:
            raise RecipeError(problems)
        return trainer

    def plan(self, catalogue: Catalogue | None = None) -> Plan:
        """Return the plan of the plugins that are fine, with every problem of the recipe, or else of the plan."""
        trainer, problems = self._resolve(catalogue or Catalogue())
        plan = trainer.plan()
        plan.problems = problems or [self._placed(problem) for problem in plan.problems]
        return plan

    def _resolve(self, catalogue: Catalogue) -> tuple[Trainer, list[Problem]]:
        if self.tables["folder"] not in sys.path:
            sys.path.insert(0, self.tables["folder"])  # like a script's; it stays, since the run imports from it too
        known, self.problems = self.problems, [*self.problems]
        settings = self._make(Settings, self.tables["run"], ("run",)) or Settings()
        plugins = {}
        for name, given in self.tables["plugins"].items():
            at = ("plugins", name)
            try:
                plugins[name] = self._make(catalogue.entry(name).load(), given, at)
            except ConfigError as error:
                self.problems += [attrs.evolve(p, where=self._at(at)) for p in error.problems]
        sound = [(name, made) for name, made in plugins.items() if made is not None]
        trainer = Trainer(plugins=sound, catalogue=catalogue, **attrs.asdict(settings, recurse=False))
        if self.problems:  # what is missing can only be told once these are mended; conflicts can be told now
            self.problems += [self._placed(p) for p in trainer.plan().problems if p.kind == "conflict"]
        self.problems, found = known, self.problems
        return trainer, found

    def _placed(self, problem: Problem) -> Problem:
        """Say where the last of the plugins that a problem of the plan names stands."""
        text = f"{problem.where} {problem.what} {problem.received}"
        named = [name for name in self.tables["plugins"] if re.search(rf"\b{re.escape(name)}\b", text)]
        place = self._at(("plugins", named[-1]) if named else ())
        return attrs.evolve(problem, where=f"{place}: {problem.where}" if problem.where else place)

    def _at(self, at: At) -> str:
        return self.places[at] if at in self.places else self._at(at[:-1])

    def _blame(self, what: str, value: Any = None, do: str = "", at: At = (), kind: str = "invalid") -> None:
        shown = "" if value is None else repr(value)
        shown = shown if len(shown) < 200 else f"{shown[:200]}... ({len(shown)} characters)"  # noqa: PLR2004
        self.problems.append(Problem(what, shown, do, self._at(at), kind))

    def _table(self, parent: Mapping[str, Any], *at: str) -> dict[str, Any]:
        value = parent.get(at[-1], {})
        if isinstance(value, dict):
            return dict(value)
        do = f'write [{".".join(at)}]; a second plugin of a kind takes a label: [plugins."checkpoint:best"]'
        self._blame(f"{'.'.join(at)} must be a table", value, do, at)
        return {}

    def _make(self, cls: type, given: dict[str, Any], at: At) -> Any:
        """Return an instance with the options `given`, or blame every one that is not fine and return None."""
        who, fields, before = f"plugin {at[-1]!r}" if at[1:] else "[run]", option_fields(cls), len(self.problems)
        hidden = any(field.metadata.get("secret") for field in fields.values())  # a misspelt one may hold the secret
        for key in [k for k in given if k not in fields]:
            shown = "(not shown: it may be a secret)" if hidden else given[key]
            self._blame(f"{who} has no option {key!r}", shown, nearest(key, fields), (*at, key), "unknown")
        unknown = len(self.problems)
        for key in [k for k, f in fields.items() if f.default is attrs.NOTHING and k not in given]:
            self._blame(f"{who} needs option {key!r}", None, _allowed(cls, fields[key]), at, "missing")
        values = self._values(cls, {key: given[key] for key in given if key in fields}, who, at)
        if len(self.problems) > unknown:
            return None
        try:
            made = cls(**values)
        except (ValueError, TypeError) as error:
            why = str(error)
            for secret in [values[key] for key in values if fields[key].metadata.get("secret") and values[key]]:
                why = why.replace(str(secret), "***")
            return self._blame(f"{who} refuses its options: {why}", given, at=at)
        return made if len(self.problems) == before else None

    def _values(self, cls: type, given: dict[str, Any], who: str, at: At) -> dict[str, Any]:
        fields = option_fields(cls)
        values: dict[str, Any] = {}

        def attempt(key: str, read: Callable[[Option, Any], Any], value: Any) -> None:
            try:
                values[key] = read(fields[key], value)
            except Exception as error:  # noqa: BLE001 - converters and validators are plugins' code
                values.pop(key, None)
                raw, why, do = given[key], str(error), _allowed(cls, fields[key])
                if fields[key].metadata.get("secret"):
                    raw, why = "(a secret, not shown)", why.replace(str(value), "***")
                elif isinstance(raw, str) and _parse(raw) != raw:
                    do += f"; without quotes: {key} = {raw}"
                self._blame(f"{who}, option {key!r}: {why}", raw, do, (*at, key))

        for key, value in given.items():
            attempt(key, partial(_read, cls, Path(self.tables["folder"])), value)
        whole = SimpleNamespace(**{f.name: values.get(key, f.default) for key, f in fields.items()})
        for key, value in list(values.items()):
            attempt(key, partial(_checked, whole), value)
        return values


def _text(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    wrong = {
        f"it is larger than {MAX_BYTES} bytes": len(raw) > MAX_BYTES,
        "it is empty": not raw.strip(),
        "it starts with a byte order mark": raw.startswith(codecs.BOM_UTF8),
        "it holds NUL bytes, as UTF-16 does": b"\0" in raw,
    }
    if any(wrong.values()):
        raise ValueError(next(what for what, yes in wrong.items() if yes))
    return raw.decode()


def _places(text: str, file: str) -> dict[At, str]:
    """Map tables and keys to "FILE:LINE": tomllib tells no lines, so each statement is parsed by itself."""
    places: dict[At, str] = {(): file}
    table: At = ()
    statement, first = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        first, statement = (first, statement) if statement else (number, "")
        statement += f"{line}\n"
        try:
            parsed: Any = tomllib.loads(statement)
        except ValueError:  # a string or an array goes on in the next line
            if number - first > 500:  # noqa: PLR2004 - the work is quadratic in a statement's length
                break
            continue
        is_header, statement = statement.lstrip().startswith("["), ""
        at: At = () if is_header else table
        while parsed and isinstance(parsed, dict):
            (key, parsed), *_ = parsed.items()
            at = (*at, key)
            places.setdefault(at, f"{file}:{first}")
        table = at if is_header else table
    return places


def _parse(text: str) -> Any:
    """Read a TOML value, or keep the string where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _hint(cls: type, option: Option) -> Any:
    """Resolve an option's type; Any where it cannot be, as with a name imported for type checkers only."""
    holder = type("holder", (), {"__annotations__": {"it": option.type or Any}, "__module__": cls.__module__})
    try:
        return get_type_hints(holder)["it"]
    except (NameError, AttributeError, TypeError):
        return Any


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _allowed(cls: type, option: Option) -> str:
    about = option.metadata
    kind = "a value as described" if option.converter is not None else _name(_hint(cls, option))
    kind = f"one of {', '.join(map(repr, about['choices']))}" if about.get("choices") else kind
    return f"allowed: {kind} {about.get('limits', '')}".rstrip() + (f" ({about['help']})" if about.get("help") else "")


def _read(cls: type, folder: Path, option: Option, value: Any) -> Any:
    """Return `value` as the option's converter or type has it."""
    if option.metadata.get("secret"):
        kind, _, name = value.partition(":") if isinstance(value, str) else ("", "", "")
        if kind not in ("env", "file"):
            raise ValueError('a secret must not stand in a recipe: write "env:NAME" or "file:PATH"')
        if kind == "env" and name not in os.environ:
            raise ValueError(f"the environment has no variable {name!r}")
        value = os.environ[name] if kind == "env" else (folder / Path(name).expanduser()).read_text("utf-8").strip()
    convert: Any = option.converter
    if convert is not None:
        return convert(value)
    hint = _hint(cls, option)
    try:
        return _strict.structure(value, hint)
    except Exception as error:
        raise TypeError(f"must be {_name(hint)}, not {type(value).__name__}") from error


def _checked(whole: SimpleNamespace, option: Option, value: Any) -> Any:
    if option.validator is not None:
        check: Any = option.validator
        check(whole, option, value)
    return value


def _scalar(value: Any, wanted: Any) -> Any:
    kinds = {float: (float, int), Path: (str,)}.get(wanted, (wanted,))
    if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
        raise TypeError(wanted)
    return value if value is None else wanted(value)


def _container(value: Any, wanted: Any) -> Any:
    kind, parts = get_origin(wanted) or wanted, (*get_args(wanted), Any, Any)
    if type(value) is not (dict if issubclass(kind, Mapping) else list):
        raise TypeError(wanted)
    if isinstance(value, dict):
        return {key: _strict.structure(inner, parts[1]) for key, inner in value.items()}
    fixed = issubclass(kind, tuple) and get_args(wanted) and parts[1] is not ...
    parts = get_args(wanted) if fixed else parts[:1] * len(value)
    inner = [_strict.structure(v, part) for v, part in zip(value, parts, strict=True)]
    return tuple(inner) if issubclass(kind, tuple) else inner


def _union(value: Any, wanted: Any) -> Any:
    for arm in get_args(wanted):
        with contextlib.suppress(Exception):
            return _strict.structure(value, arm)
    raise TypeError(wanted)


def _contains(wanted: Any) -> bool:
    kind = get_origin(wanted) or wanted
    return isinstance(kind, type) and issubclass(kind, (Mapping, Sequence)) and kind is not str


_strict = cattrs.Converter(detailed_validation=False, forbid_extra_keys=True)
for _type in (bool, int, float, str, Path, NoneType):
    _strict.register_structure_hook(_type, _scalar)
_strict.register_structure_hook_func(_contains, _container)
_strict.register_structure_hook_func(lambda wanted: get_origin(wanted) in _UNIONS, _union)
