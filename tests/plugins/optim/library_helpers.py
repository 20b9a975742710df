"""What the tests of other libraries' optimizers share: a model that is worth quantizing, and each library by hand."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from plugin_helpers import cpu_run

from drivetrain import Catalogue, Trainer, hookimpl
from drivetrain.loop import Defaults
from drivetrain.testing import digests as kit_format
from drivetrain_plugins.checkpoint import _format as checkpoint_format

EXTRA = "pip install 'drivetrain[optimizers]'"


class Wide(torch.nn.Module):
    """Two matrices large enough to be quantized (8192 elements), an embedding among them, and small parameters."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(128, 64)
        self.first = torch.nn.Linear(64, 128)
        self.norm = torch.nn.LayerNorm(128)
        self.last = torch.nn.Linear(128, 3)

    def forward(self, ids, labels):
        logits = self.last(torch.tanh(self.norm(self.first(self.embed(ids)))))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def wide(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return Wide().to(dtype)


def tokens():
    draws = torch.Generator().manual_seed(3)
    shape = {"ids": 128, "labels": 3}
    return {name: torch.randint(0, top, (40,), generator=draws) for name, top in shape.items()}


def halve(step):
    """A schedule whose factors are exact in any type."""
    return 1.0 if step < 7 else 0.5


def split(model, decay, lr):
    """Three groups: a decayed one, one without decay, and a head with a rate of its own."""
    head = [(f"last.{name}", p) for name, p in model.last.named_parameters()]
    rest = [(name, p) for name, p in model.named_parameters() if not name.startswith("last")]
    matrices = [(name, p) for name, p in rest if p.ndim == 2]
    spared = [(name, p) for name, p in rest if p.ndim == 1]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": spared, "weight_decay": 0.0},
        {"params": head, "weight_decay": decay, "lr": lr * 2},
    ]


class Shape:
    """Brings the groups and the schedule."""

    def __init__(self, decay, lr):
        self.decay, self.lr = decay, lr

    @hookimpl
    def parameter_groups(self, run):
        return split(run.model, self.decay, self.lr)

    @hookimpl
    def build_schedule(self, run):
        return halve


# --- each library, used by hand ---------------------------------------------------------------------------------------


def lion(model, groups, **options):
    from lion_pytorch import Lion

    return Lion(groups, **options)


def ademamix(model, groups, warmup_steps=None, **options):
    from pytorch_optimizer import AdEMAMix

    return AdEMAMix(groups, t_alpha_beta3=warmup_steps, weight_decouple=True, **options)


