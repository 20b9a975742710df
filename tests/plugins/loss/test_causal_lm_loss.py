"""`causal-lm-loss` shifts and counts by itself."""

from __future__ import annotations

import pytest
import torch
from loss_runs import Words, model_of, token_rows
from plugin_helpers import cpu_run, fit

from drivetrain import DataError, Micro
from drivetrain_plugins import SGD, Loader, Pad
from drivetrain_plugins.loss.causal_lm_loss import CausalLMLoss


def test_loss_is_transformers_causal_loss():
    """On the same logits it is ForCausalLMLoss, with labels passed over."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = torch.randn(3, 6, 9), torch.randint(0, 9, (3, 6))
    labels[0, 2:] = -100
    plugin, batch = CausalLMLoss(), {"labels": labels}
    items = plugin.build_count()(batch)
    assert items == 11
    ours = plugin.compute_loss(Micro(batch, 3, items, outputs={"logits": logits}))
    assert ours.item() == pytest.approx(ForCausalLMLoss(logits, labels, 9).item(), rel=1e-6)


@pytest.mark.parametrize("withheld", [True, False])
def test_trains_as_the_models_own_loss(withheld):
    """One micro-batch a step, the run is the one that the model's own loss gives."""
    rows, plugins = token_rows(), [Pad(Words()), Loader(batch_size=11), SGD(lr=0.1)]
    _, own = fit(model_of("gpt2", torch.float32), plugins, rows, steps=4)
    loss = ("causal-lm-loss", CausalLMLoss(withhold_labels=withheld))
    _, ours = fit(model_of("gpt2", torch.float32), [loss, *plugins], rows, steps=4)
    assert ours.of("loss") == pytest.approx(own.of("loss"), rel=1e-5)


def test_rows_of_one_token_have_no_items():
    """A batch whose labels are all first ones is skipped instead of 0/0."""
    rows = [{"input_ids": [3], "labels": [3]}, {"input_ids": [4], "labels": [4]}]
    trainer, _ = fit(model_of("gpt2"), [Pad(Words()), ("loss", CausalLMLoss()), SGD()], rows, steps=1)
    assert trainer.run.skipped_steps == 1


def test_label_outside_the_vocabulary_is_told():
    """Labels are checked against the rows of the output embeddings."""
    check = CausalLMLoss().batch_checks(cpu_run(model=model_of("gpt2")))[0]
    check({"labels": torch.tensor([[36, -100]])})
    with pytest.raises(DataError, match="below 37"):
        check({"labels": torch.tensor([[37, -100]])})
