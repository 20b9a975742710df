"""The first-party plugins by class name; a module is imported when its class is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain_plugins.checkpoint.async_checkpoint import AsyncCheckpoint as AsyncCheckpoint
    from drivetrain_plugins.checkpoint.average_checkpoints import AverageCheckpoints as AverageCheckpoints
    from drivetrain_plugins.checkpoint.checkpoint import Checkpoint as Checkpoint
    from drivetrain_plugins.checkpoint.preemption import Preemption as Preemption
    from drivetrain_plugins.checkpoint.save_on_error import SaveOnError as SaveOnError
    from drivetrain_plugins.checkpoint.warm_start import WarmStart as WarmStart
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
    from drivetrain_plugins.control.accumulate_schedule import AccumulateSchedule as AccumulateSchedule
    from drivetrain_plugins.control.batch_size_schedule import BatchSizeSchedule as BatchSizeSchedule
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
    from drivetrain_plugins.evaluate.best_model import BestModel as BestModel
    from drivetrain_plugins.evaluate.bleu import Bleu as Bleu
    from drivetrain_plugins.evaluate.early_stopping import EarlyStopping as EarlyStopping
    from drivetrain_plugins.evaluate.entity_f1 import EntityF1 as EntityF1
    from drivetrain_plugins.evaluate.error_rate import ErrorRate as ErrorRate
    from drivetrain_plugins.evaluate.evaluate import Evaluate as Evaluate
    from drivetrain_plugins.evaluate.evaluate_on_start import EvaluateOnStart as EvaluateOnStart
    from drivetrain_plugins.evaluate.exact_match import ExactMatch as ExactMatch
    from drivetrain_plugins.evaluate.f1 import F1 as F1
    from drivetrain_plugins.evaluate.generate import Generate as Generate
    from drivetrain_plugins.evaluate.metrics_function import MetricsFunction as MetricsFunction
    from drivetrain_plugins.evaluate.perplexity import Perplexity as Perplexity
    from drivetrain_plugins.evaluate.predict import Predict as Predict
    from drivetrain_plugins.evaluate.regression import Regression as Regression
    from drivetrain_plugins.evaluate.retrieval import Retrieval as Retrieval
    from drivetrain_plugins.evaluate.rouge import Rouge as Rouge
    from drivetrain_plugins.evaluate.torchmetrics import TorchMetrics as TorchMetrics
    from drivetrain_plugins.export.export_gguf import ExportGGUF as ExportGGUF
    from drivetrain_plugins.export.export_hf import ExportHF as ExportHF
    from drivetrain_plugins.export.export_onnx import ExportONNX as ExportONNX
    from drivetrain_plugins.export.export_safetensors import ExportSafetensors as ExportSafetensors
    from drivetrain_plugins.export.export_torch import ExportTorch as ExportTorch
    from drivetrain_plugins.export.hub import Hub as Hub
    from drivetrain_plugins.export.model_card import ModelCard as ModelCard
    from drivetrain_plugins.loss.bce import BCE as BCE
    from drivetrain_plugins.loss.causal_lm_loss import CausalLMLoss as CausalLMLoss
    from drivetrain_plugins.loss.chunked_cross_entropy import ChunkedCrossEntropy as ChunkedCrossEntropy
    from drivetrain_plugins.loss.cross_entropy import CrossEntropy as CrossEntropy
    from drivetrain_plugins.loss.label_smoothing import LabelSmoothing as LabelSmoothing
    from drivetrain_plugins.loss.loss_function import LossFunction as LossFunction
    from drivetrain_plugins.loss.model_loss import ModelLoss as ModelLoss
    from drivetrain_plugins.loss.mse import MSE as MSE
    from drivetrain_plugins.model.hf_model import HFModel as HFModel
    from drivetrain_plugins.model.lora import LoRA as LoRA
    from drivetrain_plugins.model.merge_lora import MergeLoRA as MergeLoRA
    from drivetrain_plugins.model.module import Module as Module
    from drivetrain_plugins.optim.adafactor import Adafactor as Adafactor
    from drivetrain_plugins.optim.adagrad import Adagrad as Adagrad
    from drivetrain_plugins.optim.adalomo import AdaLomo as AdaLomo
    from drivetrain_plugins.optim.adam import Adam as Adam
    from drivetrain_plugins.optim.adamax import Adamax as Adamax
    from drivetrain_plugins.optim.adamw import AdamW as AdamW
    from drivetrain_plugins.optim.adamw_4bit import AdamW4bit as AdamW4bit
    from drivetrain_plugins.optim.adamw_8bit import AdamW8bit as AdamW8bit
    from drivetrain_plugins.optim.adamw_anyprecision import AnyPrecisionAdamW as AnyPrecisionAdamW
    from drivetrain_plugins.optim.ademamix import AdEMAMix as AdEMAMix
    from drivetrain_plugins.optim.apollo import Apollo as Apollo
    from drivetrain_plugins.optim.bnb_adamw import BnbAdamW as BnbAdamW
    from drivetrain_plugins.optim.bnb_ademamix import BnbAdEMAMix as BnbAdEMAMix
    from drivetrain_plugins.optim.bnb_lion import BnbLion as BnbLion
    from drivetrain_plugins.optim.bnb_rmsprop import BnbRMSprop as BnbRMSprop
    from drivetrain_plugins.optim.clip import Clip as Clip
    from drivetrain_plugins.optim.ema import EMA as EMA
    from drivetrain_plugins.optim.freeze import Freeze as Freeze
    from drivetrain_plugins.optim.galore import GaLore as GaLore
    from drivetrain_plugins.optim.gradient_noise import GradientNoise as GradientNoise
    from drivetrain_plugins.optim.grokadamw import GrokAdamW as GrokAdamW
    from drivetrain_plugins.optim.lbfgs import LBFGS as LBFGS
    from drivetrain_plugins.optim.lion import Lion as Lion
    from drivetrain_plugins.optim.lomo import Lomo as Lomo
    from drivetrain_plugins.optim.lookahead import Lookahead as Lookahead
    from drivetrain_plugins.optim.muon import Muon as Muon
    from drivetrain_plugins.optim.nadam import NAdam as NAdam
    from drivetrain_plugins.optim.nan_guard import NanGuard as NanGuard
    from drivetrain_plugins.optim.neftune import Neftune as Neftune
    from drivetrain_plugins.optim.optimizer_in_backward import OptimizerInBackward as OptimizerInBackward
    from drivetrain_plugins.optim.parameter_groups import ParameterGroups as ParameterGroups
    from drivetrain_plugins.optim.radam import RAdam as RAdam
    from drivetrain_plugins.optim.rmsprop import RMSprop as RMSprop
    from drivetrain_plugins.optim.sam import SAM as SAM
    from drivetrain_plugins.optim.schedule_free_adamw import ScheduleFreeAdamW as ScheduleFreeAdamW
    from drivetrain_plugins.optim.schedule_free_radam import ScheduleFreeRAdam as ScheduleFreeRAdam
    from drivetrain_plugins.optim.schedule_free_sgd import ScheduleFreeSGD as ScheduleFreeSGD
    from drivetrain_plugins.optim.sgd import SGD as SGD
    from drivetrain_plugins.optim.shampoo import Shampoo as Shampoo
    from drivetrain_plugins.optim.soap import SOAP as SOAP
    from drivetrain_plugins.optim.spike_skip import SpikeSkip as SpikeSkip
    from drivetrain_plugins.optim.stable_adamw import StableAdamW as StableAdamW
    from drivetrain_plugins.optim.swa import SWA as SWA
    from drivetrain_plugins.order.curriculum import Curriculum as Curriculum
    from drivetrain_plugins.order.group_by_length import GroupByLength as GroupByLength
    from drivetrain_plugins.order.random import Random as Random
    from drivetrain_plugins.order.rebalance import Rebalance as Rebalance
    from drivetrain_plugins.order.sequential import Sequential as Sequential
    from drivetrain_plugins.order.token_budget import TokenBudget as TokenBudget
    from drivetrain_plugins.precision.bf16 import BF16 as BF16
    from drivetrain_plugins.precision.fp16 import FP16 as FP16
    from drivetrain_plugins.report.jsonl_log import JsonlLog as JsonlLog
    from drivetrain_plugins.report.progress import Progress as Progress
    from drivetrain_plugins.report.tensorboard import TensorBoard as TensorBoard
    from drivetrain_plugins.schedule.chain import Chain as Chain
    from drivetrain_plugins.schedule.constant import Constant as Constant
    from drivetrain_plugins.schedule.cosine import Cosine as Cosine
    from drivetrain_plugins.schedule.cosine_min_lr import CosineMinLR as CosineMinLR
    from drivetrain_plugins.schedule.cosine_restarts import CosineRestarts as CosineRestarts
    from drivetrain_plugins.schedule.cosine_warmup_min_lr import CosineWarmupMinLR as CosineWarmupMinLR
    from drivetrain_plugins.schedule.exponential import Exponential as Exponential
    from drivetrain_plugins.schedule.greedy import Greedy as Greedy
    from drivetrain_plugins.schedule.group_schedules import GroupSchedules as GroupSchedules
    from drivetrain_plugins.schedule.inverse_sqrt import InverseSqrt as InverseSqrt
    from drivetrain_plugins.schedule.linear import Linear as Linear
    from drivetrain_plugins.schedule.multi_step import MultiStep as MultiStep
    from drivetrain_plugins.schedule.one_cycle import OneCycle as OneCycle
    from drivetrain_plugins.schedule.plateau import Plateau as Plateau
    from drivetrain_plugins.schedule.polynomial import Polynomial as Polynomial
    from drivetrain_plugins.schedule.step import StepDecay as StepDecay
    from drivetrain_plugins.schedule.warmup_stable_decay import WarmupStableDecay as WarmupStableDecay

_HOME = {
    "Accumulate": "control.accumulate",
    "AccumulateSchedule": "control.accumulate_schedule",
    "Accuracy": "evaluate.accuracy",
    "AdEMAMix": "optim.ademamix",
    "AdaLomo": "optim.adalomo",
    "Adafactor": "optim.adafactor",
    "Adagrad": "optim.adagrad",
    "Adam": "optim.adam",
    "AdamW": "optim.adamw",
    "AdamW4bit": "optim.adamw_4bit",
    "AdamW8bit": "optim.adamw_8bit",
    "Adamax": "optim.adamax",
    "AnyPrecisionAdamW": "optim.adamw_anyprecision",
    "Apollo": "optim.apollo",
    "AsyncCheckpoint": "checkpoint.async_checkpoint",
    "AverageCheckpoints": "checkpoint.average_checkpoints",
    "BCE": "loss.bce",
    "BF16": "precision.bf16",
    "BadRows": "data.bad_rows",
    "BatchSizeSchedule": "control.batch_size_schedule",
    "BestModel": "evaluate.best_model",
    "Bleu": "evaluate.bleu",
    "BnbAdEMAMix": "optim.bnb_ademamix",
    "BnbAdamW": "optim.bnb_adamw",
    "BnbLion": "optim.bnb_lion",
    "BnbRMSprop": "optim.bnb_rmsprop",
    "CausalLM": "collate.causal_lm",
    "CausalLMLoss": "loss.causal_lm_loss",
    "Chain": "schedule.chain",
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
    "EMA": "optim.ema",
    "EarlyStopping": "evaluate.early_stopping",
    "EntityF1": "evaluate.entity_f1",
    "ErrorRate": "evaluate.error_rate",
    "Evaluate": "evaluate.evaluate",
    "EvaluateOnStart": "evaluate.evaluate_on_start",
    "ExactMatch": "evaluate.exact_match",
    "Exponential": "schedule.exponential",
    "ExportGGUF": "export.export_gguf",
    "ExportHF": "export.export_hf",
    "ExportONNX": "export.export_onnx",
    "ExportSafetensors": "export.export_safetensors",
    "ExportTorch": "export.export_torch",
    "F1": "evaluate.f1",
    "FP16": "precision.fp16",
    "Flatten": "collate.flatten",
    "Freeze": "optim.freeze",
    "GaLore": "optim.galore",
    "Generate": "evaluate.generate",
    "GradientNoise": "optim.gradient_noise",
    "Greedy": "schedule.greedy",
    "GrokAdamW": "optim.grokadamw",
    "GroupByLength": "order.group_by_length",
    "GroupSchedules": "schedule.group_schedules",
    "HFDataset": "data.hf_dataset",
    "HFModel": "model.hf_model",
    "Hub": "export.hub",
    "InverseSqrt": "schedule.inverse_sqrt",
    "Jsonl": "data.jsonl",
    "JsonlLog": "report.jsonl_log",
    "LBFGS": "optim.lbfgs",
    "LabelSmoothing": "loss.label_smoothing",
    "Linear": "schedule.linear",
    "Lion": "optim.lion",
    "LoRA": "model.lora",
    "Loader": "data.loader",
    "Lomo": "optim.lomo",
    "Lookahead": "optim.lookahead",
    "LossFunction": "loss.loss_function",
    "MSE": "loss.mse",
    "MaskedLM": "collate.masked_lm",
    "MergeLoRA": "model.merge_lora",
    "MetricsFunction": "evaluate.metrics_function",
    "Mix": "data.mix",
    "ModelCard": "export.model_card",
    "ModelLoss": "loss.model_loss",
    "Module": "model.module",
    "MultiStep": "schedule.multi_step",
    "MultipleChoice": "collate.multiple_choice",
    "Muon": "optim.muon",
    "NAdam": "optim.nadam",
    "NanGuard": "optim.nan_guard",
    "Neftune": "optim.neftune",
    "OneCycle": "schedule.one_cycle",
    "OptimizerInBackward": "optim.optimizer_in_backward",
    "Pack": "collate.pack",
    "Pad": "collate.pad",
    "ParameterGroups": "optim.parameter_groups",
    "Parquet": "data.parquet",
    "PermutationLM": "collate.permutation_lm",
    "Perplexity": "evaluate.perplexity",
    "Plateau": "schedule.plateau",
    "Polynomial": "schedule.polynomial",
    "Predict": "evaluate.predict",
    "Preemption": "checkpoint.preemption",
    "PreferencePairs": "collate.preference_pairs",
    "Progress": "report.progress",
    "RAdam": "optim.radam",
    "RMSprop": "optim.rmsprop",
    "Random": "order.random",
    "Rebalance": "order.rebalance",
    "Regression": "evaluate.regression",
    "Retrieval": "evaluate.retrieval",
    "Rouge": "evaluate.rouge",
    "Rows": "data.rows",
    "SAM": "optim.sam",
    "SGD": "optim.sgd",
    "SOAP": "optim.soap",
    "SWA": "optim.swa",
    "SaveOnError": "checkpoint.save_on_error",
    "ScheduleFreeAdamW": "optim.schedule_free_adamw",
    "ScheduleFreeRAdam": "optim.schedule_free_radam",
    "ScheduleFreeSGD": "optim.schedule_free_sgd",
    "SentenceOrder": "collate.sentence_order",
    "Seq2Seq": "collate.seq2seq",
    "Sequential": "order.sequential",
    "Shampoo": "optim.shampoo",
    "ShuffleBuffer": "data.shuffle_buffer",
    "SpikeSkip": "optim.spike_skip",
    "StableAdamW": "optim.stable_adamw",
    "Stack": "collate.stack",
    "StepDecay": "schedule.step",
    "TensorBoard": "report.tensorboard",
    "Text": "data.text",
    "TokenBudget": "order.token_budget",
    "TokenClassification": "collate.token_classification",
    "Tokenize": "data.tokenize",
    "TorchDataset": "data.torch_dataset",
    "TorchMetrics": "evaluate.torchmetrics",
    "UsedColumns": "data.columns",
    "Vision": "collate.vision",
    "WarmStart": "checkpoint.warm_start",
    "WarmupStableDecay": "schedule.warmup_stable_decay",
    "WholeWordMask": "collate.whole_word_mask",
}
__all__ = list(_HOME)  # type checkers see the imports above

__getattr__ = lazy_names(__name__, _HOME)
