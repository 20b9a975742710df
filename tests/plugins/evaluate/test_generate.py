"""`generate`: what it hands to metrics is what `model.generate` makes of each row by itself."""

from __future__ import annotations

import json

import pytest
import torch
from text_metrics import evaluate_seq2seq
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from drivetrain import ConfigError, DataError, PlanError, Stage, Trainer, TrainingError, Transform, hookimpl
from drivetrain.testing.files import ensure
from drivetrain.testing.kinds import kit_rows
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import SGD, CausalLM, CompletionOnly, Evaluate, ExactMatch, Flatten, Generate, HFModel, Seq2Seq
from drivetrain_plugins.evaluate import _texts
from drivetrain_plugins.shared import samples

ROWS = 9
TASKS = {"seq2seq": "seq2seq-lm", "causal": "causal-lm", "model": "sequence-classification"}


class Texts:
    """A plugin that keeps the texts of every evaluation, and the samples."""

    def __init__(self):
        self.pairs, self.shown = [], []

    @hookimpl
    def add_hooks(self, manager):
        manager.add_hookspecs(_texts.TextHooks)
        manager.add_hookspecs(samples.SampleHooks)

    @hookimpl
    def text_metrics(self, run, split):
        self.pairs = []
        return [self]

    def update(self, predictions, references):
        self.pairs += zip(predictions, references, strict=True)

    def compute(self):
        return {"texts": float(len(self.pairs))}

    @hookimpl
    def samples(self, run, split, rows):
        self.shown.append((run.progress.step, split, rows))


def assembled(folder, name, collator, kind, generate, *more):
    """Return a trainer that could begin, and its texts."""
    texts, rows = Texts(), kit_rows(kind, ROWS, 50)
    model = HFModel(str(ensure(folder, name)), task=TASKS[name])
    trainer = Trainer(plugins=[model, collator, SGD(lr=0.1), Evaluate(), generate, texts, *more], steps=2, device="cpu")
    trainer.assemble(kit_rows(kind, 16), rows)
    return trainer, texts


def seq2seq(folder, generate, *more):
    return assembled(folder, "seq2seq", Seq2Seq(), "pairs", generate, *more)


def causal(folder, generate, *more):
    return assembled(folder, "causal", CompletionOnly(), "completions", generate, *more)


def alone(folder, name, prompt, **options):
    """Return what the saved model makes of one row that is not padded, with the library alone."""
    auto = AutoModelForSeq2SeqLM if name == "seq2seq" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(ensure(folder, name)).eval(), AutoTokenizer.from_pretrained(folder / name)
    made = model.generate(torch.tensor([prompt]), **options)[0]
    return tokenizer.decode(made[len(prompt) if name == "causal" else 0 :], skip_special_tokens=True)


def words(folder, name, ids):
    return AutoTokenizer.from_pretrained(folder / name).decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "length_penalty": 0.5}, {"no_repeat_ngram_size": 1}])
def test_sequence_to_sequence_is_the_library_row_by_row(options, kit_folder):
    """Padded sources give the texts of each source alone; references are the labels, in order."""
    trainer, texts = seq2seq(kit_folder, Generate(max_new_tokens=5, **options))
    result = trainer.evaluate()
    wanted = [
        (
            alone(kit_folder, "seq2seq", row["input_ids"], max_new_tokens=5, **options),
            words(kit_folder, "seq2seq", row["labels"]),
        )
        for row in kit_rows("pairs", ROWS, 50)
    ]
    assert texts.pairs == wanted
    assert len({text for text, _ in wanted}) > 1
    assert result["texts"] == ROWS
    assert 1 <= result["generated_tokens"] <= 5


def test_causal_prompts_of_any_length_are_continued_as_alone(kit_folder):
    """Prompts end before the first label; padded on the left, they go on as each alone, and only the new is text."""
    trainer, texts = causal(kit_folder, Generate(max_new_tokens=4))
    trainer.evaluate()
    wanted = []
    for row in kit_rows("completions", ROWS, 50):
        cut = row["completion_mask"].index(1)
        prompt, answer = row["input_ids"][:cut], row["input_ids"][cut:]
        wanted.append((alone(kit_folder, "causal", prompt, max_new_tokens=4), words(kit_folder, "causal", answer)))
    assert texts.pairs == wanted
    assert len({row["completion_mask"].index(1) for row in kit_rows("completions", ROWS, 50)}) > 2


