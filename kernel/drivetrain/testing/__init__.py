"""The conformance kit for authors of plugins: fixtures, runs to test against, and a whole suite in one class.

A plugin's test file is as long as this:

    from drivetrain.testing import PluginSuite
    from my_package import MyPlugin

    class TestMyPlugin(PluginSuite):
        plugin = MyPlugin
        settings = {"strength": 0.5}

The fixtures (`make_run`, `make_step`, `make_micro`, `recorder`, `empty_catalogue`, `kit_dir`) come with the
distribution, since it is a pytest plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain.testing.carriers import make_micro, make_run, make_step
    from drivetrain.testing.compose import Composition, complete, compose_pair, example, examples, first_party, refusal
    from drivetrain.testing.digests import decode, digest, encode
    from drivetrain.testing.files import TinyModule, write_kit
    from drivetrain.testing.kinds import kit_rows, text_rows
    from drivetrain.testing.probes import BaseOptimizer, CallCounter, Recorder, StopAt, saboteur
    from drivetrain.testing.ranks import run_ranks
    from drivetrain.testing.suite import PluginSuite

_HOMES = {
    "carriers": ["make_micro", "make_run", "make_step"],
    "compose": ["Composition", "complete", "compose_pair", "example", "examples", "first_party", "refusal"],
    "digests": ["decode", "digest", "encode"],
    "files": ["TinyModule", "write_kit"],
    "kinds": ["kit_rows", "text_rows"],
    "probes": ["BaseOptimizer", "CallCounter", "Recorder", "StopAt", "saboteur"],
    "ranks": ["run_ranks"],
    "suite": ["PluginSuite"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [*_HOME]  # noqa: PLE0604 - checked against _HOMES by the tests

__getattr__ = lazy_names(__name__, _HOME)
