"""`lora`: low-rank additions to frozen weights, compared with additions written by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from plugin_helpers import Crash, assert_same_weights, columns, cpu_run, fit, net, train_by_hand

from drivetrain import ConfigError, Settings, Trainer
from drivetrain.testing.files import ensure
from drivetrain_plugins import SGD, AdamW, Checkpoint, HFModel, Loader, LoRA, Pad

FOLDER_ROWS = [{"input_ids": [2, 5 + n % 9, 7, 9 + n % 5, 3], "labels": n % 3} for n in range(24)]
SENTENCES = {"input_ids": torch.tensor([[2, 5, 6, 7, 3], [2, 9, 10, 11, 3]]), "attention_mask": torch.ones(2, 5).long()}


def adapted(model, run=None, **options):
    """Return `model` with adapters."""
    plugin = LoRA(**options)
    return plugin.transforms(run or cpu_run())[0].apply(model)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def shaken(model):
    """Give B other values than zero."""
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draws))
    return model


class ByHand(torch.nn.Module):
    """W x + s B A x."""

    def __init__(self, linear, a, b, scale):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a, self.b = torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.a.T @ self.b.T)


@pytest.fixture
def bert(kit_folder):
    return str(ensure(kit_folder, "model"))


@pytest.fixture
def causal(kit_folder):
    return str(ensure(kit_folder, "causal"))


def classifier(bert):
    return HFModel(bert, labels=("a", "b", "c")).build_model(cpu_run()).eval()


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6.0 / 3), (True, 6.0 / math.sqrt(3))])
def test_gradients_are_those_by_hand(rslora, scale):
    """In float64, outputs and the gradients of A and B equal those of W x + s B A x; a rank may exceed the layer."""
    plain = torch.nn.Sequential(torch.nn.Linear(6, 4)).double()
    weights = [parameter.detach().clone() for parameter in plain.parameters()]
    model = shaken(adapted(plain, rank=3, alpha=6.0, use_rslora=rslora).double())
    layer = model.get_base_model()[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    linear = torch.nn.Linear(6, 4).double().requires_grad_(False)
    linear.load_state_dict(dict(zip(["weight", "bias"], weights, strict=True)))
    hand = ByHand(linear, a.detach(), b.detach(), scale)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for module in (model, hand):
        module(x).square().mean().backward()
    torch.testing.assert_close(model(x), hand(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(a.grad, hand.a.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(b.grad, hand.b.grad, rtol=0, atol=1e-12)
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_begins_as_the_model_was(init):
    """Whatever A and B begin as, the outputs at the start are the model's: bit for bit where W is left alone."""
    wanted = net()(**columns())["logits"]
    got = adapted(net(), rank=4, init=init)(**columns())["logits"]
    limit = 0 if init in ("default", "gaussian") else 1e-5
    torch.testing.assert_close(got, wanted, rtol=0, atol=limit)


def test_run_equals_one_by_hand():
    """A run trains A and B to what a hand-written loop does, from A drawn from stream "lora", and nothing else."""
    run, theirs = cpu_run(), net()
    begun = adapted(net(), run, rank=2, alpha=8.0).get_base_model()
    base = [parameter.detach().clone() for parameter in net().parameters()]
    for name in ("first", "last"):
        made = getattr(begun, name)
        hand = ByHand(getattr(theirs, name), made.lora_A["default"].weight, made.lora_B["default"].weight, 4.0)
        setattr(theirs, name, hand)
    theirs.requires_grad_(False)
    learned = [p.requires_grad_() for n, p in theirs.named_parameters() if n.endswith((".a", ".b"))]
    seed = run.settings.seed
    trainer, _ = fit(net(), [AdamW(lr=0.05, fused=False), LoRA(rank=2, alpha=8.0)], columns(), steps=7, seed=seed)
    train_by_hand(theirs, columns(), torch.optim.AdamW(learned, lr=0.05, weight_decay=0.0), steps=7, seed=seed)
    ours = trainer.run.model.get_base_model()
    for name in ("first", "last"):
        for key in ("A", "B"):
            got = getattr(getattr(ours, name), f"lora_{key}")["default"].weight
            torch.testing.assert_close(got, getattr(getattr(theirs, name), key.lower()), rtol=0, atol=1e-6)
    left = [p for n, p in ours.named_parameters() if "lora_" not in n]
    assert all(torch.equal(a, b) for a, b in zip(left, base, strict=True))
    updated = {name for group in trainer.run.optimizer.param_groups for name in group["param_names"]}
    assert updated == trained(trainer.run.model) == {n for n, _ in trainer.run.model.named_parameters() if "lora_" in n}
    assert len(trainer.run.optimizer.state) == 4


