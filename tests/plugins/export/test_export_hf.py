"""`export-hf`: a folder that transformers loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from plugin_helpers import Crash, assert_same_weights, columns, fit, net
from safetensors import safe_open

from drivetrain import ConfigError, Stage, Trainer, Transform, hookimpl
from drivetrain.testing.files import ensure
from drivetrain_plugins import SGD, Evaluate, ExportHF, HFModel, Loader, LoRA, MergeLoRA, Pad, Tokenize

LABELS = ("bird", "fish", "other")
ROWS = [
    {"text": "the red bird sings", "label": "bird"},
    {"text": "a blue fish", "label": "fish"},
    {"text": "the green fish swims fast", "label": "fish"},
    {"text": "slow bird", "label": "other"},
]


def train(bert_folder, output, *extra, to=None, max_shard_size="5GB", **settings):
    """Fine-tune the tiny BERT on four rows and export it."""
    exporter = ExportHF(to=to, max_shard_size=max_shard_size)
    plugins = [HFModel(str(bert_folder), labels=LABELS), Tokenize(), Pad(), Loader(2), SGD(lr=0.1), exporter]
    trainer = Trainer(plugins=[*plugins, *extra], output=output, **{"steps": 3, "log_every": "1 step", **settings})
    trainer.fit(ROWS)
    return trainer


def logits_of(model, tokenizer):
    batch = tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def loaded(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_folder_is_loaded_back_with_equal_logits(bert_folder, tmp_path):
    """At the end of a run the folder gives transformers the trained model: weights, logits, labels and tokenizer."""
    trainer = train(bert_folder, tmp_path)
    model, tokenizer = loaded(tmp_path / "export-hf")
    assert_same_weights(model, trainer.run.model)
    assert torch.equal(logits_of(model, tokenizer), logits_of(trainer.run.model, trainer.run.processor))
    assert model.config.id2label == dict(enumerate(LABELS))
    first = loaded(bert_folder)[0]
    assert not torch.equal(model.classifier.weight, first.classifier.weight)  # it was trained


def test_export_on_request(bert_folder, tmp_path):
    """`Trainer.export` writes the same folder anywhere, making the folders above it."""
    trainer = train(bert_folder, tmp_path / "run")
    trainer.export("hf", tmp_path / "deep" / "down" / "model")
    model, _ = loaded(tmp_path / "deep/down/model")
    assert_same_weights(model, trainer.run.model)


def test_an_older_export_is_replaced_whole(bert_folder, tmp_path):
    """What stood at the target is gone, file by file, and nothing is left beside it."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "of_another_model.bin").write_text("old")
    (target / "config.json").write_text("{}")
    trainer = train(bert_folder, tmp_path / "run", to=str(target))
    assert not (target / "of_another_model.bin").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    assert_same_weights(loaded(target)[0], trainer.run.model)


def test_an_older_export_stays_when_writing_fails(bert_folder, tmp_path, monkeypatch):
    """A write that fails half-way, as on a full disk, leaves the older export as it was."""
    trainer = train(bert_folder, tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "export-hf").iterdir()}

    def full(folder):
        (folder / "tokenizer.json").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.run.processor, "save_pretrained", full)
    with pytest.raises(ConfigError, match=r"export .*export-hf cannot be written[\s\S]*No space left"):
        trainer.export("hf", tmp_path / "export-hf")
    assert {path.name: path.read_bytes() for path in (tmp_path / "export-hf").iterdir()} == before


def test_a_kill_between_the_renames_loses_nothing(bert_folder, tmp_path, monkeypatch):
    """An older export that a killed process had moved aside is put back before the next attempt."""
    trainer = train(bert_folder, tmp_path)
    target = tmp_path / "export-hf"
    target.rename(tmp_path / ".export-hf.old")  # where a kill leaves it
    monkeypatch.setattr(
        trainer.run.model, "save_pretrained", lambda folder, **_: (x for x in ()).throw(OSError("full"))
    )
    with pytest.raises(ConfigError, match="cannot be written"):
        trainer.export("hf", target)
    loaded(target)


def test_other_users_can_read_the_files(bert_folder, tmp_path):
    """Files have the mode that the process's umask gives."""
    train(bert_folder, tmp_path)
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "export-hf").iterdir()} == {usual}


def test_a_run_that_fails_exports_nothing(bert_folder, tmp_path):
    """Only a run that ended well leaves an export."""
    with pytest.raises(KeyboardInterrupt):
        train(bert_folder, tmp_path, Crash(2))
    assert not (tmp_path / "export-hf").exists()


