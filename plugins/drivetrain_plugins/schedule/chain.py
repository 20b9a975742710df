"""Schedules one after the other."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import ConfigError, Problem, Trigger, hookimpl, option, plugin
from drivetrain_plugins.schedule._parts import built, made, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run

UNITS = ("share", "steps", "epochs", "tokens")
PROBES = (10**6, 2 * 10**6)  # lengths with which a part shows whether its shape depends on one
LOOKS = (0, 1, 2, 5, 10, 100, 1000, 10**4, 10**5, 10**6 - 1)


def _end(where: str, value: Any) -> tuple[float, str]:
    """Read where a part ends: a share below 1, updates, or a text."""
    if isinstance(value, float) and 0 < value < 1:
        return value, "share"
    try:
        moment = Trigger.parse(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}, or a share of the run below 1. Received: until={value!r}") from error
    if moment.unit not in UNITS:
        raise ConfigError(f"{where}: until is measured in steps, epochs, tokens or a share. Received: {value!r}")
    return moment.count, moment.unit


@plugin(
    role="schedule",
    example={"parts": [{"plugin": "linear", "until": 3, "warmup": 1}, {"plugin": "constant"}]},
)
class Chain:
    """Follow one schedule after the other: each sees its part as a run of that length, and begins anew.

    A part ends at a number of updates, epochs, tokens or a share of the run, counted from the run's beginning; the last
    goes on to the end. Where parts end in tokens nobody knows their length in steps: there, a schedule whose shape
    depends on its length is refused, and so is a warm-up given as a share.
    """

    parts: list[dict[str, Any]] = option(
        help='[{plugin = "linear", until = "9k steps"}, {plugin = "constant"}]; until: steps, epochs, tokens, share'
    )
    _parts: list[Any] = option(factory=list, init=False)
    _ends: list[tuple[float, str]] = option(factory=list, init=False)
    _starts: list[int] = option(
        factory=list, init=False
    )  # updates at which each part began; in tokens found on the way

    def __attrs_post_init__(self) -> None:
        """Make the parts, so that what is wrong with one is told before a run.

        Raises:
            ConfigError: a part or an end is wrong.
        """
        if not self.parts:
            raise ConfigError("chain: there are no parts to follow. Received: []")
        self._parts, self._ends = [], []
        for number, given in enumerate(self.parts, 1):
            where, is_last = f"chain: part {number}", number == len(self.parts)
            self._parts.append(made(where, given, ("until",)))
            if is_last == ("until" in given):
                what = "is the last and must have no `until`" if is_last else "needs `until`, as it is not the last"
                raise ConfigError(f"{where} {what}. Received: {given}")
            if not is_last:
                self._ends.append(_end(where, given["until"]))
            if number > 1 and getattr(getattr(self._parts[-1], "warmup", None), "unit", "") == "tokens":
                raise ConfigError(
                    f"{where}: tokens are counted from the run's beginning. Received: {given['warmup']!r}"
                )
        units = {unit for _, unit in self._ends}
        if "tokens" in units and len(units) > 1:
            raise ConfigError(f"chain: parts end in tokens, or none does. Received: {sorted(units)}")

    @hookimpl
    def build_schedule(self, run: Run) -> list[Callable[[int], float]]:
        """Return the factor of each group as a function of the applied steps.

        Raises:
            ConfigError: a part has no steps in this run, or needs a length that nobody knows.
        """
        if self._ends and self._ends[0][1] == "tokens":
            return self._by_tokens(run)
        ends = [self._steps(run, count, unit) for count, unit in self._ends]
        for number, (begin, end) in enumerate(zip([0, *ends], [*ends, run.total_steps], strict=True), 1):
            if end <= begin:
                received = f"from update {begin} to {end}, of {run.total_steps} steps"
                raise ConfigError(
                    [Problem(f"chain: part {number} has no steps in this run", received, "move its ends")]
                )
        self._starts = [0, *ends]
        lengths = [end - begin for begin, end in zip(self._starts, [*ends, run.total_steps], strict=True)]
        return self._joined([built(part, run, steps) for part, steps in zip(self._parts, lengths, strict=True)])

    @staticmethod
    def _steps(run: Run, count: float, unit: str) -> int:
        if unit == "share":
            return math.ceil(count * run.total_steps)
        if unit == "steps":
            return int(count)
        if run.rows_per_epoch is None:
            what, do = "chain: nobody knows the length of the training data, a stream", "end parts in steps or tokens"
            raise ConfigError([Problem(what, f"{count:g} epochs", do)])
        all_of_it = whole(run)
        in_epochs = attrs.evolve(all_of_it, settings=attrs.evolve(all_of_it.settings, steps=None, epochs=count))
        return int(run.hooks.count_steps(in_epochs))  # as whoever makes the steps counts them

    def _joined(self, parts: list[list[Callable[[int], float]]]) -> list[Callable[[int], float]]:
        starts = self._starts

        def of(group: int) -> Callable[[int], float]:
            functions = [part[group] for part in parts]

            def factor(step: int) -> float:
                part = bisect.bisect_right(starts, step) - 1
                return functions[part](step - starts[part])

            return factor

        return [of(group) for group in range(len(parts[0]))]

    def _by_tokens(self, run: Run) -> list[Callable[[int], float]]:
        ends = [count for count, _ in self._ends]
        if ends != sorted(set(ends)):
            raise ConfigError([Problem("chain: each part must end after the one before it", f"{ends} tokens")])
        parts = []
        for number, part in enumerate(self._parts, 1):
            short, long = (built(part, run, length) for length in PROBES)
            if any(a(step) != b(step) for a, b in zip(short, long, strict=True) for step in LOOKS):
                received = f"{type(part).__name__} in a part that ends in tokens"
                do = "end the parts in steps, epochs or shares, or give its warm-up in steps"
                raise ConfigError([Problem(f"chain: part {number} needs to know how many steps it has", received, do)])
            parts.append(short)
        self._starts = [0]
        starts = self._starts

        def of(group: int) -> Callable[[int], float]:
            functions = [part[group] for part in parts]

            def factor(step: int) -> float:
                while len(starts) <= len(ends) and run.progress.items >= ends[len(starts) - 1]:
                    starts.append(step)
                return functions[len(starts) - 1](step - starts[-1])

            return factor

        return [of(group) for group in range(len(parts[0]))]

    def state_dict(self) -> dict[str, Any]:
        """Return where parts began."""
        return {"starts": self._starts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the same part, where parts are found on the way."""
        if self._ends and self._ends[0][1] == "tokens":
            self._starts[:] = state["starts"]
