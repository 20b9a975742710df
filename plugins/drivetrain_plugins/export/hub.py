"""The model on a hub."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, Problem, TrainingError, hookimpl, option, plugin, require
from drivetrain_plugins.export import _card
from drivetrain_plugins.export._exporting import NotExportedError
from drivetrain_plugins.export._hub_upload import Job, Repository, Uploader, allowed, hold, is_allowed, on_first_rank

if TYPE_CHECKING:
    from collections.abc import Generator

    import pluggy

    from drivetrain import Run

log = logging.getLogger("drivetrain")
ALLOW = (
    "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", "*.onnx", "*.onnx.data", "*.gguf", "*.pt2",
)  # fmt: skip
SAVES = ("every-save", "checkpoint", "all")


@plugin(
    role="export",
    effect="observes",
    companions={"export-safetensors": {}},
    example={
        "repo": "kit/model", "endpoint": "http://127.0.0.1:9", "check": False, "tries": 1, "deadline_s": 5.0,
    },
)  # fmt: skip
class Hub:
    """Upload the exports to a Hugging Face hub, in the background, and on request what is saved on the way.

    The export folder's files become the repository's, other exports lie beside them; `allow` says which. Links,
    hidden files, logs, recipe.json and plan.json stay, unless a pattern is exactly such a file's name. Checkpoints
    go up with their manifests, which name plugins and options (secrets masked) and paths among them.

    What goes up is copied when it is saved, so the loop waits for the disk and never for the network.
    """

    repo: str = option(help='the repository, "OWNER/NAME"')
    token: str | None = option(None, secret=True, help="access token that may write; None: that of `hf auth login`")
    private: bool | None = option(None, help="whether a repository that is made is private; None: as the owner has it")
    revision: str | None = option(None, help="branch; None: main")
    when: str = option(
        "end",
        choices=["end", *SAVES],
        help="end: the exports; every-save: also exports of each save; checkpoint: also the newest, all: all of them",
    )
    create: bool = option(True, help="make the repository and the branch unless they are there")
    endpoint: str | None = option(
        None, help="the hub's address; None: HF_ENDPOINT of the environment, or the public hub"
    )
    on_failure: str = option("warn", choices=["warn", "error"], help="what uploads that fail do at the end of the run")
    allow: tuple[str, ...] = option(ALLOW, converter=tuple, help="patterns of the files that may be uploaded")
    check: bool = option(True, help="see before step 0 that the token and the repository are fine")
    check_s: float = option(20.0, gt=0, help="seconds that this test may take")
    deadline_s: float = option(600.0, gt=0, help="seconds that the end of the run waits for uploads")
    tries: int = option(3, ge=1, help="how often an upload is tried")
    _uploader: Uploader | None = option(None, init=False)

    @hookimpl
    def add_hooks(self, manager: pluggy.PluginManager) -> None:
        """Bring `exported`, which a model card listens to."""
        manager.add_hookspecs(_card.CardHooks)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse a run that gives nothing to upload, or a name that no repository can have."""
        self._uploader = None
        utils = require("huggingface_hub.utils", plugin="hub", extra="hf")
        try:
            utils.validate_repo_id(self.repo)
        except ValueError as error:
            do = 'write repo = "OWNER/NAME"'
            raise ConfigError([Problem("hub: no repository can have this name", str(error), do)]) from None
        if run.settings.output is None:
            raise ConfigError("hub needs the run's folder: Trainer(..., output=...) or [run] output = ...")
        formats = [e.format for exporters in run.hooks.export(run) for e in exporters]
        if (self.when == "end" and not _card.exports_of(run)) or (self.when == "every-save" and not formats):
            raise ConfigError("hub: no plugin of this run exports a model. Add export-hf or another exporter")
        if self.when != "end" and run.plan.hooks["save"].owner is None:
            raise ConfigError(
                f"hub: when = {self.when!r} uploads at saves, and no plugin of this run saves. Add checkpoint"
            )

    @hookimpl(wrapper=True, tryfirst=True)  # outside of all exporters: they have written when the run comes back here
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Look at the hub before step 0; at the end, wait for the uploads.

        Raises:
            ConfigError: `check` found that uploads cannot work.
            TrainingError: some failed, and `on_failure` is "error".
        """
        on_first_rank(lambda: self._open(run), run.rank, run.world_size)
        try:
            result = yield
        except BaseException as error:
            if self._uploader is not None:  # who ends a run early does not wait for the network
                self._tell(self._uploader.finish(self.deadline_s if isinstance(error, NotExportedError) else 1.0))
            raise
        if self._uploader is not None:
            run.hooks.exported(run)  # type: ignore[attr-defined]
            try:
                self._put_exports(run, self._uploader)
                self._put_checkpoints(run, self._uploader)
            except OSError as error:
                self._uploader.fail("the end of the run", error)
            failed = self._uploader.finish(self.deadline_s)
            self._tell(failed)
            if failed and self.on_failure == "error":
                raise TrainingError(
                    f"hub: not uploaded to {self.repo}: {_listed(failed)}. The files are in the run's folder"
                )
        return result

    @hookimpl
    def saved(self, run: Run, path: Path | str) -> None:
        """Hand over what was saved, as it is now; the loop goes on at once."""
        uploader = self._uploader
        if uploader is None or self.when == "end":
            return
        if self.when != "every-save" and not isinstance(path, Path):
            log.warning("hub: checkpoints in a store are not uploaded. Received: %s", path)
            return
        name = Path(path).name
        try:
            if self.when == "every-save":
                self._put_snapshot(run, uploader, name)
            else:
                self._put_checkpoint(uploader, Path(path))
        except Exception as error:  # noqa: BLE001 - no disk, its files went, or a library's own: training goes on
            uploader.fail(name, error)

    # --- the parts -----------------------------------------------------------------------------------------------

    def _open(self, run: Run) -> None:
        library = require("huggingface_hub", plugin="hub", extra="hf")
        api = library.HfApi(endpoint=self.endpoint, token=self.token, library_name="drivetrain")
        repository = Repository(api, self.repo, self.revision, self.private, self.create)
        if self.check:
            repository.check(self.check_s)
        assert run.settings.output is not None  # refused when assembled
        self._uploader = Uploader(repository, run.settings.output / ".hub", self.tries)
        self._uploader.start()

    def _put_exports(self, run: Run, uploader: Uploader) -> None:
        """Add what the run's exporters and its card have written."""
        files: dict[str, Path] = {}
        for export in _card.exports_of(run):
            for inside, file in self._files_of(export.path).items():
                files.setdefault(inside, file)
        card = _card.card_folder(run) / "README.md"  # what else lies beside it is no export
        if is_allowed(card, card.name, self.allow):
            files.setdefault(card.name, card)
        if files:
            folder = hold(files, uploader.place("exports"))
            uploader.put(Job("the exports", folder, message=f"Upload the model after step {run.progress.step}"))

    def _files_of(self, place: Path) -> dict[str, Path]:
        if not place.is_dir():
            return {place.name: place} if is_allowed(place, place.name, self.allow) else {}
        return {inside: place / inside for inside in allowed(place, self.allow)}

    def _put_snapshot(self, run: Run, uploader: Uploader, name: str) -> None:
        """Export the model of this save."""
        exporters = {e.format: e for exporters in run.hooks.export(run) for e in exporters}
        format_ = "hf" if "hf" in exporters else next(iter(exporters))
        scratch, folder = uploader.place(f"{name}.export"), uploader.place(name)
        made = scratch / (f"model{exporters[format_].suffix}" if exporters[format_].suffix else "model")
        exporters[format_].write(run, made)
        hold(self._files_of(made), folder)
        shutil.rmtree(scratch, ignore_errors=True)
        uploader.put(Job("the newest save's export", folder, newest=True, message=f"Upload the model of {name}"))

    def _put_checkpoint(self, uploader: Uploader, path: Path, *, at_end: bool = False) -> None:
        """Copy a complete checkpoint: it may be removed before its turn comes."""
        newest, name = self.when == "checkpoint", path.name
        if not newest and not uploader.has_room() and not at_end:
            return  # those still there when the run ends are uploaded then
        folder = hold({inside: path / inside for inside in allowed(path, self.allow)}, uploader.place(name))
        prefix = "last-checkpoint" if newest else f"checkpoints/{name}"
        message = f"Upload checkpoint {name}"
        uploader.put(Job(prefix if newest else name, folder, prefix, newest=newest, only=newest, message=message))

    def _put_checkpoints(self, run: Run, uploader: Uploader) -> None:
        """Add what of the run's checkpoints was not uploaded in this process: the hub tells which it has."""
        assert run.settings.output is not None  # refused when assembled
        complete = sorted(p.parent for p in (run.settings.output / "checkpoints").glob("step-*/manifest.json"))
        wanted = {"checkpoint": complete[-1:], "all": complete}.get(self.when, [])
        for path in wanted:
            if not uploader.knows("last-checkpoint" if self.when == "checkpoint" else path.name):
                self._put_checkpoint(uploader, path, at_end=True)

    def _tell(self, failed: dict[str, str]) -> None:
        if failed:
            log.warning("hub: not uploaded to %s: %s", self.repo, _listed(failed))


def _listed(failed: dict[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in failed.items())
