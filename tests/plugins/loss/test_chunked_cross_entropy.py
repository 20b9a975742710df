"""`chunked-cross-entropy` has the gradient of the full logits without holding them."""

from __future__ import annotations

import pytest
import torch
from loss_runs import Words, distance, model_of, step_gradient, token_rows
from plugin_helpers import cpu_run, fit

from drivetrain import ConfigError, PlanError, Trainer, TrainingError
from drivetrain_plugins import BF16, SGD, Accuracy, Evaluate, Loader, Pad
from drivetrain_plugins.loss.chunked_cross_entropy import ChunkedCrossEntropy
from drivetrain_plugins.loss.cross_entropy import CrossEntropy

SMALL = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def special(name, **config):
    """Return a model that changes its logits: scaled (Cohere, Granite) or within a cap (Gemma 2)."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = getattr(transformers, f"{name}Config")(**{**SMALL, "initializer_range": 0.5, **config})
        return getattr(transformers, f"{name}ForCausalLM")(made).double()


MODELS = {
    "causal": lambda: model_of("gpt2"),
    "untied": lambda: model_of("llama"),
    "a head with layers": lambda: model_of("bert"),
    "scaled": lambda: special("Cohere", logit_scale=0.3),
    "divided": lambda: special("Granite", logits_scaling=3.0),
    "capped": lambda: special("Gemma2", final_logit_softcapping=2.0, sliding_window=64),
}


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_that_of_the_full_logits(name, chunk):
    """Tied or not, with layers before the embeddings or a change behind: to 1e-12 in float64."""
    rows, way = token_rows(), (11, 1, Pad(Words()))
    wanted, mean = step_gradient(MODELS[name](), rows, CrossEntropy(), way)
    gradient, loss = step_gradient(MODELS[name](), rows, ChunkedCrossEntropy(chunk=chunk), way)
    assert distance(gradient, wanted) < 1e-12
    assert loss == pytest.approx(mean, rel=1e-12)


def test_encoder_decoder():
    """A decoder's scaled states are taken where they enter the embeddings."""
    import transformers

    config = transformers.T5Config(
        vocab_size=37, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, dropout_rate=0.0
    )
    rows = [{**row, "decoder_input_ids": [0, *row["input_ids"][:-1]]} for row in token_rows()]
    found = []
    for loss in (CrossEntropy(), ChunkedCrossEntropy(chunk=4)):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = transformers.T5ForConditionalGeneration(config).double()
        found.append(step_gradient(model, rows, loss, (11, 1, Pad(Words())))[0])
    assert distance(found[1], found[0]) < 1e-12


