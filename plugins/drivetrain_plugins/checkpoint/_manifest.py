"""The manifest: what a checkpoint holds and where it comes from, read as if a stranger had written it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

MAGIC = "drivetrain-checkpoint"
SCHEMA = 2
NAME = "manifest.json"
FULL = ("model.safetensors", "state.safetensors", "state.json")
INDEX = "shards.json"
SHARDED = (INDEX, "state.json")  # and a part of each rank
PART = re.compile(r"part-\d{5}\.safetensors")
RUN, WEIGHTS = "run", "weights"  # what a checkpoint holds: all that resuming needs, or the model alone
MAX_BYTES, MAX_DEPTH, MAX_ENTRIES = 4 * 2**20, 32, 100_000
FIELDS: dict[str, type] = {
    "magic": str, "schema": int, "kind": str, "step": int, "position": dict, "files": dict, "aliases": dict,
    "plugins": dict, "states": dict, "settings": dict, "metrics": dict, "milestone": bool, "world_size": int,
    "environment": dict, "sha256": str,
}  # fmt: skip
# What a field that an earlier schema did not have is taken to be.
_ADDED: dict[int, dict[str, Any]] = {1: {"kind": RUN, "states": {}, "metrics": {}, "milestone": False}}
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def dump_json(value: Any, indent: int | None = None) -> bytes:
    """Return JSON in ASCII, on one line or indented."""
    return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode("ascii")


def parse_json(raw: bytes | bytearray, *, max_depth: int, max_entries: int) -> Any:
    """Return the value of strict JSON: no key twice, no NaN or infinity, no integer beyond 64 bits, not too deep.

    Raises:
        ValueError: it is something else.
    """
    try:
        value = json.loads(
            raw.decode("ascii"),
            object_pairs_hook=_pairs,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError(f"is nested more than {max_depth} deep") from None
    level, depth, entries = [value], 0, 0
    while level:
        if depth > max_depth:
            raise ValueError(f"is nested more than {max_depth} deep")
        entries += len(level)
        if entries > max_entries:
            raise ValueError(f"has more than {max_entries} entries")
        inside = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level, depth = [v for values in inside for v in values], depth + 1
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"has the key {next(k for k in names if names.count(k) > 1)!r} twice")
    return made


def _constant(text: str) -> None:
    raise ValueError(f"holds {text}, which is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds the number {text[:40]}, which is beyond a 64-bit float")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:  # noqa: PLR2004 - digits of 2**63
        raise ValueError(f"holds the number {text[:40]}, which is beyond 64 bits")
    return int(text)


def seal(content: dict[str, Any]) -> bytes:
    """Return the bytes of a manifest with `content`, its own digest last."""
    content = {"magic": MAGIC, "schema": SCHEMA, **content}
    return dump_json({**content, "sha256": hashlib.sha256(dump_json(content)).hexdigest()}, indent=1)


def parse(raw: bytes | bytearray) -> dict[str, Any]:
    """Return the content of a manifest of which every field has been checked.

    Raises:
        ValueError: it is damaged, of a later version, or none of ours; the message says what was expected and found.
    """
    content = parse_json(raw, max_depth=MAX_DEPTH, max_entries=MAX_ENTRIES)
    if not isinstance(content, dict) or content.get("magic") != MAGIC:
        raise ValueError(f"expected an object with magic {MAGIC!r}, found {str(content)[:80]}")
    schema = content.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        hint = "; a later version of drivetrain wrote it" if type(schema) is int and schema > SCHEMA else ""
        raise ValueError(f"expected a schema up to {SCHEMA}, found {schema!r}{hint}")
    added = {k: v for number, fields in _ADDED.items() if number >= schema for k, v in fields.items()}
    fields = FIELDS.keys() - added
    if content.keys() != fields:
        raise ValueError(f"expected the fields {sorted(fields)}, found {sorted(content)}")
    for field, kind in ((name, FIELDS[name]) for name in content):
        if type(content[field]) is not kind:
            raise ValueError(f"expected {field!r} to be of type {kind.__name__}, found {content[field]!r}")
    body = {k: v for k, v in content.items() if k != "sha256"}
    if bytes(raw) != dump_json(content, indent=1) or hashlib.sha256(dump_json(body)).hexdigest() != content["sha256"]:
        raise ValueError("its content does not have the sha256 that it names")
    content = {**content, **added}
    if content["kind"] not in (RUN, WEIGHTS):
        raise ValueError(f"expected a kind {RUN!r} or {WEIGHTS!r}, found {content['kind']!r}")
    _check_versions(content["states"])
    _check_metrics(content["metrics"])
    _check_counters(content)
    _check_files(content["files"])
    return content


def parts(files: dict[str, Any]) -> dict[str, int]:
    """Return the sizes of the parts among a manifest's files, by name; none of the full form."""
    return {name: about["size"] for name, about in files.items() if PART.fullmatch(name)}


def _check_counters(content: dict[str, Any]) -> None:
    position, step = content["position"], content["step"]
    counters = {k: v for k, v in position.items() if k != "position"}  # that one is a stream's own
    wrong = {k: v for k, v in counters.items() if type(v) is not int or v < 0}
    if wrong or content["world_size"] < 1:
        raise ValueError(f"expected counters that are not negative, found {wrong or content['world_size']}")
    if position.get("step") != step or position.get("applied", 0) > step:
        raise ValueError(f"expected a position at step {step}, found {position}")
    epoch, within, rows = (
        content["settings"].get("rows_per_epoch"),
        counters.get("rows_in_epoch", 0),
        counters.get("rows"),
    )
    if (rows is not None and within > rows) or (type(epoch) is int and within >= max(epoch, 1)):
        raise ValueError(f"expected a position in an epoch of {epoch} rows, found {position}")


def _check_metrics(metrics: dict[str, Any]) -> None:
    odd = {k: v for k, v in metrics.items() if type(v) not in (int, float)}
    wrong = {k: v for k, v in odd.items() if v not in [{"$float": text} for text in ("nan", "inf", "-inf")]}
    if wrong:
        raise ValueError(f"expected metrics that are numbers, found {str(wrong)[:80]}")


def _check_versions(states: dict[str, Any]) -> None:
    wrong = {k: v for k, v in states.items() if type(v) is not int or v < 1}
    if wrong:
        raise ValueError(f"expected versions of plugins' states, found {str(wrong)[:80]}")


def _check_files(files: dict[str, Any]) -> None:
    for name, about in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"expected plain file names, found {name[:80]!r}")
        sound = isinstance(about, dict) and about.keys() == {"size", "sha256"}
        if not sound or type(about["size"]) is not int or about["size"] < 0:
            raise ValueError(f"expected size and sha256 of {name!r}, found {str(about)[:80]}")
        if type(about["sha256"]) is not str or not _SHA256.fullmatch(about["sha256"]):
            raise ValueError(f"expected the sha256 of {name!r}, found {str(about['sha256'])[:80]}")
    held = parts(files)
    if set(files) not in (set(FULL), {*SHARDED, *held}) or (set(files) != set(FULL) and not held):
        raise ValueError(f"expected the files {sorted(FULL)}, or {sorted(SHARDED)} with parts, found {sorted(files)}")
