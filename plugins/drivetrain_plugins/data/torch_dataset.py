"""Datasets of torch's two kinds, from a function of the user's own."""

from __future__ import annotations

from typing import Any

from drivetrain import ConfigError, Iterated, hookimpl, import_object, option, plugin
from drivetrain_plugins.data._stateful import Stateful, refuse_buffer


@plugin(role="data", provides=["data"], example={"factory": "kit_module:rows", "arguments": {"kind": "{rows}"}})
class TorchDataset:
    """Take a torch Dataset or IterableDataset that an importable function makes for each split."""

    factory: str = option(help='called with the split ("train", "evaluate"), as "package.module:name"')
    arguments: dict[str, Any] = option(factory=dict, help="further keyword arguments of the function")
    splits: list[str] = option(factory=list, help="named evaluation sets, to call it with as evaluate/NAME")

    @property
    def facts(self) -> dict[str, Any]:
        """Declare the named evaluation sets."""
        return {"splits": [f"evaluate/{name}" for name in self.splits]} if self.splits else {}

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        """Call the function; None means that there is no such split.

        An iterable's position is its own state where it has `state_dict` and `load_state_dict`, else a count of rows.
        """
        data = import_object(self.factory, plugin="torch-dataset")(split, **self.arguments)
        if data is None or isinstance(data, dict) or hasattr(data, "open"):
            return data
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            return data
        if not hasattr(data, "__iter__") or iter(data) is data:
            raise ConfigError(
                f"torch-dataset: {self.factory} must return a dataset with __getitem__ and __len__, or an iterable "
                f"that can be started again. Received: {type(data).__name__}"
            )
        refuse_buffer(data, plugin="torch-dataset")
        tells = hasattr(data, "load_state_dict") and hasattr(data, "state_dict")
        return Stateful(data, "torch-dataset") if tells or hasattr(iter(data), "load_state_dict") else Iterated(data)
