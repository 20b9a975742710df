"""`hub`: what a run uploads arrives whole, past faults and rotation; what cannot work is told before step 0."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest
import torch
from hub_server import Hub as Server
from plugin_helpers import Crash, assert_same_weights, columns, fit, net
from safetensors.torch import load_model

from drivetrain import ConfigError, Trainer, TrainingError, hookimpl
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import (
    SGD,
    Checkpoint,
    ExportHF,
    ExportSafetensors,
    HFModel,
    Hub,
    Loader,
    ModelCard,
    Pad,
    Tokenize,
)
from drivetrain_plugins.export import _hub_upload
from drivetrain_plugins.export._hub_upload import Job, Repository, allowed, hold

TOKEN, LABELS = "hf_right", ("bird", "fish", "other")
ROWS = [{"text": "the red bird sings", "label": "bird"}, {"text": "a blue fish", "label": "fish"}]

# The library's uploads, not ours.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Let the library reach the loopback, with plain uploads and without its waits."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(_hub_upload, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def server():
    with Server() as running:
        yield running


def uploads(server, **options):
    return Hub(**{"repo": "me/m", "token": TOKEN, "endpoint": server.url, "deadline_s": 30.0, **options})


def train(output, hub, *extra, steps=6, resume=False):
    """Train the small net; return the trainer."""
    plugins = [SGD(lr=0.1), hub, ExportSafetensors(), *extra]
    trainer = Trainer(net(), plugins, output=output, steps=steps, device="cpu", log_every="1 step")
    trainer.fit(columns(), resume=resume)
    return trainer


class Seen:
    """Counts steps; does something at the start of one of them."""

    def __init__(self, at=0, act=None):
        self.at, self.act, self.steps = at, act, 0

    @hookimpl
    def step_end(self, step):
        self.steps = step.run.progress.step
        if self.steps == self.at:
            self.act()


def test_transformers_reads_the_repository_back(bert_folder, tmp_path, server, monkeypatch):
    """`from_pretrained` through the hub gives the run's logits; only files of the allow-list are there, with the card."""
    from huggingface_hub import ModelCard as Card
    from huggingface_hub import constants
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plugins = [
        ModelCard(license="mit"),
        HFModel(str(bert_folder), labels=LABELS),
        Tokenize(),
        Pad(),
        Loader(2),
        SGD(lr=0.1),
    ]
    trainer = Trainer(plugins=[*plugins, uploads(server), ExportHF()], output=tmp_path / "run", steps=3)
    trainer.fit(ROWS)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    where = {"cache_dir": tmp_path / "cache", "token": TOKEN}
    model = AutoModelForSequenceClassification.from_pretrained("me/m", **where)
    tokenizer = AutoTokenizer.from_pretrained("me/m", **where)
    batch = tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    trainer.run.model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, trainer.run.model(**batch).logits)
    files = server.files("me/m")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert all(name.endswith((".json", ".safetensors", ".txt", ".md")) for name in files)
    assert files["README.md"] == (tmp_path / "run" / "export-hf" / "README.md").read_bytes()
    assert Card(files["README.md"].decode()).data.license == "mit"


@pytest.mark.parametrize("fault", [500, 503, "drop"])
@pytest.mark.parametrize("at", ["preupload", "objects/batch", "/lfs/", "/commit/"])
def test_what_fails_is_tried_again(tmp_path, server, at, fault):
    """An answer of trouble and a cut connection, at any point of an upload, cost a try and no file."""
    server.faults = [(at, fault)]
    trainer = train(tmp_path, uploads(server))
    (tmp_path / "back.safetensors").write_bytes(server.files("me/m")["model.safetensors"])
    load_model(back := net(), tmp_path / "back.safetensors")
    assert_same_weights(back, trainer.run.model)
    assert server.faults == []
    assert len(server.commits) == 1


def test_what_the_hub_has_is_not_sent_again(tmp_path, server):
    """The same files a second time make no commit; with one changed, that one alone is sent."""
    from huggingface_hub import HfApi

    (tmp_path / "a.safetensors").write_bytes(b"weights")
    (tmp_path / "a.json").write_text("{}")
    repository = Repository(HfApi(endpoint=server.url, token=TOKEN), "me/m")
    repository.upload(Job("first", tmp_path))
    repository.upload(Job("second", tmp_path))
    assert server.commits == [{"added": ["a.json", "a.safetensors"], "deleted": []}]
    (tmp_path / "a.json").write_text("[]")
    repository.upload(Job("third", tmp_path))
    assert server.commits[1:] == [{"added": ["a.json"], "deleted": []}]
    assert sum("PUT /lfs/" in line for line in server.requests) == 1


