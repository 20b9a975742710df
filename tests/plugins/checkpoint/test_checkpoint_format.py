"""The codec of state trees: whatever a state_dict may hold comes back equal, bit for bit."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _format
from drivetrain_plugins.checkpoint._manifest import dump_json, parse_json
from drivetrain_plugins.checkpoint._saved import MAX_STATE_DEPTH, MAX_STATE_ENTRIES


def through_files(tree, model_at=()):
    """Return a tree after encoding, JSON text, safetensors bytes, and back."""
    made = _format.encode(tree, model_at)
    tensors = {}
    for file, group in made.tensors.items():
        content = bytearray(b"".join(bytes(piece) for piece in _format.in_pieces(_format.to_safetensors(group), 64)))
        tensors |= {f"{file}/{key}": tensor for key, tensor in _format.from_safetensors(content).items()}
    text = dump_json(made.tree)
    return _format.decode(parse_json(text, max_depth=MAX_STATE_DEPTH, max_entries=MAX_STATE_ENTRIES), tensors), made


def identical(a, b):
    """Compare types, bits of floats and of tensors, and the order of keys; knows nothing of the format."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        raw = [bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy()) for t in (a, b)]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and raw[0] == raw[1]
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        keys = len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
        return keys and all(identical(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return a == b


DTYPES = list(_format.DTYPES)


@st.composite
def tensors(draw):
    """Draw a tensor of any supported type, with any bits, 0-dim, empty or not contiguous."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        raw = bytes(b & 1 for b in raw)
    made = torch.frombuffer(bytearray(raw), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    made = made.reshape(shape).clone()
    return made.mT if made.ndim > 1 and draw(st.booleans()) else made


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=8),
    st.sampled_from(["$tensor", "$tuple", "", "\ud800", "0x1"]),
)  # fmt: skip
keys = st.one_of(st.text(max_size=6), st.integers(), st.sampled_from(["$tensor", "$dict", "$int"]), st.booleans())
trees = st.recursive(
    scalars | tensors(),
    lambda inside: st.one_of(
        st.lists(inside, max_size=4),
        st.lists(inside, max_size=4).map(tuple),
        st.dictionaries(keys, inside, max_size=4),
    ),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None)
@given(trees)
def test_any_tree_comes_back(tree):
    """Nested dicts, lists and tuples of tensors, floats (NaN, infinities, -0.0), big integers and odd texts survive."""
    assert identical(through_files(tree)[0], tree)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=10), tensors(), max_size=6))
def test_the_bytes_are_safetensors(named):
    """The reference parser reads what is written, whatever the names."""
    made = _format.encode({"model": named}, ("model",)).tensors["model"]
    read = load_safetensors(b"".join(bytes(piece) for piece in _format.to_safetensors(made)))
    assert read.keys() == made.keys()
    assert all(identical(read[k], made[k].contiguous()) for k in read)


def test_one_storage_is_stored_once():
    """Tied tensors are stored once, are listed as aliases, and are one tensor again; equal values are not tied."""
    weight = torch.randn(3, 2)
    tree = {"model": {"a": weight, "b": weight, "c": weight.clone(), "d": weight.T, "e": weight[:1]}}
    back, made = through_files(tree, ("model",))
    assert made.aliases == {"b": "a"}
    assert list(made.tensors["model"]) == ["a", "c", "d", "e"]
    model = back["model"]
    assert model["a"].data_ptr() == model["b"].data_ptr() != model["c"].data_ptr()
    assert identical(model, tree["model"])


def test_names_that_collide_or_are_odd():
    """Names that differ only in characters a key cannot have, and the parser's reserved name, are kept apart."""
    named = {name: torch.tensor(i) for i, name in enumerate(["a b", "a_b", "a/b", "__metadata__", "", "x" * 400])}
    assert identical(through_files({"model": named}, ("model",))[0]["model"], named)


def test_numpy_numbers_become_plain():
    """A numpy number, which metrics tend to be, is restored as the Python number with the same value."""
    back, _ = through_files({"a": np.float64(0.1), "b": np.int32(7), "c": np.bool_(1)})
    assert identical(back, {"a": 0.1, "b": 7, "c": True})


@pytest.mark.parametrize(
    "value", [{1, 2}, b"bytes", object(), torch.ones(2).to_sparse(), torch.empty(2, device="meta"), np.ones(3)]
)
def test_what_cannot_be_restored_is_refused(value):
    """A value that would not come back is refused when saving, with its place."""
    with pytest.raises(CheckpointError, match="plugins/mine/x cannot be saved"):
        _format.encode({"plugins": {"mine": {"x": value}}})


def test_endless_state_is_refused():
    """A state that contains itself is refused."""
    loop: list = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="nested more than 48 deep"):
        _format.encode(loop)


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": "state/none"}, {"$tensor": 3}, {"$tuple": {}}, {"$float": "1.0"}, {"$int": "12"}, {"$dict": [[1]]},
        {"$unknown": 1}, {"$tuple": [], "more": 1}, {"$dict": [[[], 1]]},
    ],
)  # fmt: skip
def test_marks_nobody_writes_are_refused(tree):
    """JSON that `encode` cannot have written is refused."""
    with pytest.raises((ValueError, TypeError)):
        _format.decode(tree, {})


def test_tensors_left_over_are_refused():
    """A stored tensor that the state does not refer to is an error, not ignored."""
    with pytest.raises(ValueError, match="does not refer to"):
        _format.decode({"a": 1}, {"state/extra": torch.ones(1)})
