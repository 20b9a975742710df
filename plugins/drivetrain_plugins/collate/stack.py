"""Stacking: rows that have equal shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, plugin, stack

if TYPE_CHECKING:
    from collections.abc import Callable


@plugin(role="collate")
class Stack:
    """Stack equally shaped rows (the default, by name)."""

    @hookimpl
    def build_collator(self) -> Callable[..., Any]:
        """Return torch's default collation."""
        return stack
