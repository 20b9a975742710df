"""`completion-only` labels what was answered, told by a mask, by two lists or by a template."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_rows import SEP, assert_same_batch, assert_sound, bert, build, ragged_rows, seen_by, token_rows, wordpiece

from drivetrain import ConfigError, DataError
from drivetrain_plugins.collate.causal_lm import CausalLM
from drivetrain_plugins.collate.completion_only import CompletionOnly

TOKENIZER = wordpiece()
SMALL = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=14), min_size=1, max_size=5)
PATTERN = st.lists(st.integers(1, 3), min_size=1, max_size=3)


def make(tokenizer=TOKENIZER, **options):
    return build(CompletionOnly(tokenizer, **options))


def targets(batch):
    """Return each row's labels without padding."""
    return [row[keep.bool()].tolist() for row, keep in zip(batch["labels"], batch["attention_mask"], strict=True)]


@settings(max_examples=60, deadline=None)
@given(ragged_rows(), st.randoms(use_true_random=False), st.sampled_from(["completion_mask", "assistant_masks", "own"]))
def test_masks_by_hand(rows, chance, field):
    """For any rows and masks, the labels are the ids where the mask says so; all else is what `causal-lm` makes."""
    masks = [[chance.randint(0, 1) for _ in row["input_ids"]] for row in rows]
    rows = [{**row, field: mask} for row, mask in zip(rows, masks, strict=True)]
    batch = assert_sound(make(mask="own" if field == "own" else None), rows)
    expected = [
        [i if m else -100 for i, m in zip(row["input_ids"], mask, strict=True)]
        for row, mask in zip(rows, masks, strict=True)
    ]
    assert targets(batch) == expected
    plain = build(CausalLM(TOKENIZER))([{"input_ids": row["input_ids"]} for row in rows])
    assert_same_batch(
        {k: v for k, v in batch.items() if k != "labels"}, {k: v for k, v in plain.items() if k != "labels"}
    )


def test_a_mask_of_ones_is_causal_lm():
    """Where everything was answered, the batch is that of `causal-lm`, given labels included."""
    rows = [{**row, "labels": row["input_ids"][::-1]} for row in token_rows([3, 5])]
    masked = [{**row, "completion_mask": [1] * len(row["input_ids"])} for row in rows]
    assert_same_batch(make()(masked), build(CausalLM(TOKENIZER))(rows))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_prompt_and_completion_lists(side, multiple):
    """A prompt's and a completion's ids become one row, whose completion alone is a target."""
    tokenizer = wordpiece(padding_side=side)
    rows = [
        {"prompt_ids": [5, 6], "completion_ids": [7, 8, SEP], "weight": 0.5},
        {"prompt_ids": [9], "completion_ids": [SEP], "weight": 1.0},
    ]
    batch = assert_sound(make(tokenizer, multiple=multiple), rows)
    assert targets(batch) == [[-100, -100, 7, 8, SEP], [-100, SEP]]
    whole = [{"input_ids": row["prompt_ids"] + row["completion_ids"], "weight": row["weight"]} for row in rows]
    plain = build(CausalLM(tokenizer, multiple=multiple))(whole)
    assert_same_batch({**batch, "labels": plain["labels"]}, plain)
    named = [{"question": row["prompt_ids"], "answer": row["completion_ids"]} for row in rows]
    assert targets(make(tokenizer, prompt="question", completion="answer")(named)) == targets(batch)


def test_empty_prompt_is_allowed_and_an_empty_row_is_not():
    """A row may be all completion or all prompt; one without any token is refused."""
    assert targets(make()([{"prompt_ids": [], "completion_ids": [5]}, {"prompt_ids": [6], "completion_ids": []}])) == [
        [5],
        [-100],
    ]
    with pytest.raises(DataError, match="completion-only: a row has no tokens"):
        make()([{"prompt_ids": [], "completion_ids": []}])


def by_hand(ids, template, until):
    """Return the labels of a row by a plain loop; None if it lacks the template."""
    size = len(template)
    begins = [n for n in range(len(ids) - size + 1) if ids[n : n + size] == template]
    if not begins:
        return None
    labels, on = [], False
    answers = {n + size for n in (begins if until else begins[-1:])}
    for place, token in enumerate(ids):
        ends = bool(until) and ids[place : place + len(until)] == until
        on = (on or place in answers) and not ends
        labels.append(token if on else -100)
    return labels


