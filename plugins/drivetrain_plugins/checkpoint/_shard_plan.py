"""The index of a sharded checkpoint (`shards.json`): which part holds which chunk of which tensor.

    {"model/embed.weight": {"shape": [5, 4], "dtype": "F32", "chunks": [
        {"file": "part-00000.safetensors", "key": "model/embed.weight:0,0", "offsets": [0, 0], "sizes": [3, 4]},
        {"file": "part-00001.safetensors", "key": "model/embed.weight:3,0", "offsets": [3, 0], "sizes": [2, 4]}]}}

It is read as if a stranger had written it: the chunks of a tensor cover it exactly, and no tensor is larger than the
files that hold it.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain_plugins.checkpoint import _manifest
from drivetrain_plugins.checkpoint._format import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes

MAX_DIMS = 64  # of a tensor, as in torch
_NAMES = {name: dtype for dtype, name in DTYPES.items()}
_REFERENCE = re.compile(r"(model|state)/[A-Za-z0-9_.-]{1,1000}")
_KEY = re.compile(r"(model|state)/[A-Za-z0-9_.:,-]{1,2000}")


def part_name(number: int) -> str:
    """Return the name of the file that rank `number` writes."""
    return f"part-{number:05d}.safetensors"


@attrs.frozen
class Chunk:
    """A rectangular piece of a tensor, and where it is stored."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@attrs.frozen
class Stored:
    """A tensor of a sharded checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


Index = dict[str, Stored]  # by reference, such as "model/embed.weight"


def key_of(reference: str, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> str:
    """Return the name of a chunk in its file."""
    return reference if tuple(sizes) == tuple(shape) else f"{reference}:{','.join(map(str, offsets))}"


def as_json(index: Index) -> dict[str, Any]:
    """Return the content of `shards.json`."""
    return {
        reference: {
            "shape": list(stored.shape),
            "dtype": DTYPES[stored.dtype],
            "chunks": [
                {"file": c.file, "key": c.key, "offsets": list(c.offsets), "sizes": list(c.sizes)}
                for c in stored.chunks
            ],
        }
        for reference, stored in index.items()
    }


def by_file(index: Index) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Return what each part holds: dtype and shape by key."""
    files: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for stored in index.values():
        for chunk in stored.chunks:
            files.setdefault(chunk.file, {})[chunk.key] = stored.dtype, chunk.sizes
    return files


def check_index(content: Any, sizes: Mapping[str, int]) -> Index:
    """Return the index that `content`, the value of `shards.json`, describes; nothing is allocated for it.

    Args:
        content: what a strict JSON parser returned.
        sizes: the parts there are, with their sizes in bytes.

    Raises:
        ValueError: chunks overlap or are missing, or are not where and what they can be; the tensor is named.
    """
    if type(content) is not dict:
        raise ValueError(f"expected an object with a tensor a key, found {str(content)[:80]}")
    index: Index = {}
    keys: set[tuple[str, str]] = set()
    held = dict.fromkeys(sizes, 0)
    for reference, about in content.items():
        if not _REFERENCE.fullmatch(reference):
            raise ValueError(f"expected names like 'model/NAME' and 'state/NAME', found {reference[:80]!r}")
        try:
            stored = index[reference] = _stored(about)
            _check_cover(stored.shape, [(c.offsets, c.sizes) for c in stored.chunks])
        except ValueError as error:
            raise ValueError(f"{reference}: {error}") from None
        for chunk in stored.chunks:
            if chunk.file not in held:
                raise ValueError(f"{reference}: {chunk.file} is not among the parts that the checkpoint has")
            if (chunk.file, chunk.key) in keys:
                raise ValueError(f"{reference}: {chunk.file} holds {chunk.key!r} for another chunk already")
            keys.add((chunk.file, chunk.key))
            held[chunk.file] += num_bytes(chunk.sizes, stored.dtype)
            if held[chunk.file] > sizes[chunk.file]:
                raise ValueError(
                    f"{reference}: {chunk.file} is {sizes[chunk.file]} bytes long, which is less than the chunks in it"
                )
    return index


