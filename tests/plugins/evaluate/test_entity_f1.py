"""`entity-f1`: entities as conlleval and seqeval find them, and their precision, recall and F1."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from plugin_helpers import cpu_run

from drivetrain import ConfigError, Micro, Run, Trainer, TrainingError
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import AdamW, EntityF1, Evaluate, HFModel, Loader, TokenClassification
from drivetrain_plugins.evaluate._spans import bio_spans, parsed, raw_spans

BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
BIOES = ("O", *(f"{place}-{kind}" for kind in ("PER", "LOC") for place in "BIES"))


def naive(tags):
    """Return the entities by looking at every pair of places: a start, an end, and no break between."""

    def breaks(left, right):
        """Tell whether an entity may not go on from one tag to the next."""
        return (
            "O" in (left, right)
            or left[0] in "ES"
            or right[0] in "BS"
            or left.partition("-")[2] != right.partition("-")[2]
        )

    padded, found = ["O", *tags, "O"], set()
    for start, end in itertools.combinations(range(1, len(padded)), 2):
        inside = padded[start:end]
        whole = not any(breaks(a, b) for a, b in itertools.pairwise(inside)) and "O" not in inside
        if whole and breaks(padded[start - 1], inside[0]) and breaks(inside[-1], padded[end]):
            found.add((start - 1, end - 1, inside[0].partition("-")[2]))
    return found


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("B-PER I-PER O B-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),
        ("O O O B-MISC I-MISC I-MISC O", {(3, 6, "MISC")}),  # the example of seqeval's documentation
        ("I-PER I-PER B-PER", {(0, 2, "PER"), (2, 3, "PER")}),  # an entity may begin at I
        ("B-PER I-LOC", {(0, 1, "PER"), (1, 2, "LOC")}),
        ("S-PER B-LOC E-LOC I-LOC", {(0, 1, "PER"), (1, 3, "LOC"), (3, 4, "LOC")}),
        ("E-PER E-PER", {(0, 1, "PER"), (1, 2, "PER")}),
        ("B-X-Y I-X-Y", {(0, 2, "X-Y")}),
        ("", set()),
    ],
)
def test_entities_of_tags(tags, wanted):
    """Sequences written by hand have the entities that conlleval's rules give."""
    assert bio_spans([parsed(tag) for tag in tags.split()]) == wanted


def test_entities_of_any_tags():
    """Random sequences, of which most are no proper ones, have the entities of the naive search."""
    draws = random.Random(1)
    for _ in range(300):
        tags = draws.choices(BIOES, k=draws.randrange(9))
        assert bio_spans([parsed(tag) for tag in tags]) == naive(tags), tags


def test_raw_tags_are_runs():
    """Of raw tags the longest runs are entities, and the outside is none."""
    tags = ["street", "street", "O", "O", "city", "street"]
    assert raw_spans([("O", "") if t == "O" else ("I", t) for t in tags]) == {
        (0, 2, "street"),
        (4, 5, "city"),
        (5, 6, "street"),
    }
    assert raw_spans([]) == set()


