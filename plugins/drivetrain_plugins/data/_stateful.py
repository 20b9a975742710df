"""Iterables that tell their own position, as streams."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from drivetrain import Reader


@attrs.frozen(eq=False)
class Stateful:
    """An iterable with `state_dict` and `load_state_dict` (or whose iterators have them) as a stream.

    Every reader has a copy of its own, as the position belongs to the object.
    """

    data: Any
    plugin: str

    def open(self, epoch: int, position: Any = None) -> Reader:
        """Iterate again, from `position` on."""
        try:
            data = copy.deepcopy(self.data)
        except TypeError as error:
            what = f"{self.plugin}: data with a state of its own is copied for each pass, and this cannot be: {error}"
            raise ConfigError(f"{what}. Open files and connections in __iter__") from error
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        own = hasattr(data, "state_dict")
        if own and position is not None:
            data.load_state_dict(position)
        rows = iter(data)
        if not own and position is not None:
            rows.load_state_dict(position)
        return _StatefulReader(rows, (data if own else rows).state_dict, position, self.plugin)


@attrs.define(eq=False)
class _StatefulReader:
    rows: Iterator[Any]
    state: Callable[[], Any]
    start: Any
    plugin: str
    given: bool = False
    checked: bool = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        row = next(self.rows)
        self.given = True
        return row

    def position(self) -> Any:
        if not self.given:
            return self.start
        state = copy.deepcopy(self.state())
        if not self.checked:
            self.checked = True
            try:
                json.dumps(state)
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{self.plugin}: the state_dict() of the data must hold JSON values (numbers, strings, lists, "
                    f"dicts), as checkpoints hold nothing else. Received: {type(state).__name__} ({error})"
                ) from error
        return state


def refuse_buffer(data: Any, *, plugin: str) -> None:
    """Refuse a set of the datasets library that is shuffled with a buffer: its state does not hold the buffer.

    Raises:
        ConfigError: it is.
    """
    todo, seen = [getattr(data, "_ex_iterable", None)], 0
    while todo and seen < 1000:  # noqa: PLR2004 - far beyond any real chain
        part, seen = todo.pop(), seen + 1
        if part is None:
            continue
        if type(part).__name__ == "BufferShuffledExamplesIterable" and getattr(part, "buffer_size", 2) > 1:
            raise ConfigError(
                f"{plugin}: the streaming set is shuffled with a buffer of {part.buffer_size} rows, which its state "
                "does not hold, so that no run could go on exactly. Take out its shuffle(), and add `shuffle-buffer`"
            )
        todo += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