def num_bytes(sizes: Iterable[int], dtype: torch.dtype) -> int:
    """Return how long a chunk of these sizes is."""
    return math.prod(sizes) * dtype.itemsize


def _stored(about: Any) -> Stored:
    if not isinstance(about, dict) or about.keys() != {"shape", "dtype", "chunks"}:
        raise ValueError(f"expected shape, dtype and chunks, found {str(about)[:80]}")
    dtype, chunks = about["dtype"], about["chunks"]
    if type(dtype) is not str or dtype not in _NAMES:
        raise ValueError(f"expected a dtype among {sorted(_NAMES)}, found {str(dtype)[:80]!r}")
    shape = _whole_numbers(about["shape"], "shape")
    if num_bytes((max(n, 1) for n in shape), _NAMES[dtype]) >= 2**63:
        raise ValueError(f"expected a shape that memory can hold, found {list(shape)}")
    if type(chunks) is not list:
        raise ValueError(f"expected a list of chunks, found {str(chunks)[:80]}")
    return Stored(shape, _NAMES[dtype], tuple(_chunk(c, shape) for c in chunks))


def _whole_numbers(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMS or any(type(n) is not int or n < 0 for n in value):
        raise ValueError(f"expected {what}: up to {MAX_DIMS} numbers that are not negative, found {str(value)[:80]}")
    return tuple(value)


def _chunk(about: Any, shape: tuple[int, ...]) -> Chunk:
    if not isinstance(about, dict) or about.keys() != {"file", "key", "offsets", "sizes"}:
        raise ValueError(f"expected file, key, offsets and sizes of a chunk, found {str(about)[:80]}")
    file, key = about["file"], about["key"]
    if type(file) is not str or not _manifest.PART.fullmatch(file):
        raise ValueError(f"expected a file like {part_name(0)!r}, found {str(file)[:80]!r}")
    if type(key) is not str or not _KEY.fullmatch(key):
        raise ValueError(f"expected a key like 'model/NAME:0,0', found {str(key)[:80]!r}")
    offsets, sizes = _whole_numbers(about["offsets"], "offsets"), _whole_numbers(about["sizes"], "sizes")
    if not len(offsets) == len(sizes) == len(shape):
        raise ValueError(f"expected chunks of {len(shape)} dimensions, found {list(offsets)} and {list(sizes)}")
    if any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(f"the chunk at {list(offsets)} of sizes {list(sizes)} goes beyond the shape {list(shape)}")
    if not math.prod(sizes):
        raise ValueError(f"the chunk at {list(offsets)} of sizes {list(sizes)} is empty")
    return Chunk(file, key, offsets, sizes)


def _check_cover(shape: tuple[int, ...], boxes: list[Box]) -> None:
    """Find out whether boxes, none of which goes beyond the shape, cover it, each element once.

    Raises:
        ValueError: they do not.
    """
    whole, covered = math.prod(shape), sum(math.prod(sizes) for _, sizes in boxes)
    if covered < whole:
        raise ValueError(f"chunks are missing: they hold {covered} of {whole} elements")
    spans = [tuple((o, o + s) for o, s in zip(offsets, sizes, strict=True)) for offsets, sizes in boxes]
    if not _apart(spans, 2 * len(shape) + 2):
        raise ValueError("chunks overlap, or lie as shards of shards never do")


def _apart(boxes: list[tuple[tuple[int, int], ...]], depth: int) -> bool:
    """Tell whether no two boxes, by start and end along each dimension, overlap: cut where none is cut, and again.

    Shards of shards always have such cuts, and few levels of them; the limit bounds the work for anything else.
    """
    if len(boxes) < 2:  # noqa: PLR2004 - one cannot overlap
        return True
    for dim in range(len(boxes[0])):
        groups: list[list[tuple[tuple[int, int], ...]]] = []
        end = 0
        for box in sorted(boxes, key=lambda b: b[dim]):
            start, stop = box[dim]
            if start >= end:
                groups.append([])
            groups[-1].append(box)
            end = max(end, stop)
        if len(groups) > 1:
            return depth > 0 and all(_apart(group, depth - 1) for group in groups)
    return False
