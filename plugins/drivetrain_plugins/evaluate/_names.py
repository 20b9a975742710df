"""What metrics are called: by class where the model names its classes, and apart where a run has two of a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, Problem
from drivetrain_plugins.shared.causal import unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run

HELP = 'stands before the names, as in "NAME_f1"; None takes what stands after ":" in the plugin\'s label in the run'


def given_name(run: Run, plugin: Any) -> str:
    """Return the option `name`, or else what stands after the colon in the plugin's label ("f1:macro"), or nothing."""
    label = next((label for label, other in run.plugins.items() if other is plugin), "")
    return str(label.partition(":")[2] if plugin.name is None else plugin.name)


def prefix(run: Run, plugin: Any) -> str:
    """Return what stands before the names of this plugin's metrics."""
    name = given_name(run, plugin)
    return f"{name}_" if name else ""


def refuse_twins(run: Run, plugin: Any, name_of: Callable[[Run, Any], str] = given_name) -> None:
    """Refuse another plugin of the same kind under the same name: its numbers would overwrite these.

    Raises:
        ConfigError: there is one; both labels are named.
    """
    mine, kind = name_of(run, plugin), type(plugin)
    twins = [label for label, other in run.plugins.items() if type(other) is kind and name_of(run, other) == mine]
    if len(twins) > 1:
        what = f"{' and '.join(twins)} give their metrics the same names"
        do = f'give one of them another name, or a label: "{twins[0].partition(":")[0]}:NAME"'
        raise ConfigError([Problem(what, f"name={mine!r}", do)])


def class_names(run: Run) -> list[str]:
    """Return the names of the model's classes by id, where its configuration (of transformers) has them."""
    named = getattr(getattr(unwrapped(run.model), "config", None), "id2label", None) or {}
    by_id = {int(number): str(name) for number, name in named.items()}
    return [by_id[number] for number in sorted(by_id)] if sorted(by_id) == list(range(len(by_id))) else []


def printable(name: str) -> str:
    """Return a class's name as a part of a metric's: "/" parts the split from the metric in logs."""
    return name.replace("/", "_")