def test_the_newest_checkpoint_is_one_to_resume_from(tmp_path, server):
    """`checkpoint` keeps the newest one's files alone; downloaded, a run goes on from them bit for bit."""
    train(tmp_path / "run", uploads(server, when="checkpoint"), Checkpoint(every="2 steps"))
    prefix = "last-checkpoint/"
    files = {k.removeprefix(prefix): v for k, v in server.files("me/m").items() if k.startswith(prefix)}
    assert json.loads(files["manifest.json"])["step"] == 6
    folder = tmp_path / "other" / "checkpoints" / "step-00000006"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    plugins = uploads(server, when="checkpoint"), Checkpoint(every="2 steps", on_change="accept")
    went_on = train(tmp_path / "other", *plugins, steps=9, resume=True)
    whole = train(tmp_path / "whole", uploads(server), steps=9)
    assert_same_weights(went_on.run.model, whole.run.model)


def test_checkpoints_arrive_though_they_were_removed(tmp_path, server):
    """While the hub is slow the run goes on and removes old checkpoints; each arrives as it was saved."""
    server.faults = [("preupload", "hang")]
    links = []

    def look():
        assert not server.commits, "the loop has waited"
        links.extend(path.stat().st_nlink for path in (tmp_path / "checkpoints").rglob("*.*"))

    seen = Seen(6, look)
    train(tmp_path, uploads(server, when="all"), Checkpoint(every="2 steps", keep=1), seen)
    steps = {name.split("/")[1] for name in server.files("me/m") if name.startswith("checkpoints/")}
    assert steps == {"step-00000002", "step-00000004", "step-00000006"}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
    assert set(links) == {1}  # else a killed run would leave checkpoints that are not valid
    assert not (tmp_path / ".hub").exists()


class Replicas:
    """Says that somebody reduces gradients."""

    provides = ("data-parallel",)


def on_a_rank(url, folder, token):
    """Train on a rank; return the steps, or what was refused."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    plugins = [SGD(lr=0.1), Hub("me/m", token=token, endpoint=url), ExportSafetensors(), Replicas()]
    trainer = Trainer(net(), plugins, output=folder, steps=2, device="cpu")
    try:
        trainer.fit(columns())
    except ConfigError as error:
        return str(error)
    return trainer.run.progress.step


def test_one_rank_uploads_and_all_are_refused(tmp_path, server):
    """Of two ranks the first uploads, once; what it finds wrong before step 0 ends both."""
    assert run_ranks(on_a_rank, server.url, str(tmp_path / "good"), TOKEN) == [2, 2]
    assert server.commits == [{"added": ["model.safetensors"], "deleted": []}]
    assert sum("whoami" in line for line in server.requests) == 1
    first, second = run_ranks(on_a_rank, server.url, str(tmp_path / "bad"), "hf_wrong")
    assert first == second
    assert "Invalid user token" in first


def test_a_model_of_every_save(tmp_path, server):
    """`every-save` exports and uploads the model of each save, and the last one's weights are the run's."""
    trainer = train(tmp_path, uploads(server, when="every-save"), Checkpoint(every="3 steps"))
    (tmp_path / "back.safetensors").write_bytes(server.files("me/m")["model.safetensors"])
    load_model(back := net(), tmp_path / "back.safetensors")
    assert_same_weights(back, trainer.run.model)
    assert len(server.commits) >= 2


def test_after_a_kill_the_next_run_uploads_what_is_missing(tmp_path, server):
    """A hub that dies in the middle of a run that is then killed: the resumed run sends what is not there."""
    cut = uploads(server, when="all"), Checkpoint(every="2 steps", keep=9), Seen(3, server.stop), Crash(5)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, *cut)
    (tmp_path / ".hub" / "step-00000004").mkdir(parents=True, exist_ok=True)  # where a kill leaves it
    (tmp_path / ".hub" / "step-00000004" / "model.safetensors").write_bytes(b"half")
    server.start()
    here = uploads(server, when="all"), Checkpoint(every="2 steps", keep=9, on_change="accept")
    train(tmp_path, *here, resume=True)
    files = server.files("me/m")
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            assert files[path.relative_to(tmp_path).as_posix()] == path.read_bytes()
    assert not (tmp_path / ".hub").exists()


def test_a_save_that_cannot_be_held_does_not_end_the_run(tmp_path, server, monkeypatch, caplog):
    """No room for a copy of a save costs that upload: the run ends well and says what is missing."""
    from drivetrain_plugins.export import hub

    def full(files, folder):
        if "manifest.json" in files:
            raise OSError(28, "No space left on device")
        return hold(files, folder)

    monkeypatch.setattr(hub, "hold", full)
    train(tmp_path, uploads(server, when="checkpoint"), Checkpoint(every="6 steps"))
    assert "No space left on device" in caplog.text
    assert list(server.files("me/m")) == ["model.safetensors"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (
            {"token": "hf_wrong"},
            {},
            r"me/m at http://127.* cannot be uploaded to[\s\S]*Invalid user token[\s\S]*env:HF_TOKEN",
        ),
        ({"endpoint": "nobody"}, {}, r"cannot be uploaded to[\s\S]*Connect[\s\S]*see that the network"),
        ({}, {"denied": {"me/m"}}, r"rights to create me/m[\s\S]*use a token that may write"),
        ({}, {"role": "read"}, "the token can only read"),
        ({"create": False}, {}, r"RepositoryNotFound[\s\S]*create = true"),
        ({"repo": "a/b/c"}, {}, r"no repository can have this name[\s\S]*OWNER/NAME"),
        ({"check_s": 0.2}, {"faults": [("whoami", "hang")]}, "no answer within 0.2 s"),
        ({"when": "all"}, {}, "no plugin of this run saves"),
    ],
)
def test_what_cannot_work_is_told_before_the_first_step(tmp_path, server, options, change, message):
    """Wrong token, no network, no right, no repository: refused with what to do, and nothing was trained."""
    for name, value in change.items():
        setattr(server, name, value)
    if options.get("endpoint") == "nobody":
        options = {"endpoint": f"http://127.0.0.1:{free_port()}"}
    seen = Seen()
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, uploads(server, **options), seen)
    assert seen.steps == 0


def test_offline_mode_is_told_before_the_first_step(tmp_path, server, monkeypatch):
    """HF_HUB_OFFLINE forbids uploads, and the message names it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        train(tmp_path, uploads(server))


