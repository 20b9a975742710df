"""How the learning rate moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain_plugins.schedule._lr_find import Sweep, lr_find

__all__ = ["Sweep", "lr_find"]

__getattr__ = lazy_names(__name__, {"lr_find": "_lr_find", "Sweep": "_lr_find"})
