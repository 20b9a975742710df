"""What `generate` asks of transformers: a checked GenerationConfig, prompts and references of a batch, new tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, DataError, Problem, TrainingError, require
from drivetrain.data import IGNORE_INDEX
from drivetrain.errors import nearest
from drivetrain_plugins.shared.causal import unwrapped

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "generate"
LENGTH = 64  # new tokens, where neither the options nor the model's configuration say how many
NO_INPUTS = ("labels", "decoder_input_ids", "decoder_attention_mask")
SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")
PACKED = ("cu_seq_lens_q", "position_ids", "seq_idx")


def configuration(model: Any, tokenizer: Any, given: Any, options: Mapping[str, Any]) -> Any:
    """Return a new GenerationConfig: `options`, then what is given as a file or table, then the model's own.

    Raises:
        ConfigError: the library refuses them, or does not know one.
    """
    library = require("transformers", plugin=NAME, extra="hf")
    try:
        named = {**_given(library, given), **options}
        made = copy.deepcopy(model.generation_config)
        _drop_unread(made, named)
        if unknown := made.update(**named):
            known = vars(library.GenerationConfig())
            do = "; ".join(f"{name}: {nearest(name, known)}" for name in unknown)
            raise ConfigError([Problem(f"{NAME}: GenerationConfig has no {', '.join(unknown)}", str(unknown), do)])
        if made.max_new_tokens is None and made.max_length is None:
            made.max_new_tokens = LENGTH
        _complete(made, model, tokenizer, named)
        made.validate(strict=True)
    except (ValueError, TypeError, OSError) as error:
        received = str({**options, **({} if given is None else {"config": given})})
        raise ConfigError([Problem(f"{NAME}: transformers refuses the options: {error}", received)]) from error
    return made


def _given(library: Any, given: Any) -> dict[str, Any]:
    """Return what a file, a folder or a table sets."""
    if given is None or isinstance(given, dict):
        return given or {}
    path = Path(given).expanduser()
    if not path.exists():
        raise ValueError(f"config: there is no file or folder {str(given)!r}")
    folder, name = (path, None) if path.is_dir() else (path.parent, path.name)
    values: dict[str, Any] = library.GenerationConfig.from_pretrained(folder, name).to_diff_dict()
    return {name: value for name, value in values.items() if name != "transformers_version"}


def _drop_unread(own: Any, named: Mapping[str, Any]) -> None:
    """Take out the model's own fields that the named ones make meaningless: the library would refuse them."""
    unread: tuple[str, ...] = () if named.get("do_sample", own.do_sample) else SAMPLING
    if (named.get("num_beams", own.num_beams) or 1) == 1:
        unread += BEAMS
    if "max_new_tokens" in named:
        unread += ("max_length",)
    for name in unread:
        setattr(own, name, None)


def _complete(made: Any, model: Any, tokenizer: Any, named: Mapping[str, Any]) -> None:
    """Set what a text a row needs: special tokens, the cache (training may go without), plain outputs."""
    if (made.num_return_sequences or 1) != 1:
        raise ValueError(f"a row gets one text. Received: num_return_sequences={made.num_return_sequences}")
    made.return_dict_in_generate = False
    if "use_cache" not in named:
        made.use_cache = True
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        if getattr(made, name) is None:
            config = getattr(model, "config", None)
            setattr(made, name, getattr(config, name, None) if tokenizer is None else getattr(tokenizer, name, None))
    if made.pad_token_id is None and made.eos_token_id is not None:
        ends = made.eos_token_id
        made.pad_token_id = ends[0] if isinstance(ends, list) else ends


@attrs.define
class Task:
    """Rows to make text for: the arguments of `model.generate`, and token ids for people."""

    inputs: dict[str, Any]  # tensors (N, ...)
    prompts: list[list[int]]  # token ids; empty where the input is no text
    references: list[list[int]]
    width: int = 0  # how many tokens of what is generated were given

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.references)


def labels_of(batch: Any) -> torch.Tensor:
    """Return a batch's labels (B, L), where there is a row for each text.

    Raises:
        TrainingError: the batch is another.
    """
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2:  # noqa: PLR2004 - rows of tokens
        got = {n: tuple(getattr(v, "shape", ())) for n, v in batch.items()} if hasattr(batch, "items") else batch
        raise TrainingError(f"{NAME} needs batches with 'labels' (B, L), which are token ids. Received: {got!r:.300}")
    if any(name in batch for name in PACKED):
        raise TrainingError(
            f"{NAME} needs a row of the batch for each text, and these are packed. Received: {sorted(batch)}. "
            "Evaluate with a collator that pads"
        )
    return labels