def test_a_run_that_exports_nothing_is_refused(tmp_path, server):
    """Without an exporter there is nothing to upload at the end."""
    with pytest.raises(ConfigError, match=r"no plugin of this run exports a model. Add export-hf"):
        fit(net(), [SGD(), uploads(server)], columns(), steps=1, output=tmp_path)


@pytest.mark.parametrize("on_failure", ["warn", "error"])
def test_uploads_that_fail_do_as_they_are_told(tmp_path, server, caplog, on_failure):
    """A hub that is gone at the end is a warning, or an error that says what is missing; the run is complete."""
    hub = uploads(server, on_failure=on_failure, tries=2)
    if on_failure == "error":
        with pytest.raises(TrainingError, match=r"hub: not uploaded to me/m: the exports \(.*Connect"):
            train(tmp_path, hub, Seen(2, server.stop))
    else:
        train(tmp_path, hub, Seen(2, server.stop))
    server.start()  # for the fixture's end
    assert "not uploaded to me/m: the exports" in caplog.text
    assert (tmp_path / "model.safetensors").exists()


def test_the_end_waits_no_longer_than_the_deadline(tmp_path, server, caplog):
    """An upload that hangs is named when the deadline is over."""
    server.faults = [("preupload", "hang")]
    train(tmp_path, uploads(server, deadline_s=0.2))
    assert "the exports (not finished within 0.2 s)" in caplog.text


def test_a_branch_and_a_private_repository(tmp_path, server):
    """`revision` is a branch that is made; main stays as it was."""
    train(tmp_path, uploads(server, revision="tries", private=True))
    assert list(server.files("me/m", "tries")) == ["model.safetensors"]
    assert server.files("me/m") == {}
    asked = next(json.loads(b) for b, r in zip(server.bodies, server.requests, strict=True) if "repos/create" in r)
    assert asked.get("private") is True or asked.get("visibility") == "private"  # by the library's version


def test_the_allow_list(tmp_path):
    """Links, hidden files and what is outside never match; recipe.json only where it is asked for by its name."""
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "export"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in (
        "a.json",
        "log.jsonl",
        "recipe.json",
        "plan.json",
        ".b.json",
        "sub/c.json",
        ".hidden/d.json",
        "run.log",
    ):
        (folder / name).write_text("{}")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    (folder / "up").symlink_to(tmp_path)
    assert allowed(folder, ["*.json"]) == ["a.json", "sub/c.json"]
    assert allowed(folder, ["*"]) == ["a.json", "log.jsonl", "run.log", "sub/c.json"]
    assert allowed(folder, ["recipe.json"]) == ["recipe.json"]
    assert allowed(folder, ["sub/*"]) == ["sub/c.json"]


def test_it_only_observes(tmp_path, server):
    """Weights with and without it are bit-identical."""
    with_it = train(tmp_path / "a", uploads(server, when="checkpoint"), Checkpoint(every="2 steps"))
    without = fit(net(), [SGD(lr=0.1)], columns(), steps=6)[0]
    assert_same_weights(with_it.run.model, without.run.model)


def test_what_lies_beside_the_card_is_not_uploaded(tmp_path, server, monkeypatch):
    """A card in a folder of other files goes up by itself: the folder is no export."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("credentials.json", "data/customers.json", "notes.txt"):
        (tmp_path / name).write_text("mine")
    train(tmp_path / "run", uploads(server), ModelCard(to="."))
    assert set(server.files("me/m")) - {".gitattributes"} == {"README.md", "model.safetensors"}


def test_any_error_of_a_snapshot_leaves_the_training_alone(tmp_path, server, monkeypatch):
    """A library's own error, as safetensors raises on a full disk, is told at the end and ends no run."""
    from safetensors import SafetensorError

    real, calls = ExportSafetensors.write, []

    def full(plugin, run, path):
        calls.append(path)
        if len(calls) == 1:
            raise SafetensorError("No space left on device")
        return real(plugin, run, path)

    monkeypatch.setattr(ExportSafetensors, "write", full)
    trainer = train(tmp_path, uploads(server, when="every-save"), Checkpoint(every="3 steps"))
    assert trainer.run.progress.step == 6
    assert len(calls) >= 3