def test_seed_alone_decides_the_start():
    """The same seed draws the same A, another one another, and a transform before it changes nothing."""
    first, again, other = adapted(net()), adapted(net()), adapted(net(), cpu_run(settings=Settings(seed=9)))
    assert_same_weights(first, again)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_half_precision_bases_get_float32_adapters(causal):
    """Additions to a bfloat16 model are float32 and the rest is as it was; the model still computes."""
    model = adapted(HFModel(causal, task="causal-lm", arguments={"dtype": "bfloat16"}).build_model(cpu_run()))
    kinds = {("lora_" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    model(**SENTENCES, labels=SENTENCES["input_ids"]).loss.backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())


# --- what is adapted and what is trained ------------------------------------------------------------------------------


def test_a_classifiers_head_is_trained(bert):
    """The head of a classification model is trained in full, has no additions, and the configuration names the task."""
    model = adapted(classifier(bert))
    whole = {name for name in trained(model) if "lora_" not in name}
    prefix = "base_model.model.classifier.modules_to_save.default."
    assert whole == {f"{prefix}weight", f"{prefix}bias"}
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert not any("classifier" in name for name in trained(model) - whole)
    assert not any(
        "classifier" in n for n in trained(adapted(classifier(bert), modules_to_save=[])) if "lora_" not in n
    )


def test_causal_models_keep_their_head(causal):
    """Every linear layer but the output's gets additions, and only they are trained; inputs go through unchanged."""
    plain = HFModel(causal, task="causal-lm").build_model(cpu_run()).eval()
    wanted = plain(**SENTENCES, position_ids=torch.arange(5)[None] * 2, use_cache=False)
    model = adapted(plain)
    got = model(**SENTENCES, position_ids=torch.arange(5)[None] * 2, use_cache=False)
    assert torch.equal(got.logits, wanted.logits)
    assert got.keys() == wanted.keys()
    places = {name.split(".lora_")[0].rpartition(".")[2] for name in trained(model)}
    assert places == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({"target_modules": ["q_proj"]}, {("0", "q_proj"), ("1", "q_proj")}),
        ({"target_modules": r".*layers\.1\..*_proj", "exclude_modules": r".*mlp.*|.*[kv]_proj"}, {("1", "q_proj"), ("1", "o_proj")}),
        ({"target_modules": ["k_proj", "v_proj"], "layers_to_transform": [0]}, {("0", "k_proj"), ("0", "v_proj")}),
    ],
)  # fmt: skip
def test_targets(options, places, causal):
    """Names, expressions, exclusions and numbers of layers choose the same modules as they do in peft."""
    model = adapted(HFModel(causal, task="causal-lm").build_model(cpu_run()), **options)
    names = [name.split(".lora_")[0].split(".") for name in trained(model)]
    assert {(name[name.index("layers") + 1], name[-1]) for name in names} == places


def test_says_how_much_is_trained(caplog):
    """At the start of a run the numbers of trained and of all parameters are told."""
    with caplog.at_level("INFO", "drivetrain"):
        fit(net(), [SGD(), LoRA(rank=2)], columns(), steps=1)
    own = 2 * (6 + 10) + 2 * (10 + 3)
    total = own + sum(parameter.numel() for parameter in net().parameters())
    assert f"lora: {own} of {total} parameters are trained" in caplog.text


# --- going on --------------------------------------------------------------------------------------------------------


def test_resumes_bit_for_bit(bert, tmp_path):
    """After two steps, saved and assembled anew, a run with dropout and a new head ends as if it had not stopped."""

    def trainer(name, at=None):
        plugins = [HFModel(bert, labels=("a", "b", "c")), Pad(), Loader(batch_size=4), AdamW(lr=0.02)]
        plugins += [LoRA(rank=2, dropout=0.2), Checkpoint(every="2 steps"), Crash(at)]
        return Trainer(None, plugins, output=tmp_path / name, device="cpu", steps=5, log_every="1 step")

    whole, second = trainer("whole"), trainer("parts")
    whole.fit(FOLDER_ROWS)
    with pytest.raises(KeyboardInterrupt):
        trainer("parts", at=3).fit(FOLDER_ROWS)
    second.fit(FOLDER_ROWS, resume=True)
    assert_same_weights(whole.run.model, second.run.model)


