"""A folder that `transformers` loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, Exporter, hookimpl, option, plugin
from drivetrain_plugins.export._paths import replace_whole, target

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from drivetrain import Run


def write(run: Run, path: Path) -> None:
    """Save model, configuration and tokenizer to the folder `path`."""

    def save(folder: Path) -> None:
        run.model.save_pretrained(folder)
        if run.processor is not None:
            run.processor.save_pretrained(folder)

    replace_whole(path, save)


@plugin(role="export", effect="observes")
class ExportHF:
    """Export a folder for transformers' from_pretrained, tokenizer included, at the end of the run."""

    to: str | None = option(None, help="folder; default: export-hf in the run's folder")

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse a model that transformers cannot save, before any work is done."""
        if not hasattr(run.model, "save_pretrained"):
            raise ConfigError(
                f"export-hf needs a transformers model. Received: {type(run.model).__name__}. Use export-safetensors"
            )
        target(run, self.to, "export-hf", "export-hf")

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Export when the run has ended well."""
        result = yield
        if run.rank == 0:
            write(run, target(run, self.to, "export-hf", "export-hf"))
        return result

    @hookimpl
    def export(self) -> list[Exporter]:
        """Offer the format "hf"."""
        return [Exporter("hf", write)]
