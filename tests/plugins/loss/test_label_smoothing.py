"""`label-smoothing` is torch's, and transformers'."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import cpu_run

from drivetrain import Micro
from drivetrain_plugins.loss.label_smoothing import LabelSmoothing


def loss_of(logits, labels, **options):
    plugin, batch = LabelSmoothing(**options), {"labels": labels}
    items = plugin.build_count(cpu_run(facts=plugin.facts))(batch)
    return plugin.compute_loss(Micro(batch, len(labels), items, outputs={"logits": logits})).item()


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shifted", [False, True])
def test_loss_is_torchs_and_transformers(epsilon, shifted):
    """Both libraries give the same number on labels with some passed over, shifted or not."""
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels = torch.randn(4, 5, 9, dtype=torch.float64), torch.randint(0, 9, (4, 5))
    labels[1, 2:] = -100
    ours = loss_of(logits, labels, epsilon=epsilon, shifted=shifted)
    used, wanted = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    torchs = torch.nn.functional.cross_entropy(used.reshape(-1, 9), wanted.reshape(-1), label_smoothing=epsilon)
    assert ours == pytest.approx(torchs.item(), rel=1e-14)
    theirs = LabelSmoother(epsilon)({"logits": logits}, labels.clone(), shift_labels=shifted)
    assert ours == pytest.approx(theirs.item(), rel=1e-6)  # their smoothed part is summed in float32


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, "0.1"])
def test_epsilon_is_a_share(epsilon):
    """Other values are refused when the plugin is made."""
    with pytest.raises(ValueError, match="epsilon must be a number >= 0 and <= 1"):
        LabelSmoothing(epsilon=epsilon)