def test_fitting_a_given_model_again_goes_on():
    """A model that was given keeps its adapters; assembling it twice changes nothing."""
    plugin, model = LoRA(rank=2), net()
    trainer = Trainer(model, [SGD(lr=0.1), plugin], device="cpu", steps=3)
    trainer.assemble(columns())
    trainer.fit(columns())
    once, _ = fit(net(), [SGD(lr=0.1), LoRA(rank=2)], columns(), steps=3)
    assert_same_weights(trainer.run.model, once.run.model)
    kept = trainer.run.model
    trainer.fit(columns())
    assert trainer.run.model is kept
    assert any(not torch.equal(a, b) for a, b in zip(kept.parameters(), once.run.model.parameters(), strict=True))


def test_goes_on_from_a_saved_adapter(bert, tmp_path):
    """A saved adapter brings its configuration, its weights and its head, and is trained further."""
    model = shaken(adapted(classifier(bert), rank=3, alpha=5.0, target_modules=["query"]))
    with torch.no_grad():
        model.get_base_model().classifier.weight.add_(1.0)
    model.save_pretrained(tmp_path / "adapter")
    again = adapted(classifier(bert), adapter=str(tmp_path / "adapter"))
    assert torch.equal(again(**SENTENCES).logits, model(**SENTENCES).logits)
    assert trained(again) == trained(model)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["frist"]}, "target_modules names(.|\n)*'frist'(.|\n)*'first'(.|\n)*Linear: first, last"),
        ({"target_modules": "nothing.*"}, "target_modules names(.|\n)*LayerNorm: norm"),
        ({"target_modules": ["norm"]}, "peft cannot put adapters(.|\n)*LayerNorm"),
        ({"exclude_modules": ["lost"]}, "exclude_modules names(.|\n)*'last'"),
        ({"modules_to_save": ["head"]}, "modules_to_save names(.|\n)*'head'"),
        ({"exclude_modules": "first|last"}, "peft cannot put adapters(.|\n)*excluded"),
        ({"arguments": {"rank_patern": {}}}, "LoraConfig lacks(.|\n)*rank_pattern"),
        ({"adapter": "nowhere"}, "no saved adapter(.|\n)*nowhere"),
    ],
)
def test_what_cannot_be_adapted_is_refused(options, message):
    """Names that match nothing, layers peft cannot adapt, unknown fields and folders are told before step 0."""
    with pytest.raises(ConfigError, match=message):
        fit(net(), [SGD(), LoRA(**options)], columns(), steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments": {"r": 4}}, "option 'rank'"),
        ({"adapter": "folder", "rank": 4}, "brings its own configuration.*rank"),
        ({"init": "eva"}, "init must be one of"),
        ({"target_modules": "*bad"}, "regular expression"),
        ({"target_modules": []}, "name modules"),
        ({"modules_to_save": "head"}, "a list of names"),
        ({"rank": 0}, "rank must be"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    """What is said twice, or is none of the values there are, is refused where the plugin is made."""
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


def test_adapters_that_do_not_fit_are_refused(bert, causal, tmp_path):
    """An adapter of another model, of another kind, and one whose file is damaged are refused with what differs."""
    adapted(classifier(bert), target_modules=["query"]).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"peft cannot put adapters(.|\n)*query"):
        adapted(HFModel(causal, task="causal-lm").build_model(cpu_run()), adapter=str(tmp_path / "bert"))
    config = json.loads((tmp_path / "bert" / "adapter_config.json").read_text())
    (tmp_path / "bert" / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(
        ConfigError, match=r"does not fit the model(.|\n)*lora_A(.|\n)*\(8, 16\), in the model \(4, 16\)"
    ):
        adapted(classifier(bert), adapter=str(tmp_path / "bert"))
    (tmp_path / "bert" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ConfigError, match=r"cannot be read|another kind"):
        adapted(classifier(bert), adapter=str(tmp_path / "bert"))


def test_a_model_with_adapters_is_refused():
    """Adapters on adapters are refused."""
    with pytest.raises(ConfigError, match=r"has adapters already(.|\n)*first"):
        fit(adapted(net()), [SGD(), LoRA()], columns(), steps=1)
