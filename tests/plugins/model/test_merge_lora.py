"""`merge-lora`: exports are ordinary models, and the run keeps its adapters."""

from __future__ import annotations

import functools

import pytest
import torch
from plugin_helpers import columns, cpu_run, fit, net

from drivetrain import PlanError, Trainer, TrainingError
from drivetrain.testing.files import ensure
from drivetrain_plugins import SGD, AdamW, CausalLM, ExportHF, ExportSafetensors, HFModel, Loader, LoRA, MergeLoRA, Pad
from drivetrain_plugins.shared.exports import export_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 10, 11, 3]])
CLASSES = [{"input_ids": [2, 5 + n % 9, 7, 3], "labels": n % 3} for n in range(16)]
TEXTS = [{"input_ids": [2, 5 + n % 9, 7, 9 + n % 5, 3]} for n in range(16)]


def kept(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(kit_folder, task, *plugins, output=None, steps=3, **options):
    """Train a small model of `task` with adapters and return its run."""
    if task == "causal-lm":
        start = [HFModel(str(ensure(kit_folder, "causal")), task=task, **options), CausalLM()]
    else:
        start = [HFModel(str(ensure(kit_folder, "model")), labels=("a", "b", "c"), **options), Pad()]
    trainer = Trainer(
        None, [*start, Loader(batch_size=8), AdamW(lr=0.05), *plugins], output=output, device="cpu", steps=steps
    )
    trainer.fit(TEXTS if task == "causal-lm" else CLASSES)
    trainer.run.model.eval()
    return trainer.run


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("on_cpu", [False, True])
def test_merged_weights_are_w_plus_b_a(on_cpu):
    """The exported module has the keys and the class it came with, and W + alpha/rank B A; the run's model is as it was."""
    trainer, _ = fit(net(), [SGD(lr=0.5), LoRA(rank=2, alpha=6.0), MergeLoRA(on_cpu=on_cpu)], columns(), steps=4)
    before, base = kept(trainer.run.model), net().state_dict()
    merged = export_model(trainer.run)
    assert type(merged).__name__ == "Net"
    assert list(merged.state_dict()) == list(base)
    for name, tensor in merged.state_dict().items():
        wanted, place = base[name], f"base_model.model.{name.removesuffix('.weight')}"
        if f"{place}.lora_A.default.weight" in before:
            wanted = wanted + 3.0 * before[f"{place}.lora_B.default.weight"] @ before[f"{place}.lora_A.default.weight"]
            assert not torch.equal(tensor, base[name])
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6)
    after = trainer.run.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init": "pissa"}, {"bias": "all"}])
def test_merged_classifier_is_loaded_by_transformers(options, kit_folder, tmp_path):
    """The merged folder is one of transformers, the trained head in it, and computes what the run's model does."""
    from transformers import AutoModelForSequenceClassification

    run = train(kit_folder, "sequence-classification", LoRA(rank=2, **options), MergeLoRA())
    export_model(run).save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    base = HFModel(str(ensure(kit_folder, "model")), labels=("a", "b", "c")).build_model(cpu_run())
    assert list(loaded.state_dict()) == list(base.state_dict())
    assert not torch.equal(loaded.classifier.weight, base.classifier.weight)
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "name"), [("causal-lm", "AutoModelForCausalLM"), ("sequence-classification", "AutoModelForSequenceClassification")]
)  # fmt: skip
def test_without_it_adapters_are_exported(task, name, kit_folder, tmp_path):
    """Without the plugin the model to write has its adapters; peft loads them onto the base, with the same logits."""
    import peft
    import transformers

    run = train(kit_folder, task, LoRA(rank=2))
    run.model.save_pretrained(tmp_path / "adapter")
    classes = {} if task == "causal-lm" else {"num_labels": 3}
    folder = ensure(kit_folder, "causal" if task == "causal-lm" else "model")
    base = getattr(transformers, name).from_pretrained(folder, **classes)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(run.model))
    assert not torch.equal(logits(loaded.unload()), logits(run.model))


def test_half_precision_is_merged_in_its_precision(kit_folder):
    """A bfloat16 model stays one: its weights are those of the float32 sum, rounded once."""
    run = train(
        kit_folder, "causal-lm", LoRA(rank=2, target_modules=["q_proj"]), MergeLoRA(), arguments={"dtype": "bfloat16"}
    )
    merged = export_model(run)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    layer = run.model.get_base_model().model.layers[0].self_attn.q_proj
    wanted = layer.base_layer.weight.float() + 8.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    got = merged.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(got, wanted.bfloat16())
    run = train(kit_folder, "sequence-classification", LoRA(rank=2), MergeLoRA(), arguments={"dtype": "bfloat16"})
    assert {parameter.dtype for parameter in export_model(run).parameters()} == {torch.bfloat16}


def test_exporters_write_ordinary_models(kit_folder, tmp_path):
    """What export-hf and export-safetensors write has the base model's keys and the run's logits."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    both = [ExportHF(to=str(tmp_path / "hf")), ExportSafetensors(to=str(tmp_path / "weights.safetensors"))]
    run = train(kit_folder, "causal-lm", LoRA(rank=2), MergeLoRA(), *both)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0, atol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(ensure(kit_folder, "causal"))
    keys = load_file(tmp_path / "weights.safetensors").keys()
    assert keys <= base.state_dict().keys()
    assert not any("lora" in key for key in keys)


def test_export_hf_alone_writes_the_adapters(kit_folder, tmp_path):
    """Without merging, export-hf's folder is one for PeftModel.from_pretrained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = train(kit_folder, "causal-lm", LoRA(rank=2), ExportHF(to=str(tmp_path / "hf")))
    assert (tmp_path / "hf" / "adapter_config.json").is_file()
    base = AutoModelForCausalLM.from_pretrained(ensure(kit_folder, "causal"))
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "hf")), logits(run.model))


def test_hooks_on_modules_are_not_copied():
    """A hook that a plugin has hung on a module goes on pointing to the plugin: nothing of the run is copied."""
    trainer, _ = fit(net(), [SGD(), LoRA(rank=2), merge := MergeLoRA()], columns(), steps=1)
    run = trainer.run
    run.model.get_base_model().norm.register_forward_hook(functools.partial(lambda *_: None, merge, run))
    (hook,) = export_model(run).norm._forward_hooks.values()
    assert hook.args == (merge, run)


def test_weights_that_are_not_finite_are_refused():
    """Adapters that have become NaN are told instead of written."""
    trainer, _ = fit(net(), [SGD(), LoRA(rank=2), MergeLoRA()], columns(), steps=1)
    with torch.no_grad():
        trainer.run.model.get_base_model().first.lora_B["default"].weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="merge-lora: the adapters cannot be merged"):
        export_model(trainer.run)


def test_nothing_to_merge_is_refused():
    """A run without adapters is told what it lacks."""
    with pytest.raises(PlanError, match="'merge-lora' requires 'adapters'"):
        fit(net(), [SGD(), MergeLoRA()], columns(), steps=1)
