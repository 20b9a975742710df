"""The first-party plugins by class name; a module is imported when its class is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain_plugins.checkpoint.checkpoint import Checkpoint
    from drivetrain_plugins.collate.causal_lm import CausalLM
    from drivetrain_plugins.collate.completion_only import CompletionOnly
    from drivetrain_plugins.collate.flatten import Flatten
    from drivetrain_plugins.collate.masked_lm import MaskedLM
    from drivetrain_plugins.collate.multiple_choice import MultipleChoice
    from drivetrain_plugins.collate.pack import Pack
    from drivetrain_plugins.collate.pad import Pad
    from drivetrain_plugins.collate.permutation_lm import PermutationLM
    from drivetrain_plugins.collate.preference_pairs import PreferencePairs
    from drivetrain_plugins.collate.sentence_order import SentenceOrder
    from drivetrain_plugins.collate.seq2seq import Seq2Seq
    from drivetrain_plugins.collate.stack import Stack
    from drivetrain_plugins.collate.token_classification import TokenClassification
    from drivetrain_plugins.collate.vision import Vision
    from drivetrain_plugins.collate.whole_word_mask import WholeWordMask
    from drivetrain_plugins.control.accumulate import Accumulate
    from drivetrain_plugins.data.bad_rows import BadRows
    from drivetrain_plugins.data.chat_template import ChatTemplate
    from drivetrain_plugins.data.columns import UsedColumns
    from drivetrain_plugins.data.hf_dataset import HFDataset
    from drivetrain_plugins.data.jsonl import Jsonl
    from drivetrain_plugins.data.loader import Loader
    from drivetrain_plugins.data.mix import Mix
    from drivetrain_plugins.data.parquet import Parquet
    from drivetrain_plugins.data.rows import Rows
    from drivetrain_plugins.data.shuffle_buffer import ShuffleBuffer
    from drivetrain_plugins.data.text import Text
    from drivetrain_plugins.data.tokenize import Tokenize
    from drivetrain_plugins.data.torch_dataset import TorchDataset
    from drivetrain_plugins.evaluate.accuracy import Accuracy
    from drivetrain_plugins.evaluate.evaluate import Evaluate
    from drivetrain_plugins.export.export_hf import ExportHF
    from drivetrain_plugins.export.export_safetensors import ExportSafetensors
    from drivetrain_plugins.loss.bce import BCE
    from drivetrain_plugins.loss.causal_lm_loss import CausalLMLoss
    from drivetrain_plugins.loss.chunked_cross_entropy import ChunkedCrossEntropy
    from drivetrain_plugins.loss.cross_entropy import CrossEntropy
    from drivetrain_plugins.loss.label_smoothing import LabelSmoothing
    from drivetrain_plugins.loss.loss_function import LossFunction
    from drivetrain_plugins.loss.model_loss import ModelLoss
    from drivetrain_plugins.loss.mse import MSE
    from drivetrain_plugins.model.hf_model import HFModel
    from drivetrain_plugins.model.module import Module
    from drivetrain_plugins.optim.adamw import AdamW
    from drivetrain_plugins.optim.clip import Clip
    from drivetrain_plugins.optim.sgd import SGD
    from drivetrain_plugins.order.curriculum import Curriculum
    from drivetrain_plugins.order.group_by_length import GroupByLength
    from drivetrain_plugins.order.random import Random
    from drivetrain_plugins.order.rebalance import Rebalance
    from drivetrain_plugins.order.sequential import Sequential
    from drivetrain_plugins.order.token_budget import TokenBudget
    from drivetrain_plugins.precision.bf16 import BF16
    from drivetrain_plugins.report.jsonl_log import JsonlLog
    from drivetrain_plugins.report.progress import Progress
    from drivetrain_plugins.report.tensorboard import TensorBoard
    from drivetrain_plugins.schedule.constant import Constant
    from drivetrain_plugins.schedule.cosine import Cosine
    from drivetrain_plugins.schedule.cosine_min_lr import CosineMinLR
    from drivetrain_plugins.schedule.cosine_restarts import CosineRestarts
    from drivetrain_plugins.schedule.cosine_warmup_min_lr import CosineWarmupMinLR
    from drivetrain_plugins.schedule.exponential import Exponential
    from drivetrain_plugins.schedule.inverse_sqrt import InverseSqrt
    from drivetrain_plugins.schedule.linear import Linear
    from drivetrain_plugins.schedule.multi_step import MultiStep
    from drivetrain_plugins.schedule.one_cycle import OneCycle
    from drivetrain_plugins.schedule.polynomial import Polynomial
    from drivetrain_plugins.schedule.step import StepDecay
    from drivetrain_plugins.schedule.warmup_stable_decay import WarmupStableDecay

_HOME = {
    "Accumulate": "control.accumulate",
    "Accuracy": "evaluate.accuracy",
    "AdamW": "optim.adamw",
    "BCE": "loss.bce",
    "BF16": "precision.bf16",
    "BadRows": "data.bad_rows",
    "CausalLM": "collate.causal_lm",
    "CausalLMLoss": "loss.causal_lm_loss",
    "ChatTemplate": "data.chat_template",
    "Checkpoint": "checkpoint.checkpoint",
    "ChunkedCrossEntropy": "loss.chunked_cross_entropy",
    "Clip": "optim.clip",
    "CompletionOnly": "collate.completion_only",
    "Constant": "schedule.constant",
    "Cosine": "schedule.cosine",
    "CosineMinLR": "schedule.cosine_min_lr",
    "CosineRestarts": "schedule.cosine_restarts",
    "CosineWarmupMinLR": "schedule.cosine_warmup_min_lr",
    "CrossEntropy": "loss.cross_entropy",
    "Curriculum": "order.curriculum",
    "Evaluate": "evaluate.evaluate",
    "Exponential": "schedule.exponential",
    "ExportHF": "export.export_hf",
    "ExportSafetensors": "export.export_safetensors",
    "Flatten": "collate.flatten",
    "GroupByLength": "order.group_by_length",
    "HFDataset": "data.hf_dataset",
    "HFModel": "model.hf_model",
    "InverseSqrt": "schedule.inverse_sqrt",
    "Jsonl": "data.jsonl",
    "JsonlLog": "report.jsonl_log",
    "LabelSmoothing": "loss.label_smoothing",
    "Linear": "schedule.linear",
    "Loader": "data.loader",
    "LossFunction": "loss.loss_function",
    "MSE": "loss.mse",
    "MaskedLM": "collate.masked_lm",
    "Mix": "data.mix",
    "ModelLoss": "loss.model_loss",
    "Module": "model.module",
    "MultiStep": "schedule.multi_step",
    "MultipleChoice": "collate.multiple_choice",
    "OneCycle": "schedule.one_cycle",
    "Pack": "collate.pack",
    "Pad": "collate.pad",
    "Parquet": "data.parquet",
    "PermutationLM": "collate.permutation_lm",
    "Polynomial": "schedule.polynomial",
    "PreferencePairs": "collate.preference_pairs",
    "Progress": "report.progress",
    "Random": "order.random",
    "Rebalance": "order.rebalance",
    "Rows": "data.rows",
    "SGD": "optim.sgd",
    "SentenceOrder": "collate.sentence_order",
    "Seq2Seq": "collate.seq2seq",
    "Sequential": "order.sequential",
    "ShuffleBuffer": "data.shuffle_buffer",
    "Stack": "collate.stack",
    "StepDecay": "schedule.step",
    "TensorBoard": "report.tensorboard",
    "Text": "data.text",
    "TokenBudget": "order.token_budget",
    "TokenClassification": "collate.token_classification",
    "Tokenize": "data.tokenize",
    "TorchDataset": "data.torch_dataset",
    "UsedColumns": "data.columns",
    "Vision": "collate.vision",
    "WarmupStableDecay": "schedule.warmup_stable_decay",
    "WholeWordMask": "collate.whole_word_mask",
}
__all__ = [
    "BCE",
    "BF16",
    "MSE",
    "SGD",
    "Accumulate",
    "Accuracy",
    "AdamW",
    "BadRows",
    "CausalLM",
    "CausalLMLoss",
    "ChatTemplate",
    "Checkpoint",
    "ChunkedCrossEntropy",
    "Clip",
    "CompletionOnly",
    "Constant",
    "Cosine",
    "CosineMinLR",
    "CosineRestarts",
    "CosineWarmupMinLR",
    "CrossEntropy",
    "Curriculum",
    "Evaluate",
    "Exponential",
    "ExportHF",
    "ExportSafetensors",
    "Flatten",
    "GroupByLength",
    "HFDataset",
    "HFModel",
    "InverseSqrt",
    "Jsonl",
    "JsonlLog",
    "LabelSmoothing",
    "Linear",
    "Loader",
    "LossFunction",
    "MaskedLM",
    "Mix",
    "ModelLoss",
    "Module",
    "MultiStep",
    "MultipleChoice",
    "OneCycle",
    "Pack",
    "Pad",
    "Parquet",
    "PermutationLM",
    "Polynomial",
    "PreferencePairs",
    "Progress",
    "Random",
    "Rebalance",
    "Rows",
    "SentenceOrder",
    "Seq2Seq",
    "Sequential",
    "ShuffleBuffer",
    "Stack",
    "StepDecay",
    "TensorBoard",
    "Text",
    "TokenBudget",
    "TokenClassification",
    "Tokenize",
    "TorchDataset",
    "UsedColumns",
    "Vision",
    "WarmupStableDecay",
    "WholeWordMask",
]

__getattr__ = lazy_names(__name__, _HOME)
