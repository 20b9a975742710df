"""The manifest is read as if a stranger had written it: only ValueError with a reason escapes."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain_plugins.checkpoint import _manifest

FILE = {"size": 3, "sha256": "0" * 64}
GOOD = {
    "kind": "run",
    "step": 4,
    "position": {"step": 4, "applied": 4, "epoch": 0},
    "aliases": {"b": "a"},
    "plugins": {},
    "states": {"ema": 1},
    "metrics": {"evaluate/loss": 0.5},
    "milestone": False,
    "settings": {"seed": 1},
    "world_size": 1,
    "environment": {},
    "files": dict.fromkeys(_manifest.FULL, FILE),
}


def sealed(change=None, **fields):
    """Return the bytes of a manifest with a right digest, whatever else is wrong with it."""
    content = {"magic": _manifest.MAGIC, "schema": _manifest.SCHEMA, **copy.deepcopy(GOOD), **fields}
    if change:
        change(content)
    digest = hashlib.sha256(_manifest.dump_json(content)).hexdigest()
    return _manifest.dump_json({**content, "sha256": digest}, indent=1)


def test_what_is_written_is_read():
    """A sealed manifest is accepted and has the fields that went in."""
    assert _manifest.seal(GOOD) == sealed()
    assert {k: v for k, v in _manifest.parse(sealed()).items() if k in GOOD} == GOOD


WRONG = {
    "magic": ({"magic": "other"}, "expected an object with magic"),
    "later": ({"schema": 3}, "expected a schema up to 2, found 3; a later version"),
    "earlier than the first": ({"schema": 0}, "expected a schema up to 2, found 0"),
    "schema of another type": ({"schema": True}, "expected a schema up to 2"),
    "fields of another schema": ({"schema": 1}, "expected the fields"),
    "unknown kind": ({"kind": "all"}, "expected a kind"),
    "version of a state": ({"states": {"ema": 0}}, "expected versions"),
    "version that is no number": ({"states": {"ema": "1"}}, "expected versions"),
    "parts without shards": ({"files": {"state.json": FILE, "part-00000.safetensors": FILE}}, "expected the files"),
    "shards without parts": ({"files": {"state.json": FILE, "shards.json": FILE}}, "expected the files"),
    "unknown field": ({"more": 1}, "expected the fields"),
    "step is a float": ({"step": 4.0}, "'step' to be of type int"),
    "step is a bool": ({"step": True}, "'step' to be of type int"),
    "plugins is a list": ({"plugins": []}, "'plugins' to be of type dict"),
    "negative": ({"step": -1, "position": {"step": -1}}, "not negative"),
    "two steps": ({"position": {"step": 5}}, "position at step 4"),
    "applied beyond": ({"position": {"step": 4, "applied": 9}}, "position at step 4"),
    "no ranks": ({"world_size": 0}, "not negative"),
    "no file": ({"files": {}}, "expected the files"),
    **{
        f"file {name!r}": ({"files": {**GOOD["files"], name: FILE}}, "plain file names|expected the files")
        for name in ["../x", "/etc/passwd", "C:\\x", "a/b", "", "x" * 300, ".hidden", "..", "a\n", "other.bin"]
    },
    "file without size": ({"files": {**GOOD["files"], "state.json": {"sha256": "0" * 64}}}, "size and sha256"),
    "negative size": ({"files": {**GOOD["files"], "state.json": {**FILE, "size": -1}}}, "size and sha256"),
    "bad digest": ({"files": {**GOOD["files"], "state.json": {**FILE, "sha256": "../../x"}}}, "expected the sha256"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_is_refused(case):
    """Each wrong field of a manifest with a right digest is refused, with what was expected and found."""
    fields, reason = WRONG[case]
    with pytest.raises(ValueError, match=reason):
        _manifest.parse(sealed(**fields))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "Expecting value"),
        (b"not json", "Expecting value"),
        (b"[]", "expected an object"),
        (b"\xef\xbb\xbf{}", "ascii"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "beyond a 64-bit float"),
        (b'{"a": 9223372036854775808}', "beyond 64 bits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "beyond 64 bits"),
        (b"[" * 100_000, "deep"),
        (b"[" * 40 + b"]" * 40, "deep"),
        (b"[" + b"0," * 100_001 + b"0]", "entries"),
        (sealed()[:-2], "delimiter"),
        (sealed() + b" ", "sha256"),
        (sealed().replace(b'"seed": 1', b'"seed": 2'), "sha256"),
    ],
    ids=lambda value: value[:12].decode("latin1") if isinstance(value, bytes) else "",
)
def test_hostile_text_is_refused(raw, reason):
    """Text that is no strict JSON, too deep, too large or changed is refused with a ValueError."""
    with pytest.raises(ValueError, match=reason):
        _manifest.parse(raw)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_only_value_errors_escape(data):
    """Any value in any field, at any depth, is accepted or refused with a ValueError; nothing else escapes."""
    content = {"magic": _manifest.MAGIC, "schema": _manifest.SCHEMA, **copy.deepcopy(GOOD)}
    field = data.draw(st.sampled_from(sorted(content)))
    inside = content[field]
    if isinstance(inside, dict) and inside and data.draw(st.booleans()):
        inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(values)
    else:
        content[field] = data.draw(values)
    body = _manifest.dump_json(content)
    raw = _manifest.dump_json({**content, "sha256": hashlib.sha256(body).hexdigest()}, indent=1)
    try:
        parsed = _manifest.parse(raw)
    except ValueError:
        return
    assert json.loads(raw) == parsed
