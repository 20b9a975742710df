"""Only the fields that the model takes."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import Columns, ConfigError, DataError, Problem, hookimpl, option, plugin
from drivetrain_plugins.shared.blocks import Mapped
from drivetrain_plugins.shared.causal import unwrapped
from drivetrain_plugins.shared.table import Table

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from drivetrain import Run

log = logging.getLogger("drivetrain")
LABELS = ("label", "label_ids", "labels")


def taken(model: Any) -> list[str]:
    """Return the names of the arguments of the model's forward."""
    parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


@attrs.define
class Picked:
    """Rows with some of their fields only."""

    names: frozenset[str]
    told: bool = False

    def fields(self, names: Iterable[str], split: str) -> list[str]:
        """Return those of `names` that stay, and tell once which do not.

        Raises:
            ConfigError: none does.
        """
        names = list(names)
        left = [name for name in names if name in self.names]
        if not left:
            what = f"columns: none of the {split} rows' fields is an argument of the model's forward"
            received = f"{sorted(names)}; forward takes {sorted(self.names)}"
            do = "list `columns` before the plugins that make such fields (the first in the list sees the rows last), "
            raise ConfigError([Problem(what, received, do + "or name fields in `keep`")])
        dropped = sorted(set(names) - set(left))
        if dropped and not self.told:
            log.info("columns: the model's forward takes no %s; left out of the %s rows", ", ".join(dropped), split)
        self.told = True
        return left

    def __call__(self, row: Any) -> dict[str, Any]:
        """Return the row's fields that stay.

        Raises:
            DataError: none does.
        """
        if not self.told:
            try:
                self.fields(row, "stream's")
            except ConfigError as error:
                raise DataError(str(error)) from error
        return {name: value for name, value in row.items() if name in self.names}


@attrs.frozen(eq=False)
class PickedRows:
    """A map-style dataset whose rows are picked as they are fetched."""

    rows: Any
    pick: Picked

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row."""
        return self.pick(self.rows[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return many rows, fetched together where the dataset can."""
        whole = getattr(self.rows, "__getitems__", None)
        return [self.pick(row) for row in (whole(indices) if whole else [self.rows[i] for i in indices])]


@plugin(role="data", rows="tokens")
class UsedColumns:
    """Drop the fields of the rows that the model's forward does not take, and say which; labels stay."""

    keep: list[str] = option(factory=list, help="fields that stay besides, e.g. those that the collator reads")

    @hookimpl(wrapper=True, tryfirst=True)  # outermost: the fields that other plugins make are there by then
    def build_dataset(self, run: Run, split: str) -> Generator[None, Any, Any]:
        """Pick the fields: of columns at once, of rows when they are fetched."""
        rows = yield
        if rows is None:
            return None
        pick = Picked(frozenset([*taken(run.model), *LABELS, *self.keep]))
        if hasattr(rows, "open"):
            return Mapped(rows, pick)
        if isinstance(rows, (Table, Columns)):
            return type(rows)({name: rows.columns[name] for name in pick.fields(rows.columns, split)})
        if hasattr(rows, "select_columns"):  # a set of the datasets library
            return rows.select_columns(pick.fields(rows.column_names, split))
        if len(rows):
            first = rows[0]
            if not hasattr(first, "keys"):
                raise ConfigError(f"columns: rows must be mappings of fields. Received: {type(first).__name__}")
            pick.fields(first, split)
        return PickedRows(rows, pick)
