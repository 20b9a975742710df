"""The first-party plugins by class name; a module is imported when its class is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain_plugins.checkpoint.checkpoint import Checkpoint
    from drivetrain_plugins.collate.pad import Pad
    from drivetrain_plugins.collate.stack import Stack
    from drivetrain_plugins.control.accumulate import Accumulate
    from drivetrain_plugins.data.hf_dataset import HFDataset
    from drivetrain_plugins.data.jsonl import Jsonl
    from drivetrain_plugins.data.loader import Loader
    from drivetrain_plugins.data.rows import Rows
    from drivetrain_plugins.data.tokenize import Tokenize
    from drivetrain_plugins.evaluate.accuracy import Accuracy
    from drivetrain_plugins.evaluate.evaluate import Evaluate
    from drivetrain_plugins.export.export_hf import ExportHF
    from drivetrain_plugins.export.export_safetensors import ExportSafetensors
    from drivetrain_plugins.model.hf_model import HFModel
    from drivetrain_plugins.model.module import Module
    from drivetrain_plugins.optim.adamw import AdamW
    from drivetrain_plugins.optim.clip import Clip
    from drivetrain_plugins.optim.sgd import SGD
    from drivetrain_plugins.precision.bf16 import BF16
    from drivetrain_plugins.report.jsonl_log import JsonlLog
    from drivetrain_plugins.report.progress import Progress
    from drivetrain_plugins.report.tensorboard import TensorBoard
    from drivetrain_plugins.schedule.constant import Constant
    from drivetrain_plugins.schedule.linear import Linear

_HOME = {
    "Accumulate": "control.accumulate",
    "Accuracy": "evaluate.accuracy",
    "AdamW": "optim.adamw",
    "BF16": "precision.bf16",
    "Checkpoint": "checkpoint.checkpoint",
    "Clip": "optim.clip",
    "Constant": "schedule.constant",
    "Evaluate": "evaluate.evaluate",
    "ExportHF": "export.export_hf",
    "ExportSafetensors": "export.export_safetensors",
    "HFDataset": "data.hf_dataset",
    "HFModel": "model.hf_model",
    "Jsonl": "data.jsonl",
    "JsonlLog": "report.jsonl_log",
    "Linear": "schedule.linear",
    "Loader": "data.loader",
    "Module": "model.module",
    "Pad": "collate.pad",
    "Progress": "report.progress",
    "Rows": "data.rows",
    "SGD": "optim.sgd",
    "Stack": "collate.stack",
    "TensorBoard": "report.tensorboard",
    "Tokenize": "data.tokenize",
}
__all__ = [
    "BF16",
    "SGD",
    "Accumulate",
    "Accuracy",
    "AdamW",
    "Checkpoint",
    "Clip",
    "Constant",
    "Evaluate",
    "ExportHF",
    "ExportSafetensors",
    "HFDataset",
    "HFModel",
    "Jsonl",
    "JsonlLog",
    "Linear",
    "Loader",
    "Module",
    "Pad",
    "Progress",
    "Rows",
    "Stack",
    "TensorBoard",
    "Tokenize",
]

__getattr__ = lazy_names(__name__, _HOME)
