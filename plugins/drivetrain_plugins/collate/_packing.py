"""What the collators without padding share: token columns, and a check that no token sees another sample's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from drivetrain import ConfigError, DataError, Problem
from drivetrain_plugins.collate._padding import LABELS, column, fields
from drivetrain_plugins.shared.causal import attends_back, unwrapped
from drivetrain_plugins.shared.table import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain import Run

IGNORED = -100


def token_columns(rows: Sequence[Any], *, plugin: str) -> dict[str, Ragged]:
    """Return the fields that hold a number for each token; text is left out, and so is a mask of ones.

    Raises:
        DataError: there are no ids, a row has none or is padded, or a field is not per token (as a row's label).
    """
    found: dict[str, Ragged] = {}
    names = fields(rows, plugin=plugin)
    if "input_ids" not in names:
        raise DataError(f"{plugin}: a row must have 'input_ids'. Received: rows with {sorted(names)}")
    ids = column(rows, "input_ids", plugin=plugin)
    if not isinstance(ids, Ragged) or not len(ids) or ids.lengths.min() == 0:
        raise DataError(f"{plugin}: field 'input_ids' must be a list of ids, at least one. Received: {_start(ids)}")
    for name in names:
        values = ids if name == "input_ids" else column(rows, name, plugin=plugin)
        if not isinstance(values, (Ragged, np.ndarray)) and all(isinstance(v, (str, type(None))) for v in values):
            continue
        if not isinstance(values, Ragged) or not np.array_equal(values.lengths, ids.lengths):
            label = ": a label of the whole row cannot be packed with others" if name in LABELS else ""
            raise DataError(
                f"{plugin}: field {name!r} must have a number for each of the row's tokens{label}. "
                f"Received: {_start(values)}"
            )
        if name != "attention_mask":
            found["labels" if name in LABELS else name] = values
        elif not flat(values).all():
            raise DataError(f"{plugin}: the rows must not be padded. Received: an attention_mask with zeros")
    return found


def _start(values: Any) -> str:
    first = [values[number] for number in range(min(3, len(values)))]
    return repr([value.tolist() if hasattr(value, "tolist") else value for value in first])[:200]


def flat(lists: Ragged) -> np.ndarray[Any, Any]:
    """Return the values of all lists (T,)."""
    values: np.ndarray[Any, Any] = lists.values[int(lists.offsets[0]) : int(lists.offsets[-1])]
    return values


def positions(lengths: np.ndarray[Any, Any], start: int) -> np.ndarray[Any, Any]:
    """Return each token's position in its sample, int64 (T,), counted from `start`."""
    begins = np.cumsum(lengths) - lengths
    found: np.ndarray[Any, Any] = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(begins, lengths) + start
    return found


def extra_arguments(model: Any, *, positions_only: bool) -> dict[str, Any]:
    """Return what a batch must tell the model besides tensors.

    A transformers model that keeps a cache (its default, in training too) does not look where positions restart.
    """
    config = getattr(model, "config", None)
    return {"use_cache": False} if positions_only and attends_back(model) and hasattr(config, "use_cache") else {}


def check_attention(run: Run, collate: Callable[..., Any], *, plugin: str, do: str) -> None:
    """Try a transformers model on two small samples: the second must be as it is alone, whatever the first.

    Raises:
        ConfigError: tokens see other samples, positions are not those of a single row, or there is one output a row.
    """
    model = unwrapped(run.model)
    if not hasattr(model, "dummy_inputs") or not hasattr(model, "config"):
        return
    words, device = model.config.get_text_config().vocab_size, run.device
    first, other, second = ([i % words for i in ids] for ids in ([5, 6, 7, 8], [9, 5, 8, 6], [7, 9, 6]))

    def outputs(samples: list[list[int]] | None) -> torch.Tensor:
        batch: dict[str, Any] = {"input_ids": torch.tensor([second])}
        if samples is not None:
            rows = [{"input_ids": ids, "labels": ids} for ids in samples]
            batch = {name: value for name, value in collate(rows).items() if name != "labels"}
        moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        made: torch.Tensor = model(**moved)[0]
        return made.float()

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            alone, packed, changed = outputs(None), outputs([first, second]), outputs([other, second])
    except Exception as error:
        what = f"{plugin}: the model cannot be tried on packed rows"
        raise ConfigError([Problem(what, f"{type(error).__name__}: {error}", do)]) from error
    finally:
        for module in training:
            module.training = True
    received = f"{type(model).__name__}, attention {getattr(model.config, '_attn_implementation', 'unknown')!r}"
    if packed.shape[:2] != (1, 7):
        what = f"{plugin}: the model gives no output for each token, so rows cannot share a place"
        raise ConfigError([Problem(what, f"{received}, outputs {tuple(packed.shape)}", "take `pad`")])
    scale = alone.abs().max().item()
    if (packed - changed)[:, 4:].abs().max() > 1e-5 * scale:
        what = f"{plugin}: a token's output depends on the sample packed before its own"
        raise ConfigError([Problem(what, received, do)])
    # Several roundings of the model's own type, as the sums run in another order.
    if (packed[:, 4:] - alone).abs().max() > 1000 * torch.finfo(next(model.parameters()).dtype).eps * scale:
        what = f"{plugin}: a packed sample's outputs are not those of the sample alone"
        how = "give the position of a row's first token with `start` (2 for RoBERTa's kind), or `causal`"
        raise ConfigError([Problem(what, received, how)])