def test_prompts_of_a_number_of_tokens(kit_folder):
    """Where all tokens are labels, the first `prompt_tokens` are the prompt and the rest is the reference."""
    trainer, texts = assembled(
        kit_folder, "causal", CausalLM(), "sequences", Generate(max_new_tokens=3, prompt_tokens=7)
    )
    trainer.evaluate()
    rows = [row["input_ids"] for row in kit_rows("sequences", ROWS, 50)]
    assert min(map(len, rows)) < 8
    assert texts.pairs == [
        (alone(kit_folder, "causal", row[:7], max_new_tokens=3), words(kit_folder, "causal", row[7:]))
        for row in rows
        if len(row) > 7  # a shorter one has no reference
    ]


def test_the_rest_of_the_evaluation_and_the_model_stay_as_they_are(kit_folder):
    """Loss, modes, configurations and generators are those of a run that makes no text, and training's cache is off."""

    class NoCache:
        @hookimpl
        def transforms(self, run):
            def apply(model):
                model.config.use_cache = False
                model.generation_config.use_cache = False
                return model

            return [Transform(Stage.ADAPT, apply)]

    class Cached:
        seen = ()

        @hookimpl
        def assembled(self, run):
            run.model.register_forward_pre_hook(self.note, with_kwargs=True)

        def note(self, model, args, kwargs):
            self.seen = (*self.seen, kwargs.get("past_key_values") is not None)

    plain = causal(kit_folder, Generate(limit=1, max_new_tokens=1), NoCache())[0].evaluate()
    cached = Cached()
    trainer, _ = causal(kit_folder, Generate(max_new_tokens=4, do_sample=True, temperature=2.0), NoCache(), cached)
    model = trainer.run.model.train()
    before = model.config.to_dict(), model.generation_config.to_dict(), torch.get_rng_state()
    result = trainer.evaluate()
    assert result["loss"] == plain["loss"]
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert model.training
    assert any(cached.seen)


def test_sampled_texts_depend_on_seed_and_step_alone(kit_folder):
    """An evaluation of the same step gives the same texts whatever was drawn before; another step gives others."""
    trainer, texts = causal(kit_folder, Generate(max_new_tokens=6, do_sample=True, temperature=5.0, top_k=0))
    made = []
    for step in (0, 0, 1):
        torch.manual_seed(len(made))
        trainer.run.progress.step = step
        trainer.evaluate()
        made.append(texts.pairs)
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(("limit", "shown"), [(3, 2), (2, 5), (None, 4)])
def test_limit_and_samples(limit, shown, kit_folder):
    """`limit` rows of a set are made, evenly spread; the first `samples` of them are shown with what they came from."""
    trainer, texts = seq2seq(kit_folder, Generate(max_new_tokens=2, limit=limit, samples=shown))
    trainer.run.progress.step = 7
    assert trainer.evaluate()["texts"] == (limit or ROWS)
    ((step, split, rows),) = texts.shown
    assert (step, split, len(rows)) == (7, "evaluate", min(limit or ROWS, shown))
    places = {2: [0, 5], 3: [0, 3, 6], None: range(ROWS)}[limit]
    chosen = [kit_rows("pairs", 1, 50 + place)[0] for place in places]
    assert [wanted for _, wanted in texts.pairs] == [words(kit_folder, "seq2seq", row["labels"]) for row in chosen]
    first = chosen[0]
    assert rows[0] == {
        "input": words(kit_folder, "seq2seq", first["input_ids"]),
        "prediction": texts.pairs[0][0],
        "reference": texts.pairs[0][1],
    }


def test_nothing_is_shown_where_no_samples_are_wanted(kit_folder):
    """`samples = 0` fires no event."""
    trainer, texts = seq2seq(kit_folder, Generate(max_new_tokens=1, limit=1, samples=0))
    trainer.evaluate()
    assert texts.shown == []


