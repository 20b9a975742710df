"""Precision, recall and F1 of entities, streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch

from drivetrain import ConfigError, Problem, TrainingError, hookimpl, option, plugin
from drivetrain.data import IGNORE_INDEX
from drivetrain_plugins.evaluate._names import HELP, class_names, prefix, printable, refuse_twins
from drivetrain_plugins.evaluate._outputs import logits_and_labels
from drivetrain_plugins.evaluate._spans import OUTSIDE, bio_spans, parsed, raw_spans
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from drivetrain import Micro, Run

Scheme = Literal["bio", "raw"]


@attrs.define(eq=False)
class StreamingEntities:
    """Count entities of each type on the host: one copy from the device a batch."""

    world_size: int
    device: torch.device
    tags: list[tuple[str, str]]  # position and type, by class
    scheme: Scheme
    per_type: bool
    shifted: bool
    prefix: str
    counts: dict[str, list[int]]  # hits, predictions, labels by type
    items: int = 0

    def update(self, micro: Micro) -> None:
        """Add a batch: logits (..., L, C) against tags (..., L), where -100 does not count."""
        logits, labels = logits_and_labels(micro, "entity-f1", self.shifted)
        if logits.shape[-1] != len(self.tags):
            raise TrainingError(
                f"entity-f1: there must be a tag for each class. Received: {len(self.tags)} tags, "
                f"logits {tuple(logits.shape)}"
            )
        if labels.ndim == 0 or not labels.numel():
            return
        length = labels.shape[-1]
        both = torch.stack([logits.argmax(-1), labels.long()]).reshape(2, -1, length).tolist()
        for guessed, wanted in zip(*both, strict=True):
            self._add(guessed, wanted)

    def _add(self, guessed: list[int], wanted: list[int]) -> None:
        """Add a sequence of classes."""
        kept = [(g, w) for g, w in zip(guessed, wanted, strict=True) if w != IGNORE_INDEX]
        self.items += len(kept)
        spans: Any = bio_spans if self.scheme == "bio" else raw_spans
        made, true = spans([self.tags[g] for g, _ in kept]), spans([self.tags[w] for _, w in kept])
        for column, found in enumerate((made & true, made, true)):
            for _, _, kind in found:
                self.counts[kind][column] += 1

    def compute(self) -> dict[str, float]:
        """Return precision, recall and F1 over all types and ranks, and of each type if it was asked for."""
        kinds = sorted(self.counts)
        flat = torch.tensor([self.items, *(n for kind in kinds for n in self.counts[kind])], device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(flat)
        items, *numbers = flat.tolist()
        if not items:
            return {}
        by_kind = {kind: numbers[3 * at : 3 * at + 3] for at, kind in enumerate(kinds)}
        found = self._scores("", [sum(column) for column in zip(*by_kind.values(), strict=True)])
        for kind, three in by_kind.items() if self.per_type else ():
            found |= self._scores(f"_{printable(kind)}", three)
        return found

    def _scores(self, ending: str, counts: list[int]) -> dict[str, float]:
        hits, made, true = counts
        return {
            f"{self.prefix}entity_f1{ending}": 2 * hits / (made + true) if made + true else 0.0,
            f"{self.prefix}entity_precision{ending}": hits / made if made else 0.0,
            f"{self.prefix}entity_recall{ending}": hits / true if true else 0.0,
        }


@plugin(
    role="evaluate",
    effect="observes",
    requires=["evaluation"],
    conflicts=["chunked-cross-entropy", "sentence-order"],
    rows="tagged",
    example={"per_type": True},
    companions={
        "token-classification": {},
        "hf-model": {"path": "{kit}/model", "task": "token-classification", "labels": ["O", "B-X", "I-X"]},
        "tokenize?": {"words": "words", "label": "tags"},
    },
)
class EntityF1:
    """Measure precision, recall and F1 of entities: right are those whose first and last word and type are right.

    Tags are BIO or BIOES ("B-PER"), read as seqeval does by default, or raw ones, of which each longest run is an
    entity. All entities count alike (a micro average). Labels of -100 are left out of the sequences, before entities
    are looked for: label one token of a word, and a word counts once.
    """

    scheme: Scheme = option("bio", choices=["bio", "raw"], help='"raw": a longest run of one tag is an entity')
    tags: tuple[str, ...] = option(
        (), help="tag names in the order of their ids, unless the model's configuration has them"
    )
    per_type: bool = option(False, help="give the numbers of each type of entity, too")
    name: str | None = option(None, help=HELP.replace("NAME_f1", "NAME_entity_f1"))

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse tags that are unknown or that the scheme does not have."""
        refuse_twins(run, self)
        self._parsed(run)

    @hookimpl
    def metrics(self, run: Run, split: str) -> list[StreamingEntities]:
        """Return fresh counts for this evaluation, or nothing where there are no labels to compare with."""
        if split.startswith("predict"):
            return []
        tags = self._parsed(run)
        kinds = {kind for place, kind in tags if place != OUTSIDE}
        made = StreamingEntities(
            world_size=run.world_size,
            device=run.device,
            tags=tags,
            scheme=self.scheme,
            per_type=self.per_type,
            shifted=shifts_labels(run),
            prefix=prefix(run, self),
            counts={kind: [0, 0, 0] for kind in kinds},
        )
        return [made]

    def _parsed(self, run: Run) -> list[tuple[str, str]]:
        """Return position and type of each tag.

        Raises:
            ConfigError: nobody knows the tags, or some are none of the scheme.
        """
        names, known = list(self.tags), class_names(run)
        if not names and not known:
            do = 'give entity-f1 tags = ["O", "B-PER", ...] in the order of their ids, or hf-model its labels'
            raise ConfigError([Problem("entity-f1: nobody says what the tags are", "a model that names none", do)])
        if names and known and len(names) != len(known):
            received, do = f"{len(names)} tags, {len(known)} classes", "give a tag for each class of the model"
            raise ConfigError([Problem("entity-f1: the model has another number of classes", received, do)])
        names = names or known
        if self.scheme == "raw":
            return [(OUTSIDE, "") if name == OUTSIDE else ("I", name) for name in names]
        tags = [parsed(name) for name in names]
        if wrong := [name for name, tag in zip(names, tags, strict=True) if tag is None]:
            do = 'tags are "O", "B-TYPE", "I-TYPE", "E-TYPE", "S-TYPE"; for others give scheme = "raw"'
            raise ConfigError([Problem("entity-f1: these are no BIO or BIOES tags", ", ".join(wrong[:8]), do)])
        return [tag for tag in tags if tag is not None]