def batches_of(tags, seed=2, count=5):
    """Return batches of guesses, labels with ignored ones, and both as lists of tag sequences."""
    draws, batches, made, true = random.Random(seed), [], [], []
    for _ in range(count):
        rows, length = draws.randrange(1, 4), draws.randrange(1, 12)
        guesses = torch.tensor([[draws.randrange(len(tags)) for _ in range(length)] for _ in range(rows)])
        labels = torch.where(torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.7, guesses, 0)
        labels[:, 0] = -100
        labels[0, length // 2] = -100
        batches.append((torch.nn.functional.one_hot(guesses, len(tags)).float(), labels))
        for guess, label in zip(guesses.tolist(), labels.tolist(), strict=True):
            kept = [place for place, number in enumerate(label) if number != -100]
            made.append([tags[guess[place]] for place in kept])
            true.append([tags[label[place]] for place in kept])
    return batches, made, true


def measure(batches, run=None, **options):
    (metric,) = EntityF1(**options).metrics(run or cpu_run(), "evaluate")
    for logits, labels in batches:
        metric.update(Micro({"labels": labels}, len(labels), len(labels), outputs={"logits": logits}))
    return metric.compute()


def by_hand(made, true, kind=None, ending=""):
    """Return the three numbers from naive entities."""
    hits = found = wanted = 0
    for one, other in zip(made, true, strict=True):
        left, right = ({span for span in naive(tags) if kind in (None, span[2])} for tags in (one, other))
        hits, found, wanted = hits + len(left & right), found + len(left), wanted + len(right)
    values = {"f1": 2 * hits / (found + wanted), "precision": hits / found, "recall": hits / wanted}
    return {f"entity_{name}{ending}": pytest.approx(value, abs=1e-12) for name, value in values.items()}


@pytest.mark.parametrize("tags", [BIO, BIOES], ids=["BIO", "BIOES"])
def test_numbers_by_hand(tags):
    """Over several batches the numbers are those of the naive search, in all and of each type."""
    batches, made, true = batches_of(tags)
    wanted = by_hand(made, true)
    assert measure(batches, tags=tags) == wanted
    for kind in ("PER", "LOC"):
        wanted |= by_hand(made, true, kind, f"_{kind}")
    assert measure(batches, tags=tags, per_type=True) == wanted


def on_rank():
    rank = torch.distributed.get_rank()
    run = Run(device=torch.device("cpu"), rank=rank, world_size=3)
    batches = batches_of(BIO)[0]
    return measure([batches[1:], [], batches[:1]][rank], run, tags=BIO, per_type=True)


def test_ranks_add_up():
    """Every rank has the numbers of all, one without rows too."""
    assert run_ranks(on_rank, world_size=3) == [measure(batches_of(BIO)[0], tags=BIO, per_type=True)] * 3


def test_nothing_found_is_zero_and_nothing_counted_is_nothing():
    """Without entities the scores are 0; where every label is ignored there are none."""
    outside = (torch.eye(3)[None, [0, 0]], torch.tensor([[0, 0]]))
    assert set(measure([outside], tags=("O", "B-X", "I-X")).values()) == {0.0}
    assert measure([(outside[0], torch.full((1, 2), -100))], tags=("O", "B-X", "I-X")) == {}
    assert EntityF1(tags=BIO).metrics(cpu_run(), "predict") == []


def tagger(bert_folder, plugin, labels=("O", "B-X", "I-X"), steps=8):
    """Train the tiny BERT as a tagger; return the trainer and the rows that are kept aside."""
    draws = random.Random(6)
    rows = []
    for number in range(14):
        ids = [2, *(draws.randrange(5, 16) for _ in range(3 + number % 5)), 3]
        rows.append({"input_ids": ids, "labels": [-100, *(i % 3 for i in ids[1:-1]), -100]})
    model = HFModel(str(bert_folder), task="token-classification", labels=labels)
    plugins = [model, TokenClassification(), AdamW(lr=0.02), Evaluate(), plugin, Loader(4, evaluate_batch_size=3)]
    trainer = Trainer(plugins=plugins, steps=steps, device="cpu")
    trainer.fit(rows[:6], rows[6:])
    return trainer, rows[6:]


def test_run_logs_the_scores_of_the_whole_split(bert_folder):
    """A tagger's logged numbers are those of its own tags, read one row after the other."""
    trainer, held = tagger(bert_folder, EntityF1())
    model, names = trainer.run.model.eval(), ("O", "B-X", "I-X")
    made, true = [], []
    with torch.no_grad():
        for row in held:
            best = model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax(-1)[0].tolist()
            made.append([names[best[place]] for place in range(1, len(best) - 1)])
            true.append([names[label] for label in row["labels"][1:-1]])
    logged = {name: trainer.run.metrics[f"evaluate/{name}"] for name in by_hand(true, true)}
    assert 0 < logged["entity_f1"] < 1
    assert logged == by_hand(made, true)


def test_tags_that_cannot_be_read_are_refused_before_the_run(bert_folder):
    """Raw tags need their scheme, a model without names needs tags, and their number is the model's."""
    with pytest.raises(ConfigError, match=r"no BIO or BIOES tags\n.*received: street, city\n.*scheme = \"raw\""):
        tagger(bert_folder, EntityF1(), ("O", "street", "city"), steps=1)
    trainer, _ = tagger(bert_folder, EntityF1("raw", per_type=True), ("O", "street", "ci/ty"), steps=1)
    assert "evaluate/entity_f1_ci_ty" in trainer.run.metrics
    with pytest.raises(ConfigError, match="entity-f1: nobody says what the tags are"):
        EntityF1().assembled(cpu_run())
    with pytest.raises(ConfigError, match="received: 2 tags, 3 classes"):
        tagger(bert_folder, EntityF1(tags=("O", "B-X")), steps=1)
    with pytest.raises(TrainingError, match=r"a tag for each class. Received: 5 tags, logits \(1, 2, 3\)"):
        measure([(torch.zeros(1, 2, 3), torch.zeros(1, 2))], tags=BIO)
