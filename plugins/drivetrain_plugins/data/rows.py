"""Rows from a function of the user's own."""

from __future__ import annotations

from typing import Any

from drivetrain import ConfigError, hookimpl, import_object, option, plugin


@plugin(role="data", provides=["data"], example={"function": "kit_module:rows", "arguments": {"kind": "{rows}"}})
class Rows:
    """Take the rows that an importable function returns for each split."""

    function: str = option(help='called with the split ("train", "evaluate"), as "package.module:name"')
    arguments: dict[str, Any] = option(factory=dict, help="further keyword arguments of the function")
    sets: list[str] = option(
        default=(), converter=list, help='names of evaluation sets: it is called with "evaluate/NAME" for each'
    )

    @property
    def facts(self) -> dict[str, Any]:
        """Declare the named evaluation sets."""
        return {"splits": [f"evaluate/{name}" for name in self.sets]} if self.sets else {}

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        """Call the function; None means that there is no such split."""
        rows = import_object(self.function, plugin="rows")(split, **self.arguments)
        if rows is not None and not hasattr(rows, "__len__"):
            raise ConfigError(f"rows: {self.function} must return rows with a length. Received: {type(rows).__name__}")
        return rows
