"""drivetrain: a training framework for PyTorch built as a microkernel of hooks and plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain.catalogue import Catalogue
    from drivetrain.data import Columns, InProcess, Sequential, Shuffled, stack
    from drivetrain.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DrivetrainError,
        MissingDependency,
        PlanError,
        Problem,
        RecipeError,
        TrainingError,
    )
    from drivetrain.hooks import Hooks, collect, event, hookimpl, operation
    from drivetrain.options import import_object, option, plugin, require
    from drivetrain.plan import Plan
    from drivetrain.protocols import Metric, Reader, Stream
    from drivetrain.recipe import Recipe
    from drivetrain.state import Exporter, Micro, Run, Settings, Stage, Step, Transform
    from drivetrain.streams import BadRow, Counted, Iterated, Streamed
    from drivetrain.trainer import Result, Trainer
    from drivetrain.triggers import Trigger

_HOMES = {
    "catalogue": ["Catalogue"],
    "data": ["Columns", "InProcess", "Sequential", "Shuffled", "stack"],
    "errors": [
        "CheckpointError", "ConfigError", "DataError", "DrivetrainError", "MissingDependency",
        "PlanError", "Problem", "RecipeError", "TrainingError",
    ],
    "hooks": ["Hooks", "collect", "event", "hookimpl", "operation"],
    "options": ["import_object", "option", "plugin", "require"],
    "plan": ["Plan"],
    "recipe": ["Recipe"],
    "protocols": ["Metric", "Reader", "Stream"],
    "state": ["Exporter", "Micro", "Run", "Settings", "Stage", "Step", "Transform"],
    "streams": ["BadRow", "Counted", "Iterated", "Streamed"],
    "trainer": ["Result", "Trainer"],
    "triggers": ["Trigger"],
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__version__ = "0.1.0"
CONTRACT = 1  # of hooks and carriers; the entry points' group is named for it
__all__ = [
    "CONTRACT",
    "BadRow",
    "Catalogue",
    "CheckpointError",
    "Columns",
    "ConfigError",
    "Counted",
    "DataError",
    "DrivetrainError",
    "Exporter",
    "Hooks",
    "InProcess",
    "Iterated",
    "Metric",
    "Micro",
    "MissingDependency",
    "Plan",
    "PlanError",
    "Problem",
    "Reader",
    "Recipe",
    "RecipeError",
    "Result",
    "Run",
    "Sequential",
    "Settings",
    "Shuffled",
    "Stage",
    "Step",
    "Stream",
    "Streamed",
    "Trainer",
    "TrainingError",
    "Transform",
    "Trigger",
    "__version__",
    "collect",
    "event",
    "hookimpl",
    "import_object",
    "operation",
    "option",
    "plugin",
    "require",
    "stack",
]

__getattr__ = lazy_names(__name__, _HOME)
