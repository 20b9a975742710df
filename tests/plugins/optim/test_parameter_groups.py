"""`parameter-groups` puts every parameter in one group, with the rate and decay that rules, layers and roles give it."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, net, train_by_hand

from drivetrain import ConfigError, Trainer, hookimpl
from drivetrain.loop import Defaults
from drivetrain_plugins import SGD, AdamW, Linear, ParameterGroups


def groups_of(plugin, model):
    """Return the groups that the hook makes of a model."""
    return plugin.parameter_groups(cpu_run(model=model))


def built(plugin, model, optimizer=None):
    """Return, by parameter, the (rate, decay) that the run's optimizer has."""
    trainer = Trainer(model, [optimizer or AdamW(lr=0.1, weight_decay=0.01), plugin], steps=1, device="cpu")
    run = trainer.assemble(columns())
    return {
        name: (group["lr"], group["weight_decay"])
        for group in run.optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


class Block(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(width, width), torch.nn.LayerNorm(width)


class Encoder(torch.nn.Module):
    def __init__(self, layers, width=4):
        super().__init__()
        self.embeddings = torch.nn.ModuleDict({"word": torch.nn.Embedding(9, width), "norm": torch.nn.LayerNorm(width)})
        self.layer = torch.nn.ModuleList(Block(width) for _ in range(layers))


class Tower(torch.nn.Module):
    """An encoder of three layers, a position parameter, a pooler and a head, named as they usually are."""

    def __init__(self, layers=3):
        super().__init__()
        self.encoder = Encoder(layers)
        self.pos_embed = torch.nn.Parameter(torch.zeros(5, 4))
        self.pooler, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)


# --- none twice, none forgotten ----------------------------------------------------------------------------------------

LEAVES = [
    lambda: torch.nn.Linear(3, 2), lambda: torch.nn.LayerNorm(3), lambda: torch.nn.Embedding(4, 3),
    lambda: torch.nn.BatchNorm1d(2), lambda: torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU, Block,
]  # fmt: skip
TREES = st.recursive(
    st.sampled_from(LEAVES).map(lambda make: make()),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map(torch.nn.ModuleList),
        st.dictionaries(st.sampled_from(["head", "embed", "norm_1", "body", "x"]), inner, min_size=1, max_size=4).map(
            torch.nn.ModuleDict
        ),
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=80)
@given(tree=TREES, spare=st.sampled_from(["modules", "names", "nothing"]), data=st.data())
def test_every_parameter_is_in_one_group(tree, spare, data):
    """Whatever the modules, ties, frozen parameters and rules: each trained parameter is in one group, and no other."""
    model = torch.nn.Module()
    model.tree, model.own = tree, torch.nn.Parameter(torch.zeros(2))
    parameters = list(model.named_parameters())
    for (name, p), frozen in zip(
        parameters, data.draw(st.lists(st.booleans(), max_size=len(parameters))), strict=False
    ):
        p.requires_grad_(not frozen or name == "own")
    model.tied = next(iter(tree.modules()))  # all of it by a second name
    patterns = data.draw(st.lists(st.sampled_from([n for n, _ in parameters]), max_size=3, unique=True))
    rules = [{"pattern": n, "lr_factor": 0.1 * (i + 1), "weight_decay": 0.5} for i, n in enumerate(patterns)]
    found = groups_of(ParameterGroups(rules=rules, spare=spare), model)
    held = [id(p) for group in found for _, p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in model.parameters() if p.requires_grad})
    assert all(group["params"] for group in found)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)] == n for group in found for n, p in group["params"])


@settings(deadline=None, max_examples=60)
@given(tree=TREES)
def test_without_options_the_groups_are_the_kernels(tree):
    """The default decays what the kernel decays."""
    model = torch.nn.Module()
    model.tree, model.own = tree, torch.nn.Parameter(torch.zeros(2))
    run = cpu_run(model=model)
    expected = Defaults(run, model, {}).parameter_groups(run)
    found = groups_of(ParameterGroups(), model)
    key = lambda group: (group.get("weight_decay", 1.0), [n for n, _ in group["params"]])  # noqa: E731
    assert sorted(map(key, found)) == sorted(map(key, expected))


@settings(deadline=None, max_examples=60)
@given(tree=TREES)
def test_by_names_the_groups_are_the_references(tree):
    """With spare="names", what decays is what transformers' Trainer decays."""
    from transformers.trainer_pt_utils import get_parameter_names

    model = torch.nn.Module()
    model.tree, model.own, model.some_bias = (
        tree,
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
    )
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], patterns))
    found = groups_of(ParameterGroups(spare="names"), model)
    got = {n for group in found if "weight_decay" not in group for n, _ in group["params"]}
    assert got == {n for n, _ in model.named_parameters() if n in decayed}


# --- rules -------------------------------------------------------------------------------------------------------------


