"""Tokenizers, rows and runs for the tests of the language models' collators."""

from __future__ import annotations

import copy
import pickle

import attrs
import numpy as np
import torch
from hypothesis import strategies
from plugin_helpers import cpu_run

from drivetrain import Trainer, hookimpl
from drivetrain_plugins import SGD, Checkpoint, Loader
from drivetrain_plugins.shared.table import Table

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PIECES = (
    "un",
    "##break",
    "##able",
    "the",
    "red",
    "bird",
    "##s",
    "sing",
    "##ing",
    "fast",
    ".",
    "##er",
    "blue",
    "sky",
    "a",
)
PAD, UNK, CLS, SEP, MASK = range(5)
FIRST = len(SPECIAL)
SIZE = FIRST + len(PIECES)


def wordpiece(special=SPECIAL, pieces=PIECES, **named):
    """Return a WordPiece tokenizer that adds [CLS] and [SEP]."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {piece: number for number, piece in enumerate((*special, *pieces))}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    if "[CLS]" in ids:
        made.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    tokens = {f"{word[1:-1].lower()}_token": word for word in special}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **{**tokens, **named})


def token_rows(lengths, *, seed=0, size=SIZE):
    """Return rows [CLS] ... [SEP] with `lengths` ordinary tokens between, any of those from FIRST to `size`."""
    draws = torch.Generator().manual_seed(seed)
    middle = [torch.randint(FIRST, size, (length,), generator=draws).tolist() for length in lengths]
    return [{"input_ids": [CLS, *ids, SEP]} for ids in middle]


def ragged_rows():
    """Return a strategy of rows of any ids, special ones and single tokens among them."""
    one = strategies.lists(strategies.integers(0, SIZE - 1), min_size=1, max_size=12)
    return strategies.lists(one, min_size=1, max_size=5).map(lambda rows: [{"input_ids": ids} for ids in rows])


def build(plugin, tokenizer=None):
    """Return the plugin's collator, as workers get it."""
    return pickle.loads(pickle.dumps(plugin.build_collator(cpu_run(processor=tokenizer))))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same_batch(ours, theirs):
    """Compare two batches exactly, types included."""
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), (name, ours[name], theirs[name])


def assert_sound(make, rows, **given):
    """Collate rows as a list, as a table and as arrays: all the same, nothing changed, and return the batch."""
    before = copy.deepcopy(rows)
    fresh = (lambda: {"generator": draws(given["seed"])}) if "seed" in given else dict
    batch = make(rows, **fresh())
    kept = {name: tensor.clone() for name, tensor in batch.items()}
    assert rows == before
    table = Table.of(rows)
    columns = copy.deepcopy(table.columns)
    assert_same_batch(make(table, **fresh()), batch)
    for name, column in columns.items():
        now = table.columns[name]
        assert list(getattr(now, "values", now)) == list(getattr(column, "values", column)), name
    lists = all(isinstance(v, list) and v and isinstance(v[0], int) for row in rows for v in row.values())
    if lists:
        assert_same_batch(make([{k: torch.tensor(v) for k, v in row.items()} for row in rows], **fresh()), batch)
        assert_same_batch(make([{k: np.array(v, np.int32) for k, v in r.items()} for r in rows], **fresh()), batch)
    assert_same_batch(batch, kept)
    return batch


def bert(kind, **changed):
    """Return a tiny BERT with a head."""
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=SIZE, max_position_embeddings=32, **sizes, **changed)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return getattr(transformers, kind)(config)


class Seen:
    """A plugin that keeps every batch by (step, number)."""

    def __init__(self):
        self.batches = {}

    @hookimpl(wrapper=True)
    def forward(self, micro):
        outputs = yield
        self.batches[micro.step.number, len(self.batches)] = dict(micro.batch)
        return outputs


class Stop:
    """A plugin that asks for a checkpoint and an end after step `at`."""

    def __init__(self, at):
        self.at = at

    @hookimpl
    def step_end(self, step):
        if step.run.progress.step == self.at:
            step.run.request_save("the test says so")
            step.run.request_stop("the test says so")


def seen_by(model, plugin, rows, folder, *, workers=0, stop=None, resume=False, epochs=2, batch_size=4):
    """Train and return the trainer and the batches in order."""
    seen = Seen()
    loader = Loader(batch_size=batch_size, workers=workers)
    plugins = [
        plugin,
        loader,
        SGD(lr=0.01),
        Checkpoint(on_change="accept"),
        seen,
        *([] if stop is None else [Stop(stop)]),
    ]
    trainer = Trainer(model, plugins, output=folder, device="cpu", seed=5)
    trainer.fit(rows, epochs=epochs, resume=resume)
    return trainer, list(seen.batches.values())


def assert_resumes(model, plugin, rows, folder):
    """Train through, and stopped and gone on with 0 and 2 workers: each batch is the same, bit for bit."""
    trainer, straight = seen_by(model(), plugin(), rows, folder / "straight")
    end = {name: tensor.clone() for name, tensor in trainer.run.model.state_dict().items()}
    for workers in (0, 2):
        where = folder / str(workers)
        _, first = seen_by(model(), plugin(), rows, where, workers=2 - workers, stop=2)
        trainer, rest = seen_by(model(), plugin(), rows, where, workers=workers, resume=True)
        assert (len(first), len(first) + len(rest)) == (2, len(straight))
        for ours, theirs in zip([*first, *rest], straight, strict=True):
            assert_same_batch(ours, theirs)
        for name, tensor in trainer.run.model.state_dict().items():
            assert torch.equal(tensor, end[name]), name
    return straight


def assert_draws_differ(model, plugin, field):
    """Take equal rows through a run's loader: its batches differ by position, epoch and rank, and come again."""
    rows = token_rows([10], seed=1) * 8
    trainer = Trainer(model(), [plugin(), Loader(batch_size=2), SGD(lr=0.1)], device="cpu", epochs=1)
    batches = trainer.assemble(rows).batches["train"]
    ranks = [attrs.evolve(batches, rank=rank, world_size=2) for rank in (0, 1)]

    def made(loader, epoch):
        return [micro.batch[field] for micro in loader.iterate(epoch)]

    of_epochs = [made(batches, epoch) for epoch in (0, 1)]
    of_ranks = [made(loader, 0) for loader in ranks]
    everything = [*of_epochs[0], *of_epochs[1]]
    assert len({tensor.numpy().tobytes() for tensor in everything}) == len(everything) == 8
    assert all(torch.equal(a, b) for a, b in zip(of_epochs[0], made(batches, 0), strict=True))
    assert [len(each) for each in of_ranks] == [2, 2]
    together = [batch for pair in zip(*of_ranks, strict=True) for batch in pair]
    assert all(torch.equal(a, b) for a, b in zip(together, of_epochs[0], strict=True))
    later = [micro.batch[field] for micro in batches.iterate(0, 4)]
    assert all(torch.equal(a, b) for a, b in zip(later, of_epochs[0][2:], strict=True))