def test_logits_are_never_whole():
    """No tensor with more rows of the vocabulary than a chunk is made, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    vocabulary, sizes = 997, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            logits = isinstance(made, torch.Tensor) and made.ndim and made.shape[-1] == vocabulary
            if logits and made.shape != (16, vocabulary):  # those are the embeddings, turned
                sizes.append(made.numel() // vocabulary)
            return made

    rows, way = token_rows(), (11, 1, Pad(Words()))
    with Watch():
        step_gradient(model_of("llama", vocab_size=vocabulary), rows, ChunkedCrossEntropy(chunk=4), way)
        assert max(sizes) == 4
        step_gradient(model_of("llama", vocab_size=vocabulary), rows, CrossEntropy(), way)
        assert max(sizes) >= 11 * 12  # what the watch sees otherwise


def test_positions_without_a_label_get_no_logits():
    """With one label in ten, one logit row in ten is computed."""
    rows = [{"input_ids": [5] * 10, "labels": [7] + [-100] * 9} for _ in range(11)]
    model, computed = model_of("bert"), []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, made: computed.append(made.numel() // 37))
    step_gradient(model, rows, ChunkedCrossEntropy(), (11, 1, Pad(Words())))
    assert computed == [3, 0, 11]  # the trial of assembly (3 rows), forward's none, the loss


def test_all_chunks_but_the_last_are_computed_again():
    """Backward begins with the last chunk, so only the others' logits are dropped and made again, in turn."""
    rows = [{"input_ids": [5] * 10, "labels": [7] + [-100] * 9} for _ in range(11)]
    model, computed = model_of("bert"), []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, made: computed.append(made.numel() // 37))
    step_gradient(model, rows, ChunkedCrossEntropy(chunk=5), (11, 1, Pad(Words())))
    assert computed == [3, 0, 5, 5, 1, 5, 5]


def test_evaluation_and_bfloat16():
    """An evaluation has the same loss as with full logits, and autocast covers the chunks."""
    rows, losses = token_rows(), []
    for loss in (CrossEntropy(), ChunkedCrossEntropy(chunk=5)):
        plugins = [BF16(), Pad(Words()), ("loss", loss), Loader(batch_size=4), SGD(lr=0.1), Evaluate()]
        losses.append(fit(model_of("gpt2", torch.float32), plugins, rows, rows, steps=3)[1])
    assert losses[0].of("evaluate/loss") == pytest.approx(losses[1].of("evaluate/loss"), rel=1e-3)
    assert losses[0].of("loss") == pytest.approx(losses[1].of("loss"), rel=1e-3)


class Own(torch.nn.Module):
    """A model of the user's own: embeddings, a layer and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = torch.nn.Embedding(37, 8), torch.nn.Linear(8, 8)
        self.out = torch.nn.Linear(8, 37)

    def forward(self, input_ids, attention_mask):
        return self.out(torch.tanh(self.layer(self.embed(input_ids))))


def own():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Own().double()


def test_model_of_ones_own_by_the_name_of_its_head():
    """The head's name is enough for a module that is not of transformers."""
    rows, way = token_rows(), (11, 1, Pad(Words()))
    wanted, _ = step_gradient(own(), rows, CrossEntropy(shifted=True), way)
    gradient, _ = step_gradient(own(), rows, ChunkedCrossEntropy(head="out", shifted=True, chunk=6), way)
    assert distance(gradient, wanted) < 1e-12


def test_models_that_cannot_be_chunked_are_refused():
    """No output embeddings, or logits that are changed behind them in an unknown way: an error before step 0."""
    with pytest.raises(ConfigError, match=r"no output embeddings(.|\n)*head="):
        ChunkedCrossEntropy().assembled(cpu_run(model=own()))
    with pytest.raises(ConfigError, match="no output embeddings 'nowhere'"):
        ChunkedCrossEntropy(head="nowhere").assembled(cpu_run(model=own()))
    model = model_of("llama")
    model.register_forward_hook(lambda _m, _i, made: made.__class__(logits=made.logits.abs()))
    with pytest.raises(ConfigError, match=r"does something to its logits(.|\n)*cross-entropy"):
        ChunkedCrossEntropy().assembled(cpu_run(model=model))


def test_metrics_that_need_logits_are_told_there_are_none():
    """`accuracy` is refused by the plan, and any other metric by the outputs."""
    plugins = [Pad(Words()), ("chunked-cross-entropy", ChunkedCrossEntropy()), SGD(), Evaluate(), Accuracy()]
    with pytest.raises(PlanError, match="'chunked-cross-entropy' and 'accuracy' cannot be combined"):
        Trainer(model_of("gpt2"), plugins, steps=1).fit(token_rows(), token_rows())
    from drivetrain_plugins.loss.chunked_cross_entropy import Hidden

    with pytest.raises(TrainingError, match="never holds the logits"):
        Hidden(hidden_states=torch.zeros(1))["logits"]


def test_trial_leaves_the_model_as_it_was():
    """Modes, gradients, hooks and weights are those from before the trial at assembly."""
    model = model_of("bert").train()
    model.bert.encoder.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ChunkedCrossEntropy().assembled(cpu_run(model=model))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    head = model.get_output_embeddings()
    assert not head._forward_hooks
    assert not head._forward_pre_hooks