def test_special_tokens_may_stay(kit_folder):
    """Without the start token, which is no text, and up to the end."""
    trainer, texts = seq2seq(kit_folder, Generate(max_new_tokens=2, limit=1, skip_special_tokens=False))
    trainer.evaluate()
    ((made, wanted),) = texts.pairs
    assert wanted.startswith("[CLS]")
    assert wanted.endswith("[SEP]")
    assert not made.startswith("[PAD]")


def test_configurations_of_files_and_tables(kit_folder, tmp_path):
    """A GenerationConfig's file, folder or fields count where no option does."""
    GenerationConfig(max_new_tokens=2, num_beams=2).save_pretrained(tmp_path)
    for given in (tmp_path, str(tmp_path / "generation_config.json"), {"max_new_tokens": 2, "num_beams": 2}):
        trainer, texts = seq2seq(kit_folder, Generate(config=given, limit=2))
        config = trainer.run.plugins["generate"]._config
        assert (config.max_new_tokens, config.num_beams) == (2, 2)
        trainer.evaluate()
        rows = [kit_rows("pairs", 1, start)[0] for start in (50, 55)]
        options = {"max_new_tokens": 2, "num_beams": 2}
        assert [t for t, _ in texts.pairs] == [alone(kit_folder, "seq2seq", r["input_ids"], **options) for r in rows]
    trainer, _ = seq2seq(kit_folder, Generate(config={"max_new_tokens": 2}, max_new_tokens=3))
    assert trainer.run.plugins["generate"]._config.max_new_tokens == 3
    trainer, _ = seq2seq(kit_folder, Generate(arguments={"min_new_tokens": 2}))
    assert trainer.run.plugins["generate"]._config.min_new_tokens == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5, "do_sample": False}, "transformers refuses the options.*(?s:.*)temperature"),
        ({"arguments": {"min_new_token": 2}}, "GenerationConfig has no min_new_token.*(?s:.*)did you mean"),
        ({"arguments": {"num_return_sequences": 2}, "num_beams": 2}, "a row gets one text"),
        ({"arguments": {"top_k": 2}}, "arguments hold options: top_k"),
        ({"config": "nowhere.json"}, "there is no file or folder 'nowhere.json'"),
        ({"config": {"beams": 2}}, "GenerationConfig has no beams"),
    ],
)
def test_options_are_refused_before_the_first_step(options, message, kit_folder):
    """What the library cannot do is said when the run is assembled."""
    with pytest.raises(ConfigError, match=message):
        seq2seq(kit_folder, Generate(**options))


class Ships:
    """A model that comes with a configuration for drawing, as those for conversations do."""

    @hookimpl
    def transforms(self, run):
        def apply(model):
            model.generation_config.update(
                do_sample=True, temperature=0.3, top_p=0.9, length_penalty=2.0, max_length=20
            )
            return model

        return [Transform(Stage.ADAPT, apply)]


def test_the_models_own_configuration_counts_where_it_can(kit_folder):
    """What an option does not say is the model's; its fields for drawing do not stand in the way of a greedy search."""
    trainer, _ = causal(kit_folder, Generate(max_new_tokens=3), Ships())
    config = trainer.run.plugins["generate"]._config
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.3, 0.9)
    greedy, texts = causal(kit_folder, Generate(max_new_tokens=3, do_sample=False), Ships())
    plain, expected = causal(kit_folder, Generate(max_new_tokens=3))
    assert greedy.evaluate() == plain.evaluate()
    assert texts.pairs == expected.pairs


def test_a_model_that_makes_no_text_is_refused(kit_folder):
    """A classifier has nothing to say."""
    with pytest.raises(ConfigError, match=r"generate: the model makes no text(?s:.*)BertForSequenceClassification"):
        Trainer(
            plugins=[HFModel(str(ensure(kit_folder, "model")), labels=("a", "b", "c")), SGD(), Evaluate(), Generate()],
            steps=1,
        ).assemble(kit_rows("tokens", 8, words=6), kit_rows("tokens", 8, words=6))


