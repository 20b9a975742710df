"""The log as a JSON-lines file, complete and without doubled points after a resume."""

from __future__ import annotations

import json
import math
from typing import IO, TYPE_CHECKING, Any

from drivetrain import ConfigError, hookimpl, option, plugin
from drivetrain_plugins.shared import samples

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    import pluggy

    from drivetrain import Run


@plugin(role="report", effect="observes", provides=["log"])
class JsonlLog:
    """Write every log as one JSON line to OUTPUT/log.jsonl; non-finite numbers are written as strings.

    Samples of what the model makes, where a plugin such as `generate` shows some, go to OUTPUT/samples.jsonl.
    """

    name: str = option("log.jsonl", help="file in the run's folder")
    samples_name: str = option("samples.jsonl", help="file in the run's folder for samples, if there are any")
    _file: IO[str] | None = option(None, init=False)
    _resumed: bool = option(False, init=False)

    @hookimpl
    def add_hooks(self, manager: pluggy.PluginManager) -> None:
        """Know the hook of samples."""
        manager.add_hookspecs(samples.SampleHooks)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse a run without a folder."""
        if run.settings.output is None:
            raise ConfigError("jsonl-log needs the run's folder: Trainer(..., output=...) or [run] output = ...")
        self._resumed = False

    @hookimpl
    def loaded(self, run: Run, path: Path) -> None:  # noqa: ARG002
        """Go on with the log that is there; who only looks at a run, or may not have its folder, leaves it alone."""
        self._resumed = True
        if self._file is not None:  # in the middle of a run: it was rolled back
            self._file.close()
            self._file = self._open(run)

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Hold the file open while the run lasts."""
        if run.rank != 0:
            return (yield)
        self._file = self._open(run)
        try:
            return (yield)
        finally:
            self._file.close()
            self._file = None

    def _open(self, run: Run) -> IO[str]:
        """Open the log, with what was logged up to the checkpoint in it; what came after will be logged again."""
        shown = self._path(run, self.samples_name)
        if shown.exists():
            self._cut(run, shown)
        return self._cut(run, self._path(run, self.name)).open("a", encoding="utf-8", buffering=1)

    def _cut(self, run: Run, file: Path) -> Path:
        """Leave in a file what a resumed run had written up to its checkpoint."""
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines() if self._resumed and file.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if row["step"] <= run.progress.step:
                kept.append(line + "\n")
        fresh = file.with_name(f".{file.name}.new")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.replace(file)  # the log is never half there
        return file

    @hookimpl
    def log(self, run: Run, metrics: dict[str, float]) -> None:
        """Write one line."""
        if self._file is not None:
            shown = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
            self._file.write(json.dumps({"step": run.progress.step, **shown}) + "\n")

    @hookimpl
    def samples(self, run: Run, split: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write a line for each sample."""
        if self._file is not None:
            lines = [json.dumps({"step": run.progress.step, "split": split, **row}) + "\n" for row in rows]
            with self._path(run, self.samples_name).open("a", encoding="utf-8") as file:
                file.write("".join(lines))

    def _path(self, run: Run, name: str) -> Path:
        assert run.settings.output is not None  # refused when assembled
        return run.settings.output / name
