"""Text that the model makes during an evaluation, for metrics of texts and for people to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain.rng import global_seeder
from drivetrain_plugins.evaluate import _generation, _texts
from drivetrain_plugins.shared import samples
from drivetrain_plugins.shared.exports import bare
from drivetrain_plugins.shared.generators import kept_generators

if TYPE_CHECKING:
    import pluggy

    from drivetrain import Micro, Run

TO_CONFIG = (
    "max_new_tokens", "num_beams", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size",
)  # fmt: skip


@attrs.define(eq=False)
class Generation:
    """One pass over one split: make texts, hand them to the metrics, keep the first as samples."""

    plugin: Generate
    run: Run
    split: str
    metrics: list[_texts.TextMetric]
    share: int | None  # how many rows this rank takes; None is all
    rows: int | None  # of how many; None where nobody knows, in a stream
    sums: _texts.Sums  # new tokens, rows
    shown: list[dict[str, Any]] = attrs.field(factory=list)
    seen: int = 0

    def update(self, micro: Micro) -> None:
        """Make a text for each row of the batch that is chosen and has a reference."""
        plugin, run, model, begin = self.plugin, self.run, bare(self.run.model), self.seen
        chosen = self._chosen(len(_generation.labels_of(micro.batch)))
        if not chosen:
            return
        task = plugin.task(model, micro.batch, chosen)
        if not len(task):
            return
        with kept_generators(run.device):  # the loss of the rest of the evaluation must not depend on what is drawn
            stream = f"generate/{self.split}"
            global_seeder(run.device)(run.seed_for(stream, run.progress.step, begin, run.rank))
            made = plugin.new_tokens(model, task)
        self.sums.add([sum(map(len, made)), len(made)])
        predictions, references = plugin.decode(run, made), plugin.decode(run, task.references)
        for metric in self.metrics:
            metric.update(predictions, references)
        if run.rank == 0 and (room := plugin.samples - len(self.shown)) > 0:
            inputs = plugin.decode(run, task.prompts[:room])
            rows = zip(inputs, predictions, references, strict=False)
            self.shown += [dict(zip(("input", "prediction", "reference"), row, strict=True)) for row in rows]

    def _chosen(self, size: int) -> list[int]:
        """Return places in the next batch: spread over the set, whose order may go by length; the first in a stream."""
        places, share, rows = range(self.seen, self.seen + size), self.share, self.rows
        self.seen += size
        if share is None:
            return list(range(size))
        return [
            n for n, place in enumerate(places) if (place < share if rows is None else place * share % rows < share)
        ]

    def compute(self) -> dict[str, float]:
        """Return the metrics of the texts and their mean length; show the samples."""
        tokens, rows = self.sums.total()
        result = {"generated_tokens": tokens / rows} if rows else {}
        for metric in self.metrics:
            result.update(metric.compute())
        if self.shown:
            hooks: Any = self.run.hooks
            hooks.samples(self.run, self.split, self.shown)
        return result


@plugin(
    role="evaluate",
    effect="observes",
    provides=["texts"],
    example={"max_new_tokens": 2, "prompt_tokens": 2, "limit": 4},
    rows="copies",
    companions={"hf-model": {"path": "{kit}/causal", "task": "causal-lm"}, "causal-lm": {}, "causal-lm-loss": {}},
)
class Generate:
    """Let the model make text in evaluations: from sources (seq2seq), or from prompts (causal).

    A causal prompt is what stands before a row's first label (as `completion-only` makes rows), or its first
    `prompt_tokens` tokens. Options that are None are those of the model's own generation configuration.
    """

    max_new_tokens: int | None = option(None, ge=1, help="most tokens of a text; None: the model's, or 64")
    num_beams: int | None = option(None, ge=1, help="beams of the search; 1 is greedy")
    do_sample: bool | None = option(None, help="draw tokens, from a stream of the run, instead of taking the likeliest")
    temperature: float | None = option(None, gt=0, help="divides the logits before drawing")
    top_k: int | None = option(None, ge=0, help="draw from so many of the likeliest tokens; 0 is all")
    top_p: float | None = option(None, gt=0, le=1, help="draw from the likeliest tokens of this total probability")
    repetition_penalty: float | None = option(None, gt=0, help="above 1, tokens that were there become less likely")
    length_penalty: float | None = option(None, help="above 0, beams favour longer texts")
    no_repeat_ngram_size: int | None = option(None, ge=0, help="no n-gram of this length comes twice")
    config: Any = option(None, help="a GenerationConfig: its file or folder, or a table of its fields")
    prompt_tokens: int | None = option(None, ge=1, help="length of a causal model's prompts; None: up to the labels")
    limit: int | None = option(None, ge=1, help="make so many rows of a set, spread over it; None is all")
    samples: int = option(4, ge=0, help="how many of the first rows are shown, as logs and trackers do")
    skip_special_tokens: bool = option(True, help="leave special tokens out of the texts")
    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    arguments: dict[str, Any] = option(factory=dict, help="further fields of transformers' GenerationConfig")
    _config: Any = option(None, init=False)

    @property
    def requires(self) -> tuple[str, ...]:
        """What must be in the run: an evaluation, and a tokenizer unless one is given."""
        return ("evaluation",) if self.tokenizer is not None else ("evaluation", "processor")

    @property
    def settings(self) -> dict[str, Any]:
        """The options that are fields of GenerationConfig, where they are set."""
        named = {name: value for name in TO_CONFIG if (value := getattr(self, name)) is not None}
        return {**named, **self.arguments}

    @hookimpl
    def add_hooks(self, manager: pluggy.PluginManager) -> None:
        """Bring the hooks of texts and of samples."""
        manager.add_hookspecs(_texts.TextHooks)
        manager.add_hookspecs(samples.SampleHooks)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse a model that makes no text, a run without a tokenizer, and options that the library refuses."""
        model, tokenizer = bare(run.model), self.tokenizer_of(run)
        able = getattr(model, "can_generate", lambda: hasattr(model, "generate"))
        if not (hasattr(model, "generate") and hasattr(model, "generation_config") and able()):
            do = 'take a model of transformers that does, such as hf-model with task = "causal-lm" or "seq2seq-lm"'
            raise ConfigError([Problem("generate: the model makes no text", type(model).__name__, do, kind="missing")])
        if not hasattr(tokenizer, "batch_decode"):
            do = "give a tokenizer, or take a model plugin that brings one"
            raise ConfigError([Problem("generate: nothing turns tokens into text", type(tokenizer).__name__, do)])
        if both := sorted(set(self.arguments) & set(TO_CONFIG)):
            do = "set them by the options"
            raise ConfigError(
                [Problem(f"generate: arguments hold options: {', '.join(both)}", str(self.arguments), do)]
            )
        inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor of pictures or sound
        self._config = _generation.configuration(model, inner, self.config, self.settings)

    def tokenizer_of(self, run: Run) -> Any:
        """Return what turns token ids into text."""
        return run.processor if self.tokenizer is None else self.tokenizer

    def task(self, model: Any, batch: Any, chosen: list[int]) -> _generation.Task:
        """Return what is to be made of a batch's chosen rows."""
        if model.config.is_encoder_decoder:
            return _generation.sequence_to_sequence(batch, chosen)
        pad = self._config.pad_token_id
        return _generation.continuation(batch, chosen, self.prompt_tokens, 0 if pad is None else pad)

    def decode(self, run: Run, tokens: list[list[int]]) -> list[str]:
        """Return the texts of token ids."""
        texts: list[str] = self.tokenizer_of(run).batch_decode(tokens, skip_special_tokens=self.skip_special_tokens)
        return texts

    def new_tokens(self, model: Any, task: _generation.Task) -> list[list[int]]:
        """Return what the model makes, by row."""
        return _generation.new_tokens(model, task, self._config)

    @hookimpl
    def metrics(self, run: Run, split: str) -> list[Generation]:
        """Return a fresh pass: the metrics of the texts come with it."""
        hooks: Any = run.hooks
        brought = [metric for metrics in hooks.text_metrics(run, split) for metric in metrics]
        rows, ranks = run.batches[split].rows_per_epoch, run.world_size
        own = None if rows is None else -(-rows // ranks)
        share = None if self.limit is None else self.limit // ranks + (run.rank < self.limit % ranks)
        return [Generation(self, run, split, brought, share, own, _texts.Sums.zeros(run, 2))]