def sequence_to_sequence(batch: Any, chosen: list[int]) -> Task:
    """Return those of the chosen rows that have a target: all inputs, and the labels as references."""
    labels = labels_of(batch)
    picked = torch.tensor(chosen, device=labels.device)
    picked = picked[(labels[picked] != IGNORE_INDEX).any(1)]
    inputs = {n: v[picked] for n, v in batch.items() if n not in NO_INPUTS and isinstance(v, torch.Tensor)}
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    prompts: list[list[int]] = [[] for _ in picked]
    if ids is not None and not ids.is_floating_point():
        prompts = [row[mask[n] != 0].tolist() if mask is not None else row.tolist() for n, row in enumerate(ids)]
    return Task(inputs, prompts, [row[row != IGNORE_INDEX].tolist() for row in labels[picked]])


def continuation(batch: Any, chosen: list[int], prompt_tokens: int | None, pad: int) -> Task:
    """Return those of the chosen rows that have something to continue with, their prompts padded on the left.

    Args:
        batch: input_ids, labels and perhaps attention_mask, all (B, L).
        chosen: the rows' places in the batch.
        prompt_tokens: how many tokens the prompt has; None: all before the first label.
        pad: the token id to pad with.

    Raises:
        DataError: a row is labelled from its first token on, and nothing says how long the prompt is.
        TrainingError: the batch is another.
    """
    labels, ids = labels_of(batch), batch["input_ids"]
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
    if mask.shape != ids.shape or labels.shape != ids.shape:
        shapes = {"input_ids": ids.shape, "labels": labels.shape, "attention_mask": mask.shape}
        raise TrainingError(
            f"{NAME}: for a causal model, input_ids, labels and attention_mask are (B, L). "
            f"Received: { {name: tuple(shape) for name, shape in shapes.items()} }"
        )
    prompts: list[list[int]] = []
    references: list[list[int]] = []
    rows = (each[chosen].tolist() for each in (ids, labels, mask))
    for row, labelled, there in zip(*rows, strict=True):
        tokens = [pair for pair, kept in zip(zip(row, labelled, strict=True), there, strict=True) if kept]
        first = next((place for place, (_, label) in enumerate(tokens) if label != IGNORE_INDEX), len(tokens))
        cut = first if prompt_tokens is None else prompt_tokens
        if cut >= len(tokens) or first == len(tokens):
            continue
        if cut == 0:
            raise DataError(
                f"{NAME}: a row has no prompt: its labels begin with its first token. Received: {row[:12]}. "
                "Set prompt_tokens, or take a collator that labels answers only, such as completion-only"
            )
        prompts.append([token for token, _ in tokens[:cut]])
        if prompt_tokens is None:
            references.append([label for _, label in tokens[cut:] if label != IGNORE_INDEX])
        else:
            references.append([token for token, _ in tokens[cut:]])
    width = max(map(len, prompts), default=0)
    padded = [[pad] * (width - len(row)) + row for row in prompts]
    seen = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    made = {
        "input_ids": torch.tensor(padded, device=ids.device),
        "attention_mask": torch.tensor(seen, device=ids.device),
    }
    return Task(made, prompts, references, width)


def new_tokens(model: Any, task: Task, config: Any) -> list[list[int]]:
    """Return what the model makes for each row, up to its end-of-text token, without the prompt and the start token."""
    inner = unwrapped(model)
    own, inner.generation_config = inner.generation_config, config  # or the library would fill in what was taken out
    try:
        made = model.generate(**task.inputs, generation_config=config)[:, task.width :].tolist()
    finally:
        inner.generation_config = own
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    start = None if task.width else config.decoder_start_token_id
    return [_between(row, start, ends, config.pad_token_id) for row in made]


def _between(row: list[int], start: int | None, ends: list[int | None], pad: int | None) -> list[int]:
    kept = row[1:] if row and row[0] == start else row
    last = next((place for place, token in enumerate(kept) if token in ends), None)
    if last is not None:
        return kept[: last + 1]
    while kept and kept[-1] == pad:  # another row of the batch was longer
        kept = kept[:-1]
    return kept