def torchao(bits):
    def make(model, groups, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao import optim

        return getattr(optim, f"AdamW{bits}bit")(groups, **options)

    return make


def bitsandbytes(name):
    def make(model, groups, warmup_steps=None, bits=8, embedding_bits=32, **options):
        from bitsandbytes import optim

        if warmup_steps:
            options |= {"t_alpha": warmup_steps, "t_beta3": warmup_steps}
        made = getattr(optim, name)(groups, optim_bits=bits, **options)
        if bits != embedding_bits:
            config = {"optim_bits": embedding_bits}
            made.mng.register_module_override(model.embed, "weight", config)
        return made

    return make


def stable(model, groups, decouple_lr=False, **options):
    from optimi import StableAdamW

    groups = [{**group, "max_lr": group.get("lr", options["lr"]) if decouple_lr else None} for group in groups]
    return StableAdamW(groups, decouple_lr=decouple_lr, weight_decay=0.0, **options)


def pytorch_optimizer(name):
    def make(model, groups, **options):
        import pytorch_optimizer

        if "precondition_frequency" in options and name == "Shampoo":
            options["preconditioning_compute_steps"] = options.pop("precondition_frequency")
            options["weight_decouple"] = True
        return getattr(pytorch_optimizer, name)(groups, **options)

    return make


def grokadamw(model, groups, **options):
    from grokadamw import GrokAdamW

    return GrokAdamW(groups, **options)


def case(plugin, by_hand, module, install=EXTRA, decay=0.1, **options):
    return SimpleNamespace(
        plugin=plugin, by_hand=by_hand, module=module, install=install, decay=decay, options={"lr": 0.004, **options}
    )


PO, AO, BNB = "pytorch_optimizer", "torchao.optim", "bitsandbytes.optim"
CASES = {
    "lion": case("lion", lion, "lion_pytorch", betas=(0.8, 0.95)),
    "ademamix": case("ademamix", ademamix, PO, betas=(0.8, 0.95, 0.99), alpha=3.0, eps=1e-6),
    "ademamix-warmup": case("ademamix", ademamix, PO, warmup_steps=12, foreach=False),
    "adamw-8bit": case("adamw-8bit", torchao(8), AO, betas=(0.8, 0.95), eps=1e-6),
    "adamw-8bit-blocks": case("adamw-8bit", torchao(8), AO, block_size=128),
    "adamw-8bit-random": case("adamw-8bit", torchao(8), AO, bf16_stochastic_round=True),
    "adamw-4bit": case("adamw-4bit", torchao(4), AO, betas=(0.8, 0.95), eps=1e-6),
    "adamw-4bit-random": case("adamw-4bit", torchao(4), AO, bf16_stochastic_round=True),
    "bnb-adamw": case("bnb-adamw", bitsandbytes("AdamW"), BNB, betas=(0.8, 0.95), eps=1e-6),
    "bnb-adamw-32": case("bnb-adamw", bitsandbytes("AdamW"), BNB, bits=32),
    "bnb-adamw-all-8": case("bnb-adamw", bitsandbytes("AdamW"), BNB, embedding_bits=8, min_8bit_size=16),
    "bnb-lion": case("bnb-lion", bitsandbytes("Lion"), BNB, betas=(0.8, 0.95)),
    "bnb-ademamix": case("bnb-ademamix", bitsandbytes("AdEMAMix"), BNB, betas=(0.8, 0.95, 0.99), alpha=3.0),
    "bnb-ademamix-warmup": case("bnb-ademamix", bitsandbytes("AdEMAMix"), BNB, warmup_steps=12),
    "bnb-rmsprop": case("bnb-rmsprop", bitsandbytes("RMSprop"), BNB, alpha=0.9, eps=1e-6),
    "stable-adamw": case("stable-adamw", stable, "optimi", betas=(0.8, 0.95), eps=1e-5),
    "stable-adamw-decoupled": case("stable-adamw", stable, "optimi", decay=9e-4, decouple_lr=True),
    "soap": case("soap", pytorch_optimizer("SOAP"), PO, precondition_frequency=3, betas=(0.9, 0.99), eps=1e-7),
    "soap-all": case(
        "soap", pytorch_optimizer("SOAP"), PO, precondition_frequency=2, shampoo_beta=0.8, max_precondition_dim=100,
        precondition_1d=True, normalize_gradient=True, correct_bias=False,
    ),
    "shampoo": case("shampoo", pytorch_optimizer("Shampoo"), PO, precondition_frequency=2, momentum=0.9),
    "grokadamw": case("grokadamw", grokadamw, "grokadamw", "pip install --no-deps grokadamw", betas=(0.8, 0.95),
                      alpha_init=0.9, lamb=1.0, gamma=0.05, gradient_clipping=0.05),
}  # fmt: skip
BY_PLUGIN = {made.plugin: made for made in reversed(CASES.values())}
# Types of weights that are refused.
COARSE = {
    torch.float16: {"ademamix", "soap", "shampoo", "grokadamw", "stable-adamw"},
    torch.bfloat16: {"shampoo"},
}
every_type = pytest.mark.parametrize(
    ("made", "dtype"),
    [
        pytest.param(made, dtype, id=f"{name}-{dtype}")
        for name, made in CASES.items()
        for dtype in (torch.float32, torch.bfloat16)
        if made.plugin not in COARSE.get(dtype, ())
    ],
)
every_plugin = pytest.mark.parametrize("made", BY_PLUGIN.values(), ids=BY_PLUGIN)


def fresh_manager(monkeypatch):
    """Give a test its own of the one object that bitsandbytes keeps for all optimizers of a process."""
    module = sys.modules.get("bitsandbytes.optim")
    if module is not None:
        monkeypatch.setattr(module.GlobalOptimManager, "_instance", None)


def import_or_skip(made):
    """Skip where a user has not installed the library."""
    from drivetrain_plugins.optim._library import silence

    with silence():
        pytest.importorskip(made.module, reason=f"{made.plugin} needs it: {made.install}")


def plugins_of(made, **changed):
    cls = Catalogue().entry(made.plugin).load()
    return [(made.plugin, cls(**{**made.options, **changed})), ("shape", Shape(made.decay, made.options["lr"]))]


def build(made, model, **changed):
    """Return the optimizer that the plugin builds over the default groups of `model`."""
    run = cpu_run(model=model)
    return plugins_of(made, **changed)[0][1].build_optimizer(run, Defaults(run, model, {}).parameter_groups(run))


def through_the_kit(state):
    return kit_format.decode(*kit_format.encode(state))


def through_a_checkpoint(state):
    made = checkpoint_format.encode(state, ("model",))
    tensors = {}
    for file, kept in made.tensors.items():
        content = bytearray(b"".join(bytes(piece) for piece in checkpoint_format.to_safetensors(kept)))
        tensors |= {f"{file}/{key}": tensor for key, tensor in checkpoint_format.from_safetensors(content).items()}
    return checkpoint_format.decode(made.tree, tensors)


def go_on(made, dtype, steps, state=None):
    """Train to `steps` of 12, from `state` if it is given, with fresh instances."""
    run = Trainer(wide(dtype), plugins_of(made), steps=12, device="cpu", seed=4).assemble(tokens())
    if state is not None:
        run.load_state_dict(state)
    run.settings.log_every.start(run)
    run.model.train()
    run.total_steps = steps
    run.hooks.fit(run)
    return run
