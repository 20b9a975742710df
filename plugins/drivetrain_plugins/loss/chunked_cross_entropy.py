"""Cross-entropy over a large vocabulary that never holds all logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from drivetrain import TrainingError, hookimpl, option, plugin
from drivetrain_plugins.loss._head import behind_head, find_head
from drivetrain_plugins.loss._labels import (
    IGNORED,
    Count,
    InRange,
    aligned,
    full,
    labels_of,
    number_of_classes,
    scaled,
    without,
)
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from drivetrain import Micro, Run


class Hidden(dict[str, Any]):
    """The model's outputs without logits: what enters the output embeddings."""

    def __missing__(self, key: str) -> Any:
        """Say why there are no logits."""
        raise TrainingError(
            f"the model's outputs have no {key!r}: chunked-cross-entropy never holds the logits. "
            "A metric that needs them takes `cross-entropy` or `causal-lm-loss`"
        )


@plugin(
    role="loss",
    conflicts=["accuracy"],
    rows="copies",
    companions={"causal-lm": {}, "hf-model": {"path": "{kit}/causal", "task": "causal-lm"}},
)
class ChunkedCrossEntropy:
    """Compute the cross-entropy a chunk of tokens at a time; backward computes each chunk's logits again.

    For a vocabulary of V and N target tokens it holds (chunk, V) logits where others hold (N, V) two or three times;
    positions without a target get no logits at all, and a single chunk is computed once. The gradient is that of the
    whole. The model runs as it is: what enters its output embeddings is taken there, so metrics get no logits.
    """

    chunk: int = option(1024, ge=1, help="tokens whose logits are held at once")
    labels: str = option("labels", help="field with the labels; the model never gets them")
    ignore_index: int = option(IGNORED, help="label that is passed over")
    shifted: bool | None = option(None, help="position i predicts label i + 1; None does as the model's own loss does")
    head: str | None = option(None, help="the layer that makes the logits, by its name in a model that does not tell")
    _shifted: bool = option(False, init=False)
    _head: Any = option(None, init=False)
    _change: Any = option(None, init=False)

    @property
    def facts(self) -> dict[str, Any]:
        """Say whether labels are shifted, where it was said to this plugin."""
        return {} if self.shifted is None else {"shifted_labels": self.shifted}

    @hookimpl
    def build_count(self, run: Run) -> Count:
        """Count the labels that are not ignored."""
        self._shifted = shifts_labels(run)
        return Count("chunked-cross-entropy", self.labels, self.ignore_index, self._shifted)

    @hookimpl
    def batch_checks(self, run: Run) -> list[InRange]:
        """Refuse labels that are no classes."""
        return [InRange("chunked-cross-entropy", self.labels, self.ignore_index, number_of_classes(run.model))]

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Find the output embeddings and what the model does behind them."""
        self._head = find_head(run.model, self.head)
        self._change = behind_head(run.model, self._head)

    @hookimpl
    def forward(self, micro: Micro) -> Hidden:
        """Run the model up to its output embeddings."""
        entered: list[torch.Tensor] = []

        def stop(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            entered.append(inputs[0])
            return (inputs[0][..., :0, :], *inputs[1:])  # the logits of no tokens

        batch, model = without(micro.batch, self.labels), micro.run.model
        with self._head.register_forward_pre_hook(stop):
            if hasattr(batch, "keys"):
                model(**batch)
            else:
                model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        if len(entered) != 1:
            raise TrainingError(
                f"chunked-cross-entropy: the model called its output embeddings {len(entered)} times in one forward. "
                "It must call them once: take `cross-entropy`"
            )
        return Hidden(hidden_states=entered[0])

    @hookimpl
    def compute_loss(self, micro: Micro) -> torch.Tensor:
        """Sum over chunks of items and divide by the step's number of items."""
        hidden = micro.outputs["hidden_states"]
        labels = labels_of(micro.batch, self.labels, plugin="chunked-cross-entropy")
        if hidden.shape[:-1] != labels.shape:
            raise TrainingError(
                "chunked-cross-entropy: hidden states must be (..., D) for labels (...). "
                f"Received: {tuple(hidden.shape)} and {tuple(labels.shape)}"
            )
        targets = (aligned(labels, self.ignore_index) if self._shifted else labels).flatten()
        # Their number is known, so that a GPU need not wait for it.
        items = torch.nonzero_static(targets != self.ignore_index, size=int(micro.num_items)).squeeze(1)
        states, targets = hidden.flatten(0, -2).index_select(0, items), targets.index_select(0, items).long()
        total = states.new_zeros((), dtype=full(states).dtype)
        parts = torch.split(states, self.chunk)
        for number, (part, wanted) in enumerate(zip(parts, torch.split(targets, self.chunk), strict=True), 1):
            # Backward begins with the last chunk, whose logits are held until then: no more than one at a time.
            if number < len(parts) and torch.is_grad_enabled():
                sum_of_chunk = checkpoint(self._summed, part, wanted, use_reentrant=False, preserve_rng_state=False)
            else:
                sum_of_chunk = self._summed(part, wanted)
            total = total + sum_of_chunk
        return scaled(total, micro)

    def _summed(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum of the item losses of one chunk: states (n, D), targets (n,)."""
        return torch.nn.functional.cross_entropy(full(self._change(self._head(states))), targets, reduction="sum")