@settings(max_examples=300, deadline=None)
@given(SMALL, PATTERN, st.one_of(st.none(), PATTERN))
def test_templates_by_hand(rows, template, until):
    """For any rows and templates, overlapping and at borders too, the labels are those of a plain loop."""
    given_rows = [{"input_ids": ids} for ids in rows]
    expected = [by_hand(ids, template, until) for ids in rows]
    collate = make(template=template, until=until)
    if None in expected:
        with pytest.raises(DataError, match="completion-only: a row has no template"):
            collate(given_rows)
    else:
        assert targets(assert_sound(collate, given_rows)) == expected


def test_templates_as_text():
    """A template's text is what the tokenizer makes of it without special tokens."""
    ids = TOKENIZER("the red bird sings the blue sky")["input_ids"]
    batch = make(template="bird", until="the")([{"input_ids": ids}])
    sings = TOKENIZER("sings", add_special_tokens=False)["input_ids"]
    assert targets(batch) == [[*[-100] * 4, *sings, *[-100] * (len(ids) - 4 - len(sings))]]


def test_the_template_comes_before_other_fields():
    """Where a template is set, prompt and completion lists do not count."""
    rows = [{"input_ids": [5, 6, 7], "prompt_ids": [1, 1, 1], "completion_ids": [2, 2, 2]}]
    assert targets(make(template=[5])(rows)) == [[-100, 6, 7]]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"input_ids": [5]},
            {},
            "nothing tells prompt and completion apart: a row needs completion_mask or assistant_masks",
        ),
        ({"input_ids": [5], "completion_mask": [1]}, {"mask": "own"}, "a row needs own, or 'prompt_ids'"),
        ({"input_ids": [5], "completion_mask": [1, 0]}, {}, "'completion_mask' must hold a number for each token"),
        ({"input_ids": [5], "completion_mask": 1}, {}, "'completion_mask' must hold a number for each token"),
        ({"prompt_ids": "a", "completion_ids": [5]}, {}, "'prompt_ids' must hold lists of token ids"),
        ({"input_ids": [5, 6]}, {"template": [9]}, r"a row has no template \[9\]. Received: \[5, 6\]"),
    ],
)
def test_rows_that_tell_nothing_are_refused(row, options, message):
    """What a row lacks is named with what was received."""
    with pytest.raises(DataError, match="completion-only: .*" + message):
        make(**options)([row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": ""}, "template must be text, or a list of token ids, and not empty"),
        ({"template": []}, "template must be text"),
        ({"template": [1.5]}, "template must be text"),
        ({"template": 7}, "template must be text"),
        ({"until": [5]}, "`until` ends what a template begins"),
    ],
)
def test_wrong_templates_are_refused_at_assembly(options, message):
    """A template that can match nothing is told before anything is trained."""
    with pytest.raises(ConfigError, match="completion-only: " + message):
        make(**options)


def test_prompts_move_no_weight(tmp_path):
    """The gradient is that of the completion's tokens: a loop by hand over them alone gives the same weights."""
    quiet = {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    rows = [
        {"prompt_ids": [5, 6, 8], "completion_ids": [7, 10, SEP]},
        {"prompt_ids": [9], "completion_ids": [12, SEP]},
    ] * 2
    trainer, batches = seen_by(bert("BertLMHeadModel", **quiet), CompletionOnly(TOKENIZER), rows, tmp_path, epochs=1)
    model = bert("BertLMHeadModel", **quiet)
    (batch,) = batches
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = []
    for ids, scores in zip(batch["input_ids"], logits, strict=True):
        start = 3 if int(ids[0]) == 5 else 1
        stop = 6 if start == 3 else 3
        losses.append(torch.nn.functional.cross_entropy(scores[start - 1 : stop - 1], ids[start:stop], reduction="sum"))
    (sum(losses) / 10).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trainer.run.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
    assert trainer.run.progress.items == 10