def test_rules_give_rates_and_decays():
    """The first rule that matches a name rules it; a rate is absolute or a factor, and a decay reaches biases, too."""
    rules = [
        {"pattern": "first.bias", "weight_decay": 0.3},
        {"pattern": "first", "lr": 0.5, "name": "stem"},
        {"pattern": "*norm*", "lr_factor": 0.1},
        {"pattern": "last.weight", "lr_factor": 2, "weight_decay": 0.0},
    ]
    assert built(ParameterGroups(rules=rules), net()) == {
        "first.weight": (0.5, 0.01),
        "first.bias": (0.1, 0.3),
        "norm.weight": (pytest.approx(0.01), 0.0),
        "norm.bias": (pytest.approx(0.01), 0.0),
        "last.weight": (0.2, 0.0),
        "last.bias": (0.1, 0.0),
    }


def test_run_equals_torch_by_hand():
    """A schedule multiplies each group's own rate: the run equals torch's over groups written by hand."""
    data, ours, theirs = columns(), net(), net()
    rules = [{"pattern": "first", "lr_factor": 0.1}, {"pattern": "norm", "lr": 0.5, "weight_decay": 0.2}]
    fit(ours, [AdamW(lr=0.03, weight_decay=0.1), Linear(warmup=0), ParameterGroups(rules=rules)], data, steps=8)
    groups = [
        {"params": [theirs.first.weight], "lr": 0.03 * 0.1},
        {"params": [theirs.first.bias], "lr": 0.03 * 0.1, "weight_decay": 0.0},
        {"params": [theirs.norm.weight, theirs.norm.bias], "lr": 0.5, "weight_decay": 0.2},
        {"params": [theirs.last.weight]},
        {"params": [theirs.last.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.03, weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (8 - step) / 8)
    train_by_hand(theirs, data, optimizer, steps=8, scheduler=scheduler)
    assert_same_weights(ours, theirs)


# --- layers, embeddings, head --------------------------------------------------------------------------------------------


def test_layer_decay_is_the_papers():
    """Layer i of n has decay^(n - i), embeddings below them decay^(n + 1), and what is above 1."""
    rates = {name: rate for name, (rate, _) in built(ParameterGroups(layer_decay=0.5), Tower(3)).items()}
    for name, rate in rates.items():
        power = 4 if "embed" in name else 3 - int(name.split(".")[2]) if "layer" in name else 0
        assert rate == pytest.approx(0.1 * 0.5**power), name
    assert len({round(r, 9) for r in rates.values()}) == 5


def test_head_and_embeddings_have_rates_of_their_own():
    """head_lr and embedding_lr are rates, above layer decay and below a rule."""
    plugin = ParameterGroups(
        head_lr=0.7,
        embedding_lr=0.2,
        layer_decay=0.5,
        rules=[{"pattern": "head.bias", "lr": 0.9}, {"pattern": "pooler"}],
    )
    found = built(plugin, Tower(2))
    assert found["head.weight"] == (0.7, 0.01)
    assert found["head.bias"] == (0.9, 0.0)
    assert found["encoder.embeddings.word.weight"] == found["pos_embed"] == (0.2, 0.01)
    assert found["encoder.embeddings.norm.weight"] == (0.2, 0.0)
    assert found["encoder.layer.1.linear.weight"] == (0.05, 0.01)
    assert found["pooler.weight"] == (0.1, 0.01)


@pytest.mark.parametrize(
    ("config", "model", "head", "depths"),
    [
        ("BertConfig", "BertForSequenceClassification", {"classifier"}, {"bert.encoder.layer": 2}),
        ("LlamaConfig", "LlamaForCausalLM", {"lm_head"}, {"model.layers": 2}),
        ("T5Config", "T5ForConditionalGeneration", set(), {"encoder.block": 2, "decoder.block": 3}),
        ("ViTConfig", "ViTForImageClassification", {"classifier"}, {"vit.encoder.layer|vit.layers": 2}),
    ],
)
def test_models_of_transformers_are_understood(config, model, head, depths):
    """Layers, embeddings and head of usual architectures are found; an encoder and a decoder count from their own tops."""
    import transformers

    sizes = {
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8,
        "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2, "image_size": 8,
        "patch_size": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    plugin = ParameterGroups(layer_decay=0.5, head_lr=3.0 if head else None)  # T5 ties its head to the embeddings
    factors = {n: g for g in groups_of(plugin, made) for n, _ in g["params"]}
    assert {n.partition(".")[0] for n, g in factors.items() if g.get("lr") == 3.0} == head
    deepest = max(depths.values())
    for prefixes, length in depths.items():
        for name, group in factors.items():
            for prefix in prefixes.split("|"):
                if name.startswith(f"{prefix}."):
                    index = int(name.removeprefix(f"{prefix}.").partition(".")[0])
                    assert group["lr_factor"] == 0.5 ** (length - index), name
    below = {n for n, g in factors.items() if g.get("lr_factor") == 0.5 ** (deepest + 1)}
    assert below
    assert all("embed" in n or "shared" in n for n in below)


def test_layers_can_be_named():
    """A Sequential of unlike modules is no list of layers by itself, but can be named as one."""
    model = torch.nn.Module()
    model.stack = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"finds no layers(.|\n)*stack"):
        groups_of(ParameterGroups(layer_decay=0.5), model)
    found = groups_of(ParameterGroups(layer_decay=0.5, layers=["stack"]), model)
    factors = {n: g.get("lr_factor") for g in found for n, _ in g["params"]}
    assert factors["stack.0.weight"] == 0.5**3
    assert factors["stack.2.weight"] == 0.5


# --- what it says --------------------------------------------------------------------------------------------------------


def test_groups_are_told(caplog):
    """The log has a table with each group's name, tensors, parameters, rate and decay, which can be asked for, too."""
    plugin = ParameterGroups(rules=[{"pattern": "first", "lr": 0.5, "name": "stem"}])
    with caplog.at_level(logging.INFO, "drivetrain"):
        built(plugin, net())
    assert plugin.describe() == [
        {"name": "stem", "tensors": 1, "parameters": 60, "lr": 0.5, "weight_decay": 0.01},
        {"name": "stem, no decay", "tensors": 1, "parameters": 10, "lr": 0.5, "weight_decay": 0.0},
        {"name": "others, no decay", "tensors": 3, "parameters": 23, "lr": 0.1, "weight_decay": 0.0},
        {"name": "others", "tensors": 1, "parameters": 30, "lr": 0.1, "weight_decay": 0.01},
    ]
    lines = caplog.text.splitlines()
    assert any(line.split() == ["group", "tensors", "parameters", "rate", "decay"] for line in lines)
    assert any(line.split() == ["stem", "1", "60", "0.5", "0.01"] for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": [{"pattern": "lats", "lr": 1.0}]}, r"'lats'(.|\n)*'last"),
        ({"rules": [{"pattern": "last"}, {"pattern": "last.bias"}]}, "only what the rules before it match"),
        ({"layer_decay": 0.9}, "finds no layers"),
        ({"embedding_lr": 0.9}, "embedding_lr finds no embedding"),
        ({"head_lr": 0.9}, "head_lr finds no head"),
        ({"head_lr": 0.9, "head": ["classifier"]}, "'classifier'"),
    ],
)
def test_what_is_not_in_the_model_is_refused(options, message):
    """A pattern or role that the model has not is refused, with names that it has."""
    with pytest.raises(ConfigError, match=message):
        built(ParameterGroups(**options), net())


@pytest.mark.parametrize(
    "options",
    [
        {"rules": [{"lr": 0.1}]},
        {"rules": [{"pattern": "a", "rate": 0.1}]},
        {"rules": [{"pattern": "a", "lr": 0.1, "lr_factor": 2}]},
        {"rules": [{"pattern": "a", "lr": -1}]},
        {"rules": "first"},
        {"layers": ["a"]},
        {"head": ["a"]},
        {"embeddings": ["a"]},
    ],
)
def test_rules_that_make_no_sense_are_refused(options):
    """A rule without a pattern, with an unknown key or two rates, and a list that nothing reads are refused."""
    with pytest.raises(ValueError, match="Received"):
        ParameterGroups(**options)


def test_optimizer_that_drops_rates_is_refused():
    """Where an optimizer does not keep a group's rate, the run is refused instead of training with another."""

    class Careless:
        @hookimpl
        def build_optimizer(self, run, groups):
            return torch.optim.SGD([p for group in groups for _, p in group["params"]], lr=0.1)

    for rule in ({"lr": 0.5}, {"lr_factor": 0.5}, {"weight_decay": 0.5}):
        with pytest.raises(ConfigError, match=r"'careless' does not keep 'first'"):
            built(ParameterGroups(rules=[{"pattern": "first", **rule}]), net(), Careless())


def test_names_are_those_of_the_model_inside_its_wrappers():
    """Patterns are on the model's own names, also when it is compiled, and the groups name what the run has."""
    inner = net()
    compiled = torch.compile(inner, backend="eager")
    found = groups_of(ParameterGroups(rules=[{"pattern": "first", "lr": 0.5}], head_lr=None), compiled)
    held = {n for g in found if g.get("lr") == 0.5 for n, _ in g["params"]}
    assert held == {"_orig_mod.first.weight", "_orig_mod.first.bias"}


def test_rates_survive_a_resume():
    """Saved in the middle with a schedule and momentum, the run ends as if nothing had been."""
    from around_helpers import SaveAt, go_on, same, weights_of

    def plugins():
        rules = [{"pattern": "first", "lr_factor": 0.3}, {"pattern": "last", "lr": 0.4}]
        return [SGD(lr=0.1, momentum=0.9), Linear(warmup=0), ParameterGroups(rules=rules)]

    save, ours = SaveAt(3), net(0.1)
    fit(ours, [*plugins(), save], columns(), steps=7)
    run = go_on(net(0.1), plugins(), columns(), save.state, steps=7)
    assert same(weights_of(ours), weights_of(run.model))
