"""A state tree as JSON and safetensors, both ways, bit for bit.

JSON has no tuples, no tensors, no NaN and only text keys. So an object whose single key starts with "$" stands for
one of these, and a dictionary with such keys, or with keys that are no text, is a list of pairs:

    {"$tensor": "state/optimizer.0.step"}   a tensor, by file and key
    {"$tuple": [0.9, 0.999]}                {"$float": "nan"}   {"$int": "0x1ffffffffffffffffff"}
    {"$dict": [[3, "value of key 3"]]}

A tensor that the tree holds several times (tied weights) is stored once, and is one tensor again after decoding.
"""

from __future__ import annotations

import json
import math
import re
import sys
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from safetensors.torch import load as parse_safetensors
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from drivetrain import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

MAX_DEPTH = 48  # of a state tree
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_HEX = re.compile(r"-?0x[0-9a-f]{1,4096}")
MODEL, STATE = "model", "state"


@attrs.define
class Encoded:
    """A tree as JSON values, and the tensors it refers to by file and key."""

    tree: Any = None
    tensors: dict[str, dict[str, torch.Tensor]] = attrs.field(factory=lambda: {MODEL: {}, STATE: {}})
    aliases: dict[str, str] = attrs.field(factory=dict)  # name in the model -> name under which it is stored


def encode(tree: Any, model_at: tuple[str, ...] = ()) -> Encoded:
    """Return `tree` as JSON values and tensors; those under `model_at` go to the model's file.

    Raises:
        CheckpointError: a value is of a type that cannot be restored; its place in the tree is named.
    """
    made = Encoded()
    made.tree = _Encoder(made, model_at).value(tree, ())
    return made


@attrs.define
class _Encoder:
    made: Encoded
    model_at: tuple[str, ...]
    _places: dict[Any, tuple[str, str]] = attrs.field(factory=dict)  # identity of a tensor -> reference, name

    def value(self, value: Any, path: tuple[str, ...]) -> Any:  # noqa: PLR0911 - one line a type
        if len(path) > MAX_DEPTH:
            raise CheckpointError(f"the state is nested more than {MAX_DEPTH} deep at {'/'.join(path[:6])}/...")
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._tensor(value, path)}
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**63 else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is list:
            return [self.value(v, (*path, str(i))) for i, v in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [self.value(v, (*path, str(i))) for i, v in enumerate(value)]}
        if isinstance(value, dict):
            return self._dict(value, path)
        if isinstance(value, np.generic) and type(value.item()) in (bool, int, float, str):
            return self.value(value.item(), path)
        raise CheckpointError(
            f"{'/'.join(path)} cannot be saved. Received: {kind.__module__}.{kind.__qualname__}. A state_dict() holds "
            "dicts, lists, tuples, tensors, text, numbers, booleans and None"
        )

    def _dict(self, value: dict[Any, Any], path: tuple[str, ...]) -> Any:
        if all(type(k) is str and not k.startswith("$") for k in value):
            return {k: self.value(v, (*path, k)) for k, v in value.items()}
        return {"$dict": [[self.value(k, (*path, "key")), self.value(v, (*path, str(k)))] for k, v in value.items()]}

    def _tensor(self, tensor: torch.Tensor, path: tuple[str, ...]) -> str:
        local = local_part(tensor)
        plain = local.layout is torch.strided and not local.is_meta and not local.is_quantized
        if not plain or tensor.dtype not in DTYPES or is_traceable_wrapper_subclass(local):
            raise CheckpointError(
                f"the tensor {'/'.join(path)} cannot be saved. "
                f"Received: {type(tensor).__name__} {tensor.dtype} {tensor.layout} on {tensor.device}"
            )
        in_model = path[: len(self.model_at)] == self.model_at
        name = ".".join(path[len(self.model_at) :] if in_model else path)
        view = (tensor.dtype, tuple(tensor.shape), local.stride(), local.is_conj(), local.is_neg())
        identity = (local.device, local.data_ptr(), *view)
        if local.numel() and identity in self._places:
            reference, stored = self._places[identity]
            if in_model:
                self.made.aliases[name] = stored
            return reference
        file = MODEL if in_model else STATE
        tensors = self.made.tensors[file]
        key = clean = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:256] or "tensor"
        number = 1
        while key in tensors or key == "__metadata__":
            key, number = f"{clean}-{number}", number + 1
        tensors[key] = tensor
        self._places[identity] = f"{file}/{key}", name
        return f"{file}/{key}"


