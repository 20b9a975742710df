"""The kinds of rows that the kit has: what sources read and collators take, small and deterministic."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

TOPICS = (
    ("river", "stone", "cloud", "meadow", "frost", "pine", "valley", "thunder"),
    ("engine", "wheel", "piston", "gearbox", "torque", "brake", "axle", "clutch"),
    ("melody", "chord", "violin", "rhythm", "tempo", "octave", "quartet", "ballad"),
)
GLUE = ("the", "a", "of", "and", "near", "with", "old", "new")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLASSES = 3


def vocabulary_ids() -> dict[str, int]:
    """Return the kit's vocabulary."""
    return {word: index for index, word in enumerate([*SPECIAL, *GLUE, *(w for topic in TOPICS for w in topic)])}


def _sentence(number: int, words: int | None, salt: str = "") -> list[str]:
    length = words or 4 + number * 7 % 9
    picks = [zlib.crc32(f"{number}/{salt}{position}".encode()) for position in range(length)]
    return [(TOPICS[number * 5 % 3] if pick % 3 else GLUE)[pick // 7 % 8] for pick in picks]


def _ids(words: list[str]) -> list[int]:
    vocabulary = vocabulary_ids()
    return [vocabulary["[CLS]"], *(vocabulary[word] for word in words), vocabulary["[SEP]"]]


def text_rows(count: int, start: int = 0, words: int | None = None) -> list[dict[str, Any]]:
    """Return rows {"text", "label"} of three topics, 4 to 12 words long, or of exactly `words`."""
    numbers = range(start, start + count)
    return [{"text": " ".join(_sentence(number, words)), "label": number * 5 % 3} for number in numbers]


def token_rows(count: int, start: int = 0, words: int | None = None) -> list[dict[str, Any]]:
    """Return rows {"input_ids", "labels"} as the kit's tokenizer makes them of `text_rows`; tensors if equally long."""
    rows = []
    for number in range(start, start + count):
        ids = _ids(_sentence(number, words))
        rows.append({"input_ids": ids if words is None else torch.tensor(ids), "labels": number * 5 % 3})
    return rows


def tensor_rows(count: int, start: int = 0) -> dict[str, torch.Tensor]:
    """Return columns "x" (N, 8) float32, three clusters, and "labels" (N,) int64."""
    draws = torch.Generator().manual_seed(100 + start)
    labels = torch.arange(start, start + count) * 5 % 3
    centres = torch.randn(3, 8, generator=draws)
    return {"x": centres[labels] + 0.5 * torch.randn(count, 8, generator=draws), "labels": labels}


def lines(number: int, words: int | None) -> dict[str, Any]:
    """Return {"text"}: a sentence without a label."""
    return {"text": " ".join(_sentence(number, words))}


def sequences(number: int, words: int | None) -> dict[str, Any]:
    """Return {"input_ids"}: a sentence without a label."""
    return {"input_ids": _ids(_sentence(number, words))}


def copies(number: int, words: int | None) -> dict[str, Any]:
    """Return {"input_ids", "labels"}: a sentence, and the same as the labels of its tokens."""
    return {**(row := sequences(number, words)), "labels": row["input_ids"]}


def tagged(number: int, words: int | None) -> dict[str, Any]:
    """Return {"input_ids", "labels"}: a class for each token, -100 for the special ones."""
    sentence = _sentence(number, words)
    return {"input_ids": _ids(sentence), "labels": [-100, *(len(word) % CLASSES for word in sentence), -100]}


def words_and_tags(number: int, words: int | None) -> dict[str, Any]:
    """Return {"words", "tags"}: words and a class for each."""
    sentence = _sentence(number, words)
    return {"words": sentence, "tags": [len(word) % CLASSES for word in sentence]}


def pairs(number: int, words: int | None) -> dict[str, Any]:
    """Return {"input_ids", "labels"}: a sentence, and its words backwards without the first."""
    sentence = _sentence(number, words)
    return {"input_ids": _ids(sentence), "labels": _ids(sentence[:0:-1])}


def text_pairs(number: int, words: int | None) -> dict[str, Any]:
    """Return {"text", "target"}: a sentence, and its words backwards without the first."""
    sentence = _sentence(number, words)
    return {"text": " ".join(sentence), "target": " ".join(sentence[:0:-1])}


def choices(number: int, words: int | None) -> dict[str, Any]:
    """Return {"input_ids", "labels"}: three endings of a sentence, and which is of its topic."""
    made = [_ids([*_sentence(number, words)[:4], TOPICS[topic][number % 8]]) for topic in range(3)]
    return {"input_ids": made, "labels": number * 5 % 3}


def preferences(number: int, words: int | None) -> dict[str, Any]:
    """Return {"prompt_input_ids", "chosen_input_ids", "rejected_input_ids"}."""
    first, last = _ids(_sentence(number, words, "first"))[1:], _ids(_sentence(number + 1, words, "last"))[1:]
    return {"prompt_input_ids": _ids(_sentence(number, 3))[:-1], "chosen_input_ids": first, "rejected_input_ids": last}


def completions(number: int, words: int | None) -> dict[str, Any]:
    """Return {"input_ids", "completion_mask"}: the second half of a sentence is the completion."""
    ids = _ids(_sentence(number, words))
    return {"input_ids": ids, "completion_mask": [int(2 * place >= len(ids)) for place in range(len(ids))]}


def messages(number: int, words: int | None) -> dict[str, Any]:
    """Return {"messages"}: a question and an answer."""
    sentence = _sentence(number, words)
    return {
        "messages": [
            {"role": "user", "content": " ".join(sentence[:2])},
            {"role": "assistant", "content": " ".join(sentence[2:])},
        ]
    }


def sentences(number: int, words: int | None) -> dict[str, Any]:
    """Return {"sentences"}: three sentences of one document, without special tokens."""
    return {"sentences": [_ids(_sentence(number, words, str(part)))[1:-1] for part in range(3)]}


def images(number: int, words: int | None) -> dict[str, Any]:  # noqa: ARG001 - a picture has none
    """Return {"image", "label"}: an 8x8 grey picture whose brighter third is its class, values 0 to 255."""
    label = number * 5 % 3
    lines = [
        [zlib.crc32(f"{number}/{y}/{x}".encode()) % 100 + 150 * (x // 3 == label) for x in range(8)] for y in range(8)
    ]
    return {"image": lines, "label": label}


def targets(number: int, words: int | None) -> dict[str, Any]:
    """Return {"input_ids", "labels"}: a sentence, and a number for each of three outputs."""
    ids = _ids(_sentence(number, words))
    return {"input_ids": ids, "labels": [len(ids) / 8, (number % 7) / 7, float(number % 2)]}


def flags(number: int, words: int | None) -> dict[str, Any]:
    """Return {"input_ids", "labels"}: a sentence, and three labels that are 0.0 or 1.0."""
    sentence = _sentence(number, words)
    held = [float(any(word in topic for word in sentence)) for topic in (TOPICS[0], TOPICS[1], GLUE)]
    return {"input_ids": _ids(sentence), "labels": held}


def written(labelled: Callable[[int, int | None], dict[str, Any]]) -> Callable[[int, int | None], dict[str, Any]]:
    """Return the rows of `labelled` as {"text", "labels"}."""
    return lambda number, words: {**lines(number, words), "labels": labelled(number, words)["labels"]}


ROWS: dict[str, Callable[[int, int | None], dict[str, Any]]] = {
    "lines": lines, "sequences": sequences, "copies": copies, "tagged": tagged, "words": words_and_tags, "pairs": pairs,
    "text-pairs": text_pairs, "choices": choices, "preferences": preferences, "completions": completions,
    "messages": messages, "sentences": sentences, "images": images, "targets": targets, "flags": flags,
    "text-targets": written(targets), "text-flags": written(flags),
}  # fmt: skip
KINDS = ("tensors", "text", "tokens", *ROWS)
# What a tokenizer makes the first kind of.
WRITTEN = {
    "tokens": "text", "sequences": "lines", "copies": "lines", "tagged": "words", "pairs": "text-pairs",
    "targets": "text-targets", "flags": "text-flags",
}  # fmt: skip


def kit_rows(kind: str, count: int, start: int = 0, words: int | None = None) -> Any:
    """Return `count` rows of a kind; "tensors" are columns.

    Args:
        kind: one of `KINDS`.
        count: how many.
        start: the number of the first; another start gives other rows.
        words: make all sentences so long, for who cannot pad.
    """
    if kind == "tensors":
        return tensor_rows(count, start)
    if kind in ("text", "tokens"):
        return (text_rows if kind == "text" else token_rows)(count, start, words)
    rows = [ROWS[kind](number, words) for number in range(start, start + count)]
    if words is not None and kind in ("targets", "flags", "copies"):
        return [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
    return rows
