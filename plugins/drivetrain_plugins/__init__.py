"""The first-party plugins by class name; a module is imported when its class is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain_plugins.checkpoint.checkpoint import Checkpoint as Checkpoint
    from drivetrain_plugins.collate.causal_lm import CausalLM as CausalLM
    from drivetrain_plugins.collate.completion_only import CompletionOnly as CompletionOnly
    from drivetrain_plugins.collate.flatten import Flatten as Flatten
    from drivetrain_plugins.collate.masked_lm import MaskedLM as MaskedLM
    from drivetrain_plugins.collate.multiple_choice import MultipleChoice as MultipleChoice
    from drivetrain_plugins.collate.pack import Pack as Pack
    from drivetrain_plugins.collate.pad import Pad as Pad
    from drivetrain_plugins.collate.permutation_lm import PermutationLM as PermutationLM
    from drivetrain_plugins.collate.preference_pairs import PreferencePairs as PreferencePairs
    from drivetrain_plugins.collate.sentence_order import SentenceOrder as SentenceOrder
    from drivetrain_plugins.collate.seq2seq import Seq2Seq as Seq2Seq
    from drivetrain_plugins.collate.stack import Stack as Stack
    from drivetrain_plugins.collate.token_classification import TokenClassification as TokenClassification
    from drivetrain_plugins.collate.vision import Vision as Vision
    from drivetrain_plugins.collate.whole_word_mask import WholeWordMask as WholeWordMask
    from drivetrain_plugins.control.accumulate import Accumulate as Accumulate
    from drivetrain_plugins.data.bad_rows import BadRows as BadRows
    from drivetrain_plugins.data.chat_template import ChatTemplate as ChatTemplate
    from drivetrain_plugins.data.columns import UsedColumns as UsedColumns
    from drivetrain_plugins.data.hf_dataset import HFDataset as HFDataset
    from drivetrain_plugins.data.jsonl import Jsonl as Jsonl
    from drivetrain_plugins.data.loader import Loader as Loader
    from drivetrain_plugins.data.mix import Mix as Mix
    from drivetrain_plugins.data.parquet import Parquet as Parquet
    from drivetrain_plugins.data.rows import Rows as Rows
    from drivetrain_plugins.data.shuffle_buffer import ShuffleBuffer as ShuffleBuffer
    from drivetrain_plugins.data.text import Text as Text
    from drivetrain_plugins.data.tokenize import Tokenize as Tokenize
    from drivetrain_plugins.data.torch_dataset import TorchDataset as TorchDataset
    from drivetrain_plugins.evaluate.accuracy import Accuracy as Accuracy
    from drivetrain_plugins.evaluate.evaluate import Evaluate as Evaluate
    from drivetrain_plugins.export.export_hf import ExportHF as ExportHF
    from drivetrain_plugins.export.export_safetensors import ExportSafetensors as ExportSafetensors
    from drivetrain_plugins.loss.bce import BCE as BCE
    from drivetrain_plugins.loss.causal_lm_loss import CausalLMLoss as CausalLMLoss
    from drivetrain_plugins.loss.chunked_cross_entropy import ChunkedCrossEntropy as ChunkedCrossEntropy
    from drivetrain_plugins.loss.cross_entropy import CrossEntropy as CrossEntropy
    from drivetrain_plugins.loss.label_smoothing import LabelSmoothing as LabelSmoothing
    from drivetrain_plugins.loss.loss_function import LossFunction as LossFunction
    from drivetrain_plugins.loss.model_loss import ModelLoss as ModelLoss
    from drivetrain_plugins.loss.mse import MSE as MSE
    from drivetrain_plugins.model.hf_model import HFModel as HFModel
    from drivetrain_plugins.model.module import Module as Module
    from drivetrain_plugins.optim.adamw import AdamW as AdamW
    from drivetrain_plugins.optim.clip import Clip as Clip
    from drivetrain_plugins.optim.sgd import SGD as SGD
    from drivetrain_plugins.order.curriculum import Curriculum as Curriculum
    from drivetrain_plugins.order.group_by_length import GroupByLength as GroupByLength
    from drivetrain_plugins.order.random import Random as Random
    from drivetrain_plugins.order.rebalance import Rebalance as Rebalance
    from drivetrain_plugins.order.sequential import Sequential as Sequential
    from drivetrain_plugins.order.token_budget import TokenBudget as TokenBudget
    from drivetrain_plugins.precision.bf16 import BF16 as BF16
    from drivetrain_plugins.report.jsonl_log import JsonlLog as JsonlLog
    from drivetrain_plugins.report.progress import Progress as Progress
    from drivetrain_plugins.report.tensorboard import TensorBoard as TensorBoard
    from drivetrain_plugins.schedule.constant import Constant as Constant
    from drivetrain_plugins.schedule.cosine import Cosine as Cosine
    from drivetrain_plugins.schedule.cosine_min_lr import CosineMinLR as CosineMinLR
    from drivetrain_plugins.schedule.cosine_restarts import CosineRestarts as CosineRestarts
    from drivetrain_plugins.schedule.cosine_warmup_min_lr import CosineWarmupMinLR as CosineWarmupMinLR
    from drivetrain_plugins.schedule.exponential import Exponential as Exponential
    from drivetrain_plugins.schedule.inverse_sqrt import InverseSqrt as InverseSqrt
    from drivetrain_plugins.schedule.linear import Linear as Linear
    from drivetrain_plugins.schedule.multi_step import MultiStep as MultiStep
    from drivetrain_plugins.schedule.one_cycle import OneCycle as OneCycle
    from drivetrain_plugins.schedule.polynomial import Polynomial as Polynomial
    from drivetrain_plugins.schedule.step import StepDecay as StepDecay
    from drivetrain_plugins.schedule.warmup_stable_decay import WarmupStableDecay as WarmupStableDecay

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
__all__ = list(_HOME)  # type checkers see the imports above

__getattr__ = lazy_names(__name__, _HOME)
