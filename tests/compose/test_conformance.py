"""Every first-party plugin keeps the promises of the kit; a new one is tested by existing."""

from __future__ import annotations

from drivetrain.testing import PluginSuite, first_party

# Python calls a step that these may add: each picture, each document is taken apart by itself, and some libraries of
# optimizers make many calls for each parameter.
CALLS = {"vision": 1000, "sentence-order": 600, "bnb-adamw": 600, "bnb-ademamix": 800, "grokadamw": 600}

for _name in first_party():
    _title = "Test" + "".join(part.capitalize() for part in _name.split("-"))
    # Pairs are the subject of test_pairs.py, which has a stronger oracle.
    globals()[_title] = type(
        _title, (PluginSuite,), {"plugin": _name, "test_composes_with": None, "max_extra_calls": CALLS.get(_name, 400)}
    )
