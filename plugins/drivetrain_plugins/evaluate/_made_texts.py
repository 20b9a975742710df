"""Texts that the run's `generate` plugin makes of a batch, with or without labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem
from drivetrain.data import IGNORE_INDEX
from drivetrain.rng import global_seeder
from drivetrain_plugins.evaluate._generation import NO_INPUTS, Task
from drivetrain_plugins.evaluate._outputs import labels_of
from drivetrain_plugins.evaluate.generate import Generate
from drivetrain_plugins.shared.exports import bare
from drivetrain_plugins.shared.generators import kept_generators

if TYPE_CHECKING:
    from drivetrain import Micro, Run


def maker(run: Run) -> Generate | None:
    """Return the plugin of the run that makes texts, if there is one."""
    return next((p for p in run.plugins.values() if isinstance(p, Generate)), None)


def complete(run: Run, batch: Any) -> None:
    """Give an encoder-decoder something to decode: the pass of rows without targets would fail."""
    config = getattr(bare(run.model), "config", None)
    if getattr(config, "is_encoder_decoder", False) and not set(NO_INPUTS) & set(batch):
        count = len(next(iter(batch.values())))
        batch["decoder_input_ids"] = torch.full((count, 1), config.decoder_start_token_id)  # type: ignore[union-attr]


def new_tokens(run: Run, micro: Micro, split: str, number: int) -> torch.Tensor:
    """Return the ids that are made for each row, int64 (B, T), with -100 where a text has ended.

    Raises:
        ConfigError: nobody makes texts.
    """
    plugin, model = maker(run), bare(run.model)
    if plugin is None:
        raise ConfigError([Problem("predict: kind 'text' needs a plugin that makes texts", do="add `generate`")])
    task = _sources(micro.batch) if model.config.is_encoder_decoder else _prompts(micro.batch, plugin.prompt_tokens)
    with kept_generators(run.device):
        global_seeder(run.device)(run.seed_for(f"predict/{split}", number, run.rank))
        made = plugin.new_tokens(model, task)
    longest = max(1, *map(len, made))
    return torch.tensor([row + [IGNORE_INDEX] * (longest - len(row)) for row in made])


def texts(run: Run, ids: Any) -> list[str]:
    """Return the texts of `new_tokens`, of all batches."""
    plugin = maker(run)
    assert plugin is not None
    return plugin.decode(run, [row[row != IGNORE_INDEX].tolist() for row in ids])


def _sources(batch: Any) -> Task:
    inputs = {n: v for n, v in batch.items() if n not in NO_INPUTS and isinstance(v, torch.Tensor)}
    count = len(next(iter(inputs.values())))
    return Task(inputs, [[]] * count, [[]] * count)


def _prompts(batch: Any, length: int | None) -> Task:
    """Return each row's prompt, padded on the left: what stands before its first label, or else the whole row."""
    ids = batch["input_ids"]
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
    labels = labels_of(batch)
    if not isinstance(labels, torch.Tensor) or labels.shape != ids.shape:
        labels = torch.full_like(ids, IGNORE_INDEX)
    prompts = []
    for row, labelled, there in zip(ids, labels, mask != 0, strict=True):
        tokens, wanted = row[there], (labelled[there] != IGNORE_INDEX).nonzero()
        cut = length if length is not None else int(wanted[0]) if len(wanted) else 0
        prompts.append(tokens[: cut or None])
    width = max(map(len, prompts))
    inputs = {name: ids.new_zeros(len(prompts), width) for name in ("input_ids", "attention_mask")}
    for place, prompt in enumerate(prompts):
        inputs["input_ids"][place, width - len(prompt) :] = prompt
        inputs["attention_mask"][place, width - len(prompt) :] = 1
    return Task(inputs, [[]] * len(prompts), [[]] * len(prompts), width)
