"""What `drivetrain plugins` shows: the catalogue, read from sources without importing them, and one plugin in full."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from drivetrain.catalogue import Catalogue, Entry


@functools.cache  # for its role and for its summary
def _source(entry: Entry) -> ast.ClassDef | None:
    """Return the plugin's class as its source says it."""
    module, _, name = entry.value.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin:
        return None
    nodes = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    return next((node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name), None)


def summary_of(entry: Entry) -> str:
    """Return the first line of a plugin's docstring."""
    node = _source(entry)
    return "" if node is None else (ast.get_docstring(node) or "").partition("\n")[0]


def role_of(entry: Entry) -> str:
    """Return the role that `@plugin(role=...)` gives the class."""
    node = _source(entry)
    found = [
        keyword.value.value
        for call in ([] if node is None else node.decorator_list)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "role" and isinstance(keyword.value, ast.Constant)
    ]
    return str(found[0]) if found else ""


def catalogue_rows(catalogue: Catalogue) -> Iterable[dict[str, str]]:
    """Yield what a table of the catalogue shows; what cannot be read is told in its row."""
    for name in catalogue.names:
        try:
            entry = catalogue.entry(name)
            role, summary = role_of(entry), summary_of(entry)
            origin, value = f"{entry.distribution} {entry.version}", entry.value
        except ConfigError as error:  # two distributions offer it
            role, origin, summary, value = "", "", str(error), ""
        except (ImportError, OSError, SyntaxError, UnicodeDecodeError) as error:
            role, origin, summary, value = "", entry.distribution, f"cannot be read: {error}", entry.value
        yield {"name": name, "role": role, "distribution": origin, "summary": summary, "class": value}


def describe(entry: Entry) -> dict[str, Any]:
    """Import a plugin's class and return what a user can know of it, as JSON values."""
    from drivetrain.options import option_fields  # noqa: PLC0415

    cls = entry.load()
    hooks = []
    for attribute in dir(cls):
        opts = getattr(inspect.getattr_static(cls, attribute), "drivetrain_impl", None)
        if opts is not None:
            hooks.append((opts["specname"] or attribute) + (" (wrapper)" if opts["wrapper"] else ""))
    words = {word: list(getattr(cls, word, ())) for word in ("provides", "requires", "conflicts")}
    return {
        "name": entry.name,
        "role": getattr(cls, "role", ""),
        "effect": getattr(cls, "effect", ""),
        "about": inspect.getdoc(cls) or "",
        "options": {name: _option(field) for name, field in option_fields(cls).items()},
        "hooks": hooks,
        **{word: value for word, value in words.items() if value},
        "distribution": f"{entry.distribution} {entry.version}",
        "class": entry.value,
        "file": inspect.getsourcefile(cls) or "",
    }


def _option(field: Any) -> dict[str, str]:
    import attrs  # noqa: PLC0415

    default, about, choices = field.default, field.metadata, field.metadata.get("choices")
    factory = getattr(default, "factory", None)
    return {
        "type": field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type)),
        "default": "required" if default is attrs.NOTHING else repr(factory() if factory else default),
        "allowed": "one of " + ", ".join(map(repr, choices)) if choices else about.get("limits", ""),
        "help": about.get("help", "") + (' ("env:NAME" or "file:PATH")' if about.get("secret") else ""),
    }
