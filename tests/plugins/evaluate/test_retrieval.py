"""`retrieval`: measures of rankings, query by query."""

from __future__ import annotations

import math

import pytest
import torch
from plugin_helpers import FEATURES, cpu_run, fit, net

from drivetrain import ConfigError, Micro, TrainingError
from drivetrain_plugins import SGD, Evaluate, Loader, Retrieval
from drivetrain_plugins.loss.bce import BCE

MEASURES = ("mrr", "map", "ndcg@3", "ndcg", "recall@2")


def measure(batches, **options):
    (metric,) = Retrieval(**options).metrics(cpu_run(), "evaluate")
    for outputs, batch in batches:
        metric.update(Micro(batch, len(batch["labels"]), 1, outputs={"logits": outputs}))
    return metric.compute()


def by_hand(scores, labels, queries):
    """Return the mean over queries of each measure, from its definition."""
    kept = {name: [] for name in MEASURES}
    for query in sorted(set(queries)):
        pairs = [(s, r) for s, r, q in zip(scores, labels, queries, strict=True) if q == query and r != -100]
        ranked = [grade for _, grade in sorted(pairs, reverse=True)]
        hits = [grade > 0 for grade in ranked]
        places = [place for place, hit in enumerate(hits, 1) if hit]

        def gain(grades, cut):
            return math.fsum(grade / math.log2(place + 1) for place, grade in enumerate(grades[:cut], 1))

        def ndcg(cut, ranked=ranked, gain=gain):
            best = gain(sorted(ranked, reverse=True), cut)
            return gain(ranked, cut) / best if best else 0.0

        kept["mrr"].append(1 / places[0] if places else 0.0)
        kept["map"].append(sum(n / p for n, p in enumerate(places, 1)) / len(places) if places else 0.0)
        kept["ndcg@3"].append(ndcg(3))
        kept["ndcg"].append(ndcg(len(ranked)))
        kept["recall@2"].append(sum(hits[:2]) / len(places) if places else 0.0)
    return {name: pytest.approx(sum(values) / len(values), rel=1e-6) for name, values in kept.items()}


def drawn(graded=True):
    """Return scores, relevances and query ids of 40 candidates of 6 queries, one of them without a relevant one."""
    draws = torch.Generator().manual_seed(4)
    queries = torch.randint(0, 6, (40,), generator=draws) * 1000
    labels = torch.randint(0, 4 if graded else 2, (40,), generator=draws)
    labels[queries == 3000] = 0
    labels[5] = -100
    return torch.randn(40, generator=draws), labels, queries


@pytest.mark.parametrize("graded", [True, False])
def test_queries_over_batches(graded):
    """Queries that are spread over batches are ranked whole; graded relevances count for ndcg alone."""
    scores, labels, queries = drawn(graded)
    batches = [
        (scores[part], {"labels": labels[part], "query": queries[part]})
        for part in (slice(0, 13), slice(13, 14), slice(14, 40))
    ]
    wanted = by_hand(scores.tolist(), labels.tolist(), queries.tolist())
    assert measure(batches, queries="query", measures=MEASURES) == wanted
    column = [(logits[:, None], batch) for logits, batch in batches]
    assert measure(column, queries="query", measures=MEASURES) == wanted


def test_rows_are_queries():
    """Without ids each row of scores is a query of its own; with one id a row, the same."""
    draws = torch.Generator().manual_seed(1)
    scores, labels = torch.randn(7, 5, generator=draws), torch.randint(0, 3, (7, 5), generator=draws)
    rows = [row for row in range(7) for _ in range(5)]
    wanted = by_hand(scores.flatten().tolist(), labels.flatten().tolist(), rows)
    batches = [
        (scores[part], {"labels": labels[part], "id": torch.arange(7)[part]}) for part in (slice(3), slice(3, 7))
    ]
    assert measure(batches, measures=MEASURES) == wanted
    assert measure(batches, measures=MEASURES, queries="id") == wanted


def test_one_right_candidate():
    """Labels (B,) are the right candidate of each row: the reciprocal of its place, 0 beyond the cut."""
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
    batches = [(scores, {"labels": torch.tensor([0, 1, 0, -100])})]
    assert measure(batches, measures=("mrr", "mrr@2", "recall@1")) == {
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 3) / 3),
        "mrr@2": pytest.approx((1 + 1 / 2) / 3),
        "recall@1": pytest.approx(1 / 3),
    }


class Scorer(torch.nn.Module):
    """A score for each row; takes its features only."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(FEATURES, 1)

    def forward(self, features):
        return {"logits": self.line(features)}


def test_run_logs_the_measures_and_the_model_gets_no_ids():
    """A run of a model that takes no query ids logs the numbers of the whole split."""

    def columns(rows, seed):
        draws = torch.Generator().manual_seed(seed)
        features = torch.randn(rows, FEATURES, generator=draws)
        return {"features": features, "labels": (features[:, 0] > 0).float(), "query": torch.arange(rows) // 4}

    held, plugin = columns(18, 8), Retrieval(MEASURES, queries="query")
    plugins = [SGD(lr=0.1), BCE(), Evaluate(), ("retrieval:dev", plugin), Loader(8, evaluate_batch_size=5)]
    trainer, _ = fit(Scorer(), plugins, columns(40, 3), held, steps=2)
    with torch.no_grad():
        scores = trainer.run.model.eval()(held["features"])["logits"].squeeze(-1)
    wanted = by_hand(scores.tolist(), held["labels"].tolist(), held["query"].tolist())
    assert {name: trainer.run.metrics[f"evaluate/dev_{name}"] for name in MEASURES} == wanted


def test_what_cannot_be_ranked_is_refused():
    """Unknown measures before the run; batches without ids or with scores that fit nothing at the first batch."""
    for wrong in ("ncdg@10", "ndcg@0", "ndcg@ten"):
        with pytest.raises(ConfigError, match=f"retrieval: there is no measure '{wrong}'"):
            Retrieval(("mrr", wrong)).assembled(cpu_run())
    scores = torch.zeros(4)
    for outputs, batch, queries, message in (
        (scores, {"labels": scores}, "query", "integer query ids under 'query'. Received: dict"),
        (scores, {"labels": scores, "query": torch.zeros(3, dtype=torch.long)}, "query", "of the scores' shape"),
        (scores, {"labels": torch.zeros(3), "query": scores.long()}, "query", "of one shape"),
        (scores, {"labels": scores}, None, "which query is a score for"),
    ):
        with pytest.raises(TrainingError, match=message):
            measure([(outputs, batch)], queries=queries)
    assert Retrieval().metrics(cpu_run(), "predict") == []


def test_two_of_one_name_are_refused():
    """Two whose numbers would overwrite each other are refused."""
    plugins = [SGD(), Evaluate(), ("retrieval:a", Retrieval(name="")), Retrieval()]
    data = {"features": torch.zeros(8, FEATURES), "labels": torch.zeros(8, dtype=torch.long)}
    with pytest.raises(ConfigError, match="retrieval:a and retrieval give their metrics the same names"):
        fit(net(), plugins, data, data, steps=1)
