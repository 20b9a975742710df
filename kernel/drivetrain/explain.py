"""A plan drawn as text, an error traced to its plugin or its row: what is loaded when somebody reads."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from drivetrain.errors import DataError
from drivetrain.hooks import DEFAULT_CALLS
from drivetrain.streams import BadRow

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from drivetrain.data import Fetch
    from drivetrain.plan import Acting, Plan
    from drivetrain.state import Run

# Ours, and those of releases of pluggy: the files that make a wrapper's inner call.
CALLERS = ("dispatch.py", "_callers.py", "_execution.py")


def draw(plan: Plan) -> str:
    """Return the plugins, who acts in assembly and in the loop, and the problems, a line each."""
    lines = ["plugins, in order (the first is called first and wraps outermost):"]
    for name, about in plan.plugins.items():
        changed = ", ".join(f"{k}={v!r}" for k, v in about["changed"].items())
        lines.append(f"  {name:<18} {about['role']:<10} {about['summary']}".rstrip())
        lines += [f"{'':32}{changed}"] if changed else []
    lines.append("run: " + ", ".join(f"{k}={v}" for k, v in plan.settings.items() if v is not None))
    inside = {name for names in DEFAULT_CALLS.values() for name in names}
    lines.append("assembly:")
    lines += [_line(plan, n, 1) for n, a in plan.hooks.items() if n not in inside and n != "fit" and _acts(a)]
    lines.append("the loop (a hook nobody acts on is left out; 'drivetrain' is the kernel's default):")
    lines += _tree(plan, "fit", 1)
    if plan.problems:
        lines += ["", f"{len(plan.problems)} problem(s):", *(f"- {p}" for p in plan.problems)]
    return "\n".join(lines)


def _tree(plan: Plan, name: str, depth: int) -> list[str]:
    acting = plan.hooks[name]
    calls = DEFAULT_CALLS.get(name, ()) if acting.owner == "drivetrain" else ()
    if acting.kind == "operation" or _acts(acting):
        return [_line(plan, name, depth), *(line for call in calls for line in _tree(plan, call, depth + 1))]
    return []


def _line(plan: Plan, name: str, depth: int) -> str:
    acting = plan.hooks[name]
    who = acting.owner or ", ".join(acting.listeners) or "nobody"
    wraps = f"   wrapped by {', '.join(acting.wrappers)}" if acting.wrappers else ""
    return f"{'  ' * depth + name:<28} {who}{wraps}"


def _acts(acting: Acting) -> bool:
    own = acting.owner not in (None, "drivetrain")
    return bool(own or acting.wrappers or acting.listeners)


MAX_CAUSES = 32


def plugin_frames(error: BaseException, run: Run) -> list[str]:
    """Say in which plugin and hook `error` was raised, from its traceback; costs nothing until something fails."""
    names = {id(plugin): name for name, plugin in run.plugins.items()}
    causes = [error]  # what a plugin raised may have been told as another error, by a plugin or by Python
    while causes[-1].__cause__ is not None and len(causes) < MAX_CAUSES:
        causes.append(causes[-1].__cause__)
    found = next((frames for cause in reversed(causes) if (frames := _frames(cause.__traceback__, names))), [])
    notes = [f"in plugin {owner!r}, hook {hook!r}, step {run.progress.step}" for owner, hook in found]
    return notes[-1:] or [f"in step {run.progress.step}"]


def _frames(traceback: TracebackType | None, names: dict[int, str]) -> list[tuple[str, str]]:
    """Return plugins and their hooks along a traceback, the outermost first."""
    found: list[tuple[str, str]] = []
    while traceback is not None:
        frame, function = traceback.tb_frame, traceback.tb_frame.f_code.co_name
        owner = names.get(id(frame.f_locals.get("self")))
        inside = bool(found) and found[-1][0] == owner and function.startswith(("_", "<"))  # called by its hook
        if owner is not None and not inside and not _passed_through(traceback):
            found.append((owner, function))
        traceback = traceback.tb_next
    return found


def _passed_through(traceback: TracebackType) -> bool:
    """Tell whether the error came to this frame, a wrapper's, from the hook inside."""
    inner = traceback.tb_next
    generator = traceback.tb_frame.f_code.co_flags & inspect.CO_GENERATOR
    return bool(generator) and inner is not None and inner.tb_frame.f_code.co_filename.endswith(CALLERS)


def sift(fetch: Fetch, rows: Sequence[Any], numbers: Sequence[int], error: Exception | None) -> tuple[Any, list[str]]:
    """Find the rows that make no batch even alone; return the others and what is wrong with these.

    Raises:
        DataError: a row is bad and `fetch` does not tolerate it, or each is sound but together they make no batch.
    """
    whole = hasattr(rows, "take_rows")
    sound: list[int] = []
    bad: list[str] = []
    for place, (row, number) in enumerate(zip(rows, numbers, strict=True)):
        try:
            if isinstance(row, BadRow):
                raise DataError(row.reason)  # noqa: TRY301 - a row that was found bad before is one like others
            fetch.batch(rows[place : place + 1] if whole else [row], 0, 0)
        except MemoryError:  # no fault of the row
            raise
        except Exception as alone:
            told = str(alone) if isinstance(alone, DataError) else f"{type(alone).__name__}: {alone}"
            bad.append(told if isinstance(row, BadRow) else f"{fetch.split} row {number}: {told}")
            if not fetch.tolerant:
                raise DataError(bad[0]) from alone
        else:
            sound.append(place)
    kept: Any = rows
    if bad:
        kept = rows.take_rows(sound) if whole else [rows[place] for place in sound]  # type: ignore[attr-defined]
        error = _together(fetch, kept)
    if error is not None:
        told = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{fetch.split} rows {[numbers[p] for p in sound[:16]]} make no batch: {told}") from error
    return kept, bad


def _together(fetch: Fetch, rows: Sequence[Any]) -> Exception | None:
    """Return what keeps rows from making a batch that each make one alone."""
    try:
        if len(rows):
            fetch.batch(rows, 0, 0)
    except Exception as error:  # noqa: BLE001 - whatever a collator raises for them
        return error
    return None
