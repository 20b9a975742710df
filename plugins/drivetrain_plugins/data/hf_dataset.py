"""Map-style sets of the `datasets` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drivetrain import ConfigError, Problem, hookimpl, option, plugin, require


@plugin(role="data", provides=["data"], example={"path": "{kit}/{rows}-dataset"})
class HFDataset:
    """Load a set of the datasets library: saved to disk, by builder ("json", "parquet", ...) or from the hub."""

    path: str = option(help="a folder written by save_to_disk, a builder's name, or a hub id")
    name: str | None = option(None, help="configuration of the set")
    data_files: dict[str, str] | None = option(None, help="files by split, for a builder")
    train: str = option("train", help="the split to train on, e.g. train[:90%]")
    evaluate: str | None = option("validation", help="the split to evaluate on; None for none")

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        """Return the `datasets.Dataset` of `split`."""
        wanted = {"train": self.train, "evaluate": self.evaluate}.get(split)
        if wanted is None:
            return None
        datasets = require("datasets", extra="hf", plugin="hf-dataset")
        try:
            if Path(self.path).expanduser().is_dir():
                return datasets.load_from_disk(str(Path(self.path).expanduser()))[wanted]
            return datasets.load_dataset(self.path, self.name, data_files=self.data_files, split=wanted)
        except (KeyError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            do = "give the path of a set, a split that it has, or evaluate=None; a folder needs a saved DatasetDict"
            what = f"hf-dataset: the split {wanted!r} of {self.path!r} cannot be loaded"
            raise ConfigError([Problem(what, f"{type(error).__name__}: {error}", do)]) from error