def test_it_only_observes(bert_folder, tmp_path):
    """Weights with and without it are bit-identical."""
    shared = [HFModel(str(bert_folder), labels=LABELS), Tokenize(), Pad(), Loader(2), SGD(lr=0.1), Evaluate()]
    with_it = Trainer(plugins=[*shared, ExportHF()], output=tmp_path, steps=3)
    without = Trainer(plugins=shared, steps=3)
    for trainer in (with_it, without):
        trainer.fit(ROWS, evaluate=ROWS)
    assert_same_weights(with_it.run.model, without.run.model)


def test_what_cannot_be_exported_is_refused_before_training(bert_folder, tmp_path):
    """A model that is not transformers', and a run with no place to export to, are refused with what to do."""
    with pytest.raises(
        ConfigError, match=r"export-hf needs a transformers model. Received: Net. Use export-safetensors"
    ):
        fit(net(), [SGD(), ExportHF()], columns(), steps=1, output=tmp_path)
    with pytest.raises(ConfigError, match="export-hf needs a place: give it `to`"):
        train(bert_folder, None)


def test_unknown_format_names_those_there_are(bert_folder, tmp_path):
    """Asking for a format that no plugin writes says which formats the run has."""
    trainer = train(bert_folder, tmp_path)
    with pytest.raises(ConfigError, match=r"no plugin of this run exports 'onnx'. It has: \['hf'\]"):
        trainer.export("onnx", tmp_path / "x")


# --- causal models: settings of the configuration, tied weights, types, shards, adapters -------------------------------

IDS = torch.arange(48).view(4, 12) % 31 + 1


def llama(**changes):
    """Return a small Llama whose output layer is its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LlamaConfig(**{**sizes, "intermediate_size": 32, "tie_word_embeddings": True, **changes})
        return LlamaForCausalLM(config)


def train_llama(output, *extra, model=None, steps=2, **options):
    """Train the Llama on a few ids and export it."""
    plugins = [SGD(lr=0.1), ExportHF(**options), *extra]
    trainer = Trainer(model or llama(), plugins, output=output, steps=steps, device="cpu")
    trainer.fit({"input_ids": IDS, "labels": IDS})
    return trainer


def scores(model, ids=IDS[:3, :7]):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def causal(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def config_of(folder, name="config.json"):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_dtype_is_that_of_files_and_configuration(dtype, tmp_path):
    """The loaded model is, bit for bit, what torch's own cast makes of the trained one, which stays as it is."""
    trainer = train_llama(tmp_path, dtype=dtype)
    model = causal(tmp_path / "export-hf")
    assert {p.dtype for p in trainer.run.model.parameters()} == {torch.float32}
    wanted = getattr(torch, dtype or "float32")
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert config_of(tmp_path / "export-hf")["dtype"] == (dtype or "float32")
    reference = copy.deepcopy(trainer.run.model).to(wanted)
    assert_same_weights(model, reference)
    if dtype in (None, "float32"):  # rotary frequencies are computed anew: `to` would have rounded them
        assert torch.equal(scores(model), scores(reference))
    else:  # weights have 8 or 11 bits: a logit moves by no more than some steps of that size
        away = (scores(model).float() - scores(trainer.run.model)).abs().max()
        assert away < 8 * torch.finfo(wanted).eps * scores(trainer.run.model).abs().max()


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    """The embedding is in the file, the output layer is not, and transformers ties it again."""
    trainer = train_llama(tmp_path)
    with safe_open(tmp_path / "export-hf" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    model = causal(tmp_path / "export-hf")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(scores(model), scores(trainer.run.model))


def test_a_large_model_becomes_several_files_with_an_index(tmp_path):
    """No file but those of a single weight is larger than `max_shard_size`; the index leads transformers to all."""
    trainer = train_llama(tmp_path, max_shard_size="6KB")
    folder = tmp_path / "export-hf"
    index = config_of(folder, "model.safetensors.index.json")["weight_map"]
    assert len(set(index.values())) == len(list(folder.glob("*.safetensors"))) > 2
    assert max(path.stat().st_size for path in folder.glob("*.safetensors")) < 6_000 + 1_500  # and a header
    assert torch.equal(scores(causal(folder)), scores(trainer.run.model))


@pytest.mark.parametrize("size", ["5", "big", "1.5GB", "-1GB"])
def test_a_size_that_is_none_is_refused(size):
    """Sizes are whole numbers with a unit."""
    with pytest.raises(ValueError, match='as in "5GB"'):
        ExportHF(max_shard_size=size)


class Checkpointing:
    """A plugin that does to a configuration what memory savers do."""

    @hookimpl
    def transforms(self, run):
        def change(model):
            model.config.use_cache = False
            model.config.gradient_checkpointing = True
            model.generation_config.use_cache = False
            model.activation_checkpointing_enable()
            return model

        return [Transform(Stage.RECOMPUTE, change)]


@pytest.mark.parametrize("cached", [True, False])
def test_what_training_switched_is_put_back(cached, tmp_path):
    """`use_cache` is exported as the loaded model had it, checkpointing not at all; the run's model keeps its own."""
    trainer = train_llama(tmp_path, Checkpointing(), model=llama(use_cache=cached))
    folder = tmp_path / "export-hf"
    config = config_of(folder)
    assert config["use_cache"] is cached
    assert not config.get("gradient_checkpointing")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert trainer.run.model.config.use_cache is False
    assert not causal(folder).is_activation_checkpointing
    assert causal(folder).generation_config.use_cache == llama(use_cache=cached).generation_config.use_cache


def paths_in(folder, *known):
    """Return the files that hold one of these paths."""
    words = [str(path).encode() for path in known]
    return [f.name for f in folder.rglob("*") if f.is_file() and any(word in f.read_bytes() for word in words)]


def test_no_path_of_this_machine_is_exported(bert_folder, tmp_path):
    """Neither the folder the model came from, nor the run's, nor the user's, is in any file."""
    train(bert_folder, tmp_path, max_shard_size="5KB")
    assert paths_in(tmp_path / "export-hf", bert_folder, tmp_path, Path.home(), Path.cwd()) == []
    assert paths_in(tmp_path, bert_folder) == ["plan.json"]  # the search finds what is there


def test_settings_of_generation_and_the_chat_template_go_along(kit_folder, tmp_path):
    """What the loaded model generates with is in the folder, and the template with which its tokenizer makes chats."""
    from transformers import AutoTokenizer, GenerationConfig

    model, tokenizer = llama(), AutoTokenizer.from_pretrained(ensure(kit_folder, "causal"))
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5)

    class Tokenizer:
        @hookimpl
        def assembled(self, run):
            run.processor = tokenizer

    train_llama(tmp_path, Tokenizer(), model=model)
    again = causal(tmp_path / "export-hf").generation_config
    assert (again.max_new_tokens, again.temperature) == (7, 0.5)
    chat = [{"role": "user", "content": "red fish"}]
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export-hf")
    assert loaded_tokenizer.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )


