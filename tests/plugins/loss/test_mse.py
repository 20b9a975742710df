"""`mse` is torch's MSELoss over the numbers that count."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import FEATURES, fit

from drivetrain import DataError, Micro, TrainingError
from drivetrain_plugins import SGD, Loader
from drivetrain_plugins.loss.mse import MSE


def loss_of(predictions, labels, **options):
    plugin, batch = MSE(**options), {"labels": labels}
    return plugin.compute_loss(Micro(batch, len(labels), plugin.build_count()(batch), outputs={"logits": predictions}))


@pytest.mark.parametrize(
    ("made", "wanted"), [((5, 1), (5,)), ((5,), (5,)), ((5, 3), (5, 3)), ((5,), (5, 1)), ((2, 4, 1), (2, 4))]
)
def test_loss_is_torchs(made, wanted):
    """Numbers in any shape give torch's mean; a last dimension of one may be missing on either side."""
    predictions, labels = torch.randn(made, dtype=torch.float64), torch.randn(wanted, dtype=torch.float64)
    theirs = torch.nn.functional.mse_loss(predictions.flatten(), labels.flatten())
    assert loss_of(predictions, labels).item() == pytest.approx(theirs.item(), rel=1e-14)


def test_labels_that_are_passed_over():
    """-100 does not count, unless it is a label like others; what is passed over has no gradient."""
    predictions = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    labels = torch.tensor([0.0, -100.0, 1.0])
    loss = loss_of(predictions, labels)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 4) / 2)
    assert predictions.grad.tolist() == [1.0, 0.0, 2.0]
    assert loss_of(predictions, labels, ignore=None).item() == pytest.approx((1 + 102**2 + 4) / 3)


def test_integer_labels_are_numbers():
    """Labels may be integers."""
    assert loss_of(torch.tensor([1.5]), torch.tensor([1])).item() == pytest.approx(0.25)


def test_regression_trains_to_the_closed_form():
    """A linear model ends at least squares."""
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(40, FEATURES, generator=draws)
    labels = torch.randn(40, generator=draws)
    model = torch.nn.Linear(FEATURES, 1, bias=False)
    rows = list(zip(features, labels, strict=True))
    fit(model, [("mse", MSE()), Loader(batch_size=40), SGD(lr=0.3)], rows, epochs=100)
    wanted = torch.linalg.lstsq(features, labels[:, None]).solution[:, 0]
    assert torch.allclose(model.weight[0], wanted, atol=1e-4)


def test_shapes_and_numbers_that_do_not_fit():
    """Shapes that would broadcast, NaN and infinity are told."""
    with pytest.raises(TrainingError, match=r"\(4, 3\) and \(4,\)"):
        loss_of(torch.randn(4, 3), torch.randn(4))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="finite number"):
            MSE().batch_checks()[0]({"labels": torch.tensor([1.0, bad])})
    MSE().batch_checks()[0]({"labels": torch.tensor([1.0, -100.0])})