def test_what_it_needs_is_said_by_the_plan():
    """Without an evaluation and a tokenizer the plan refuses; so does a metric of texts without texts."""
    with pytest.raises(PlanError, match=r"'generate' requires 'evaluation'(?s:.*)'generate' requires 'processor'"):
        Trainer(torch.nn.Linear(1, 1), [SGD(), Generate()], steps=1).assemble([{"x": 1}])
    with pytest.raises(PlanError, match="'exact-match' requires 'texts'"):
        Trainer(torch.nn.Linear(1, 1), [SGD(), Evaluate(), ExactMatch()], steps=1).assemble([{"x": 1}])


def test_rows_without_a_prompt_and_packed_rows_are_refused(kit_folder):
    """Labels from the first token on leave no prompt; packed rows are not rows of the batch."""
    trainer, _ = assembled(kit_folder, "causal", CausalLM(), "sequences", Generate())
    with pytest.raises(DataError, match=r"a row has no prompt(?s:.*)Set prompt_tokens"):
        trainer.evaluate()
    trainer, _ = assembled(kit_folder, "causal", Flatten(), "copies", Generate(prompt_tokens=2))
    with pytest.raises(TrainingError, match=r"these are packed(?s:.*)Evaluate with a collator that pads"):
        trainer.evaluate()


def test_wrappers_of_parallel_training_are_taken_off(kit_folder):
    """The wrapped model has no `generate`; the one inside is used, and the wrapper's forward gives the loss."""

    class SomeDataParallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **batch):
            return self.module(**batch)

    class Wrap:
        @hookimpl
        def transforms(self, run):
            return [Transform(Stage.SHARD, SomeDataParallel)]

    bare, wrapped = (seq2seq(kit_folder, Generate(max_new_tokens=3), *more) for more in ((), (Wrap(),)))
    assert bare[0].evaluate() == wrapped[0].evaluate()
    assert bare[1].pairs == wrapped[1].pairs


def test_a_given_model_and_tokenizer_need_no_model_plugin(kit_folder):
    """A model given to Trainer makes text with a tokenizer given to the plugin."""
    folder, texts = ensure(kit_folder, "seq2seq"), Texts()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    plugins = [Seq2Seq(tokenizer), SGD(), Evaluate(), Generate(tokenizer=tokenizer, max_new_tokens=5, limit=1), texts]
    trainer = Trainer(model, plugins, steps=1, device="cpu")
    trainer.assemble(kit_rows("pairs", 8), kit_rows("pairs", 8, 50))
    trainer.evaluate()
    ids = kit_rows("pairs", 1, 50)[0]["input_ids"]
    assert [text for text, _ in texts.pairs] == [alone(kit_folder, "seq2seq", ids, max_new_tokens=5)]


def test_a_run_logs_the_texts_metrics_under_the_set(kit_folder, tmp_path):
    """In a run, the metrics of texts stand beside the loss, at each evaluation, and samples in a file."""
    model = HFModel(str(ensure(kit_folder, "seq2seq")), task="seq2seq-lm")
    plugins = [model, Seq2Seq(), SGD(), Evaluate(every="1 step"), Generate(max_new_tokens=1, limit=2), ExactMatch()]
    trainer = Trainer(plugins=[*plugins, "jsonl-log"], steps=2, device="cpu", output=tmp_path, log_every=1)
    trainer.fit(kit_rows("pairs", 8), kit_rows("pairs", 3, 50))
    assert trainer.run.metrics["evaluate/exact_match"] == 0.0
    assert trainer.run.metrics["evaluate/generated_tokens"] <= 1.0
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2]
    assert set(lines[0]) == {"step", "split", "input", "prediction", "reference"}


@pytest.mark.slow
def test_two_ranks_measure_the_set_together(kit_folder):
    """Each makes its own rows: the metrics are those of one rank, and rank 0 shows its first samples."""
    folder = ensure(kit_folder, "seq2seq")
    (alone, shown), ranks = evaluate_seq2seq(folder), run_ranks(evaluate_seq2seq, folder, timeout_s=120)
    for result, _ in ranks:
        assert result == {**alone, "loss": pytest.approx(alone["loss"], rel=1e-6)}
    assert [seen for _, seen in ranks] == [shown, ()]
    assert len(shown) == 2
