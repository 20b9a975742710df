"""A folder that `transformers` loads, or `peft` where the model is an adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.export._exporting import DTYPES, AtEnd, caster, first_lines
from drivetrain_plugins.export._paths import replace_whole
from drivetrain_plugins.shared.exports import bare, export_model, remade

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from drivetrain import Run

CONFIGS = ("config", "generation_config")


def _size(value: str) -> str:
    """Refuse what is no size, before a run is over."""
    if not re.fullmatch(r"\d+(KB|MB|GB|TB)", value):
        raise ValueError(f'max_shard_size is a whole number with a unit, as in "5GB" or "200MB". Received: {value!r}')
    return value


@plugin(role="export", effect="observes")
class ExportHF(AtEnd):
    """Export a folder for transformers' from_pretrained, tokenizer included, at the end of the run.

    The configuration is the loaded model's, with the classes and types of what is exported: what training switched in
    it (`use_cache`, gradient checkpointing) is put back, and no path of this machine stays in it. A model with adapters
    that no plugin merges becomes a folder for peft's from_pretrained, with the adapters alone.
    """

    plugin: ClassVar[str] = "export-hf"
    format: ClassVar[str] = "hf"
    default: ClassVar[str] = "export-hf"
    to: str | None = option(None, help="folder; default: export-hf in the run's folder")
    at_end: bool = option(True, help="write when the run has ended; else only when asked to")
    dtype: str | None = option(None, choices=DTYPES, help="type of the stored weights; default: as trained")
    max_shard_size: str = option("5GB", converter=_size, help="larger models become several files with an index")
    _caching: dict[str, Any] = option(factory=dict, init=False)

    @hookimpl(wrapper=True)
    def build_model(self, run: Run) -> Generator[None, Any, Any]:  # noqa: ARG002
        """Keep what training may switch off in the configuration."""
        model = yield
        held: dict[str, Any] = {name: getattr(model, name, None) for name in CONFIGS}
        self._caching = {name: config.use_cache for name, config in held.items() if hasattr(config, "use_cache")}
        return model

    def refuse(self, run: Run) -> None:
        """Refuse a model that transformers cannot save, or whose settings for generation it will not save."""
        model = bare(run.model)
        if not hasattr(model, "save_pretrained"):
            raise ConfigError(
                f"export-hf needs a transformers model. Received: {type(model).__name__}. Use export-safetensors"
            )
        settings = getattr(model, "generation_config", None)
        if settings is not None:
            try:
                settings.validate(strict=True)
            except ValueError as error:
                what = "export-hf: transformers does not save this model's generation_config"
                raise ConfigError([Problem(what, first_lines(error), "change model.generation_config")]) from error

    def write(self, run: Run, path: Path) -> None:
        """Save model, configuration and tokenizer to the folder `path`."""
        model = remade(run, export_model(run), caster(self.dtype))
        self._clean(model)

        def save(folder: Path) -> None:
            model.save_pretrained(folder, max_shard_size=self.max_shard_size)
            if run.processor is not None:
                run.processor.save_pretrained(folder)

        replace_whole(path, save)

    def _clean(self, model: Any) -> None:
        """Take out of a copy what belongs to the run."""
        adapters = getattr(model, "peft_config", None)
        if adapters is not None:  # who loads adapters brings the base model
            _forget_paths(adapters.values(), "base_model_name_or_path")
            _forget_paths(model.modules(), "name_or_path")  # where peft looks next
            _forget_paths([getattr(model, "config", None)], "_name_or_path")
        for name, use in self._caching.items():
            if hasattr(model, name):
                getattr(model, name).use_cache = use
        config: Any = getattr(model, "config", None)
        if hasattr(config, "gradient_checkpointing"):
            config.gradient_checkpointing = False


def _forget_paths(holders: Iterable[Any], attribute: str) -> None:
    """Empty the attribute where it is a path of this machine; ids of a hub stay."""
    for holder in holders:
        if Path(getattr(holder, "__dict__", {}).get(attribute) or "").is_absolute():
            setattr(holder, attribute, "")
