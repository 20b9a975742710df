"""Entities in sequences of tags."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Span = tuple[int, int, str]  # first position, position after the last, type
OUTSIDE = "O"


def parsed(tag: str) -> tuple[str, str] | None:
    """Return position in the entity and type of a tag such as "B-PER", or None if it is none of BIO and BIOES."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    place, dash, kind = tag.partition("-")
    return (place, kind) if place in ("B", "I", "E", "S") and dash and kind else None


def bio_spans(tags: Iterable[tuple[str, str]]) -> set[Span]:
    """Return the entities of (position, type) tags, by the rules of conlleval, which are seqeval's default.

    An entity begins at B or S, or at any tag of another type than the one before or after an outside, E or S tag; it
    ends before B, S, an outside tag or another type, and after E or S.
    """
    spans: set[Span] = set()
    start, before, kind_before, at = 0, OUTSIDE, "", -1
    for at, (place, kind) in enumerate(tags):
        inside, was = place != OUTSIDE, before != OUTSIDE
        fresh = place in ("B", "S") or before in (OUTSIDE, "E", "S") or kind != kind_before
        if was and (not inside or fresh):
            spans.add((start, at, kind_before))
        if inside and fresh:
            start = at
        before, kind_before = place, kind
    if before != OUTSIDE:
        spans.add((start, at + 1, kind_before))
    return spans


def raw_spans(tags: Sequence[tuple[str, str]]) -> set[Span]:
    """Return the longest runs of equal types; "O" is outside of all."""
    spans: set[Span] = set()
    start = 0
    for at in range(1, len(tags) + 1):
        if at == len(tags) or tags[at] != tags[start]:
            if tags[start][0] != OUTSIDE:
                spans.add((start, at, tags[start][1]))
            start = at
    return spans