def test_settings_that_transformers_does_not_save_are_refused_before_training(tmp_path):
    """A temperature without sampling would fail after the last step: it is told before the first."""
    model = llama()
    model.generation_config.temperature = 0.5
    with pytest.raises(ConfigError, match=r"does not save this model's generation_config[\s\S]*temperature"):
        train_llama(tmp_path, model=model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_become_a_folder_for_peft(tmp_path):
    """Of a model with adapters that nothing merges, the adapters alone are exported, without the base model's path."""
    peft = pytest.importorskip("peft")
    base = llama()
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(causal(tmp_path / "base"), settings)
    trainer = train_llama(tmp_path / "run", model=adapted, steps=3)
    folder = tmp_path / "run" / "export-hf"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118 - no mapping
    again = peft.PeftModel.from_pretrained(causal(tmp_path / "base"), folder)
    assert torch.equal(scores(again), scores(trainer.run.model))
    assert not torch.equal(scores(again), scores(causal(tmp_path / "base")))
    assert paths_in(folder, tmp_path) == []
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")  # the run's is untouched


def test_merged_adapters_are_an_ordinary_model(tmp_path):
    """With `merge-lora` the folder holds a plain Llama with the adapted model's scores, and the run keeps its adapters."""
    pytest.importorskip("peft")
    lora = [LoRA(rank=2, alpha=8.0, target_modules=("q_proj", "v_proj")), MergeLoRA()]
    trainer = train_llama(tmp_path, *lora, steps=3)
    model = causal(tmp_path / "export-hf")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.state_dict().keys() == llama().state_dict().keys()
    # W + s B A as one matrix sums in another order: some units in the last place of scores below 1
    torch.testing.assert_close(scores(model), scores(trainer.run.model), rtol=0.0, atol=1e-6)
    assert not torch.allclose(scores(model), scores(llama()), atol=1e-4)
    assert hasattr(trainer.run.model, "peft_config")