def decode(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the tree that was encoded; `tensors` by reference, each of which must be used.

    Raises:
        ValueError: the JSON is not what `encode` writes, or tensors are missing or left over.
    """
    used: set[str] = set()
    decoded = _decode(tree, tensors, used)
    if left := sorted(tensors.keys() - used):
        raise ValueError(f"tensors that the state does not refer to: {left[:4]} ({len(left)})")
    return decoded


def _decode(value: Any, tensors: Mapping[str, torch.Tensor], used: set[str]) -> Any:  # noqa: C901, PLR0911 - one line a type
    if isinstance(value, list):
        return [_decode(v, tensors, used) for v in value]
    if not isinstance(value, dict):
        return value
    tag = next((k for k in value if k.startswith("$")), None)
    if tag is None:
        return {k: _decode(v, tensors, used) for k, v in value.items()}
    content = value[tag]
    if len(value) == 1:
        if tag == "$tensor" and isinstance(content, str):
            if content not in tensors:
                raise ValueError(f"the state refers to a tensor that is not stored: {content!r}")
            used.add(content)
            return tensors[content]
        if tag == "$tuple" and isinstance(content, list):
            return tuple(_decode(v, tensors, used) for v in content)
        if tag == "$float" and content in _FLOATS:
            return _FLOATS[content]
        if tag == "$int" and isinstance(content, str) and _HEX.fullmatch(content):
            return int(content, 16)
        if tag == "$dict" and isinstance(content, list) and all(isinstance(p, list) and len(p) == 2 for p in content):  # noqa: PLR2004 - a pair
            return {_decode(k, tensors, used): _decode(v, tensors, used) for k, v in content}
    raise ValueError(f"the state holds an unknown mark: {str(value)[:80]}")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor, without importing that module: where nobody has, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor.to_local() if module is not None and isinstance(tensor, module.DTensor) else tensor


def raw_bytes(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of a tensor's elements in order, without a copy where it is contiguous on the CPU."""
    flat = local_part(tensor).detach().to("cpu").resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def to_safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, tensor by tensor, so that the state is never held twice."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps elements aligned
    header, end = {}, 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            yield raw_bytes(tensors[name]).data


def from_safetensors(content: bytearray) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, each in memory of its own.

    Raises:
        SafetensorError: the header or its offsets are wrong.
    """
    tensors: dict[str, torch.Tensor] = parse_safetensors(bytes(content))
    for name, tensor in tensors.items():  # one at a time: as aligned as torch's own, and the parser's copy is freed
        tensors[name] = tensor.clone()
    return tensors


def in_pieces(chunks: Iterable[bytes | memoryview], size: int) -> Iterator[bytes | memoryview]:
    """Yield the bytes of `chunks` in pieces of `size`; only small chunks are copied."""
    pending = bytearray()
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while len(view):
            if not pending and len(view) >= size:
                yield view[:size]
                view = view[size:]
                continue
            taken = min(len(view), size - len(pending))
            pending += view[:taken]
            view = view[taken:]
            if len(pending) == size:
                yield bytes(pending)
                pending.clear()
    if pending:
        yield bytes(pending)


def first_difference(saved: Any, now: Any, path: str = "") -> str | None:
    """Return the place of the first tensor of `saved` that `now` does not hold bit for bit."""
    if isinstance(saved, dict):
        for key, value in saved.items():
            inside = now.get(key) if isinstance(now, dict) else None
            if (found := first_difference(value, inside, f"{path}/{key}")) is not None:
                return found
        return None
    if not isinstance(saved, torch.Tensor):
        return None
    same = isinstance(now, torch.Tensor) and (saved.dtype, saved.shape) == (now.dtype, now.shape)
    return None if same and np.array_equal(raw_bytes(saved), raw_bytes(now)) else path
