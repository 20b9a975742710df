"""Sets of the `datasets` library, map-style or streaming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drivetrain import ConfigError, Problem, hookimpl, option, plugin, require
from drivetrain_plugins.data._arrow import table_of
from drivetrain_plugins.data._stateful import Stateful, refuse_buffer

PLAIN = ("Value", "ClassLabel", "List", "LargeList", "Sequence")  # features that are stored as they are given


@plugin(role="data", provides=["data"], example={"path": "{kit}/{rows}-dataset"})
class HFDataset:
    """Load a set of the datasets library: saved to disk, by builder ("json", "parquet", ...) or from the hub."""

    path: str = option(help="a folder written by save_to_disk, a builder's name, or a hub id")
    name: str | None = option(None, help="configuration of the set")
    data_files: dict[str, str] | None = option(None, help="files by split, for a builder")
    train: str = option("train", help="the split to train on, e.g. train[:90%]")
    evaluate: str | dict[str, str] | None = option(
        "validation", help="the split to evaluate on, or several by name; None for none"
    )
    columns: list[str] | None = option(None, help="the columns to read; None for all")
    streaming: bool = option(False, help="read rows when they are needed, in order, instead of all at first")

    @property
    def facts(self) -> dict[str, Any]:
        """Declare the named evaluation sets."""
        return {"splits": [f"evaluate/{name}" for name in self.evaluate]} if isinstance(self.evaluate, dict) else {}

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        """Return `split`: columns over Arrow's memory where nothing is to be decoded, or else the library's own set."""
        named = self.evaluate if isinstance(self.evaluate, dict) else {"": self.evaluate}
        wanted = self.train if split == "train" else named.get(split.removeprefix("evaluate").removeprefix("/"))
        if wanted is None:
            return None
        data = self._load(wanted)
        if self.columns is not None:
            if missing := sorted(set(self.columns) - set(data.column_names or self.columns)):
                raise ConfigError(f"hf-dataset: there is no column {missing}. {wanted!r} has: {data.column_names}")
            data = data.select_columns(self.columns)
        if self.streaming:
            refuse_buffer(data, plugin="hf-dataset")
            return Stateful(data, "hf-dataset")
        return table_of(data.data.table, plugin="hf-dataset") if _plain(data) else data

    def _load(self, wanted: str) -> Any:
        datasets = require("datasets", extra="hf", plugin="hf-dataset")
        folder = Path(self.path).expanduser()
        try:
            if folder.is_dir():
                data = datasets.load_from_disk(str(folder))[wanted]
                return data.to_iterable_dataset() if self.streaming else data
            return datasets.load_dataset(
                self.path, self.name, data_files=self.data_files, split=wanted, streaming=self.streaming
            )
        except (KeyError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            do = "give the path of a set, a split that it has, or evaluate=None; a folder needs a saved DatasetDict"
            what = f"hf-dataset: the split {wanted!r} of {self.path!r} cannot be loaded"
            raise ConfigError([Problem(what, f"{type(error).__name__}: {error}", do)]) from error


def _plain(data: Any) -> bool:
    """Tell whether the rows are what the Arrow table holds: no picked rows, no format, nothing to decode."""
    picked = getattr(data, "_indices", None) is not None or data.format["type"] is not None
    return len(data) > 0 and not picked and all(map(_stored, data.features.values()))


def _stored(feature: Any) -> bool:
    if isinstance(feature, dict):
        return all(map(_stored, feature.values()))
    if isinstance(feature, (list, tuple)):
        return all(map(_stored, feature))
    return type(feature).__name__ in PLAIN and _stored(getattr(feature, "feature", {}))
