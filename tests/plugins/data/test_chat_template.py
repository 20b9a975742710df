"""`chat-template`: the tokenizer's own template, with what was answered marked by its characters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from plugin_helpers import cpu_run

from drivetrain import BadRow, ConfigError, DataError, Iterated, Trainer, hookimpl
from drivetrain_plugins import SGD, Loader
from drivetrain_plugins.collate.completion_only import CompletionOnly
from drivetrain_plugins.data import chat_template
from drivetrain_plugins.data.chat_template import ChatTemplate
from drivetrain_plugins.shared.table import Table

TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m['role'] }} : "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} [SEP]{% endgeneration %}"
    "{% else %}{{ m['content'] }} [SEP]{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant : {% endif %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "user", "assistant", "system", ":", "a", "b", "c", "d", "e", "f")
CHATS = [
    [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}],
    [
        {"role": "system", "content": "f"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b c d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "a a"},
    ],
]


@pytest.fixture
def chatty():
    """Return a word-level tokenizer with a chat template that marks answers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {f"{word[1:-1].lower()}_token": word for word in WORDS[:4]}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **named)


def sent(plugin, rows, tokenizer, run=None, split="train"):
    """Send `rows` through the plugin's wrapper as the data plugin's result."""
    wrapper = plugin.build_dataset(run or cpu_run(processor=tokenizer), split)
    next(wrapper)
    with pytest.raises(StopIteration) as stop:
        wrapper.send(rows)
    return stop.value.value


def words(row, mask=None):
    return " ".join(WORDS[i] for n, i in enumerate(row["input_ids"]) if mask is None or row[mask][n])


class Heard:
    """Hooks that keep what is said about bad rows."""

    def __init__(self):
        self.reasons = []

    def bad_row(self, run, reason):
        self.reasons.append(reason)


class Refusing:
    """The kernel's default."""

    def bad_row(self, run, reason):
        raise DataError(reason)


@pytest.mark.parametrize("max_length", [1024, 7])
@pytest.mark.parametrize("side", ["right", "left"])
def test_ids_equal_the_tokenizers_own(max_length, side, chatty):
    """Each row is what apply_chat_template gives for it, cut on the tokenizer's side."""
    chatty.truncation_side = side
    rows = [{"messages": chat} for chat in CHATS]
    before = copy.deepcopy(rows)
    made = sent(ChatTemplate(max_length=max_length), rows, chatty)
    assert rows == before
    assert isinstance(made, Table)
    for number, chat in enumerate(CHATS):
        own = chatty.apply_chat_template(chat, truncation=True, max_length=max_length)
        assert made[number] == {"input_ids": own["input_ids"]}


def test_assistant_masks_equal_the_tokenizers_own(chatty):
    """Where the library's masks are right, they are these."""
    made = sent(ChatTemplate(assistant_masks=True), [{"messages": chat} for chat in CHATS], chatty)
    for number, chat in enumerate(CHATS):
        own = chatty.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert made[number] == {name: own[name] for name in ("input_ids", "assistant_masks")}
    assert words(made[1], "assistant_masks") == "b c d [SEP] a a [SEP]"


def test_assistant_masks_survive_what_the_library_loses(chatty):
    """Cut at the left, or where an answer begins or ends with a space, the library marks nothing or too much."""
    chatty.truncation_side = "left"
    plugin = ChatTemplate(assistant_masks=True, max_length=14)
    made = sent(plugin, [{"messages": CHATS[1]}], chatty)[0]
    own = chatty.apply_chat_template(
        CHATS[1], return_dict=True, return_assistant_tokens_mask=True, truncation=True, max_length=14
    )
    assert made["input_ids"] == own["input_ids"]
    assert words(made, "assistant_masks") == "c d [SEP] a a [SEP]"
    assert sum(own["assistant_masks"]) < sum(made["assistant_masks"])
    spaced = [CHATS[0][0], {"role": "assistant", "content": " c"}]
    assert (
        words(sent(ChatTemplate(assistant_masks=True), [{"messages": spaced}], chatty)[0], "assistant_masks")
        == "c [SEP]"
    )
    other = chatty.apply_chat_template(spaced, return_dict=True, return_assistant_tokens_mask=True)
    assert sum(other["assistant_masks"]) == 0


@pytest.mark.parametrize("marked", [False, True])
def test_prompts_and_completions(marked, chatty):
    """Texts or messages: the row is the whole conversation, and the completion is what follows the prompt."""
    texts = {"prompt": "a b", "completion": "c d"}
    chats = {"prompt": CHATS[1][:4], "completion": CHATS[1][4:]}
    made = sent(ChatTemplate(assistant_masks=marked), [texts, chats], chatty)
    whole = [[{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}], CHATS[1]]
    for number, chat in enumerate(whole):
        assert made[number]["input_ids"] == chatty.apply_chat_template(chat)["input_ids"]
    assert [words(row, "completion_mask") for row in (made[0], made[1])] == ["c d [SEP]", "a a [SEP]"]
    assert ("assistant_masks" in made[0]) == marked
    if marked:
        assert words(made[1], "assistant_masks") == "b c d [SEP] a a [SEP]"


def test_tools_reach_the_template(chatty):
    """A row's tools are given to the template."""
    template = "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}{{ messages[0]['content'] }}"
    rows = [{"messages": CHATS[0][:1], "tools": [{"name": "f"}]}, {"messages": CHATS[0][:1], "tools": None}]
    made = sent(ChatTemplate(template=template), rows, chatty)
    assert [words(made[0]), words(made[1])] == ["f a b", "a b"]


BAD = [
    (
        {"text": "a"},
        r"a row needs 'messages', or 'prompt' and 'completion'. Received: a row with the fields \['text'\]",
    ),
    ({"messages": []}, r"field 'messages' must be a list of messages, and not empty. Received: \[\]"),
    ({"messages": None}, "field 'messages' must be a list of messages"),
    ({"messages": "a"}, "field 'messages' must be a list of messages.*'a'"),
    ({"messages": [{"content": "a"}]}, "field 'messages', message 0: a message needs a role"),
    ({"messages": [CHATS[0][0], "a"]}, "field 'messages', message 1: a message needs a role. Received: 'a'"),
    ({"messages": [{"role": "user"}]}, "field 'messages', message 0: it has no content"),
    ({"messages": [{"role": "user", "content": None}]}, "field 'messages', message 0: it has no content"),
    ({"prompt": "a"}, "a row needs 'messages', or 'prompt' and 'completion'"),
    ({"prompt": "a", "completion": [{"role": "x"}]}, "field 'completion', message 0: it has no content"),
    (["a"], "a row must be a mapping of fields. Received: list"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_are_named_or_left_out(row, message, chatty):
    """A row that makes no conversation is told by number, field and value; where that is tolerated it is left out."""
    rows = [{"messages": CHATS[0]}, {"messages": CHATS[1]}, row]
    with pytest.raises(DataError, match=f"chat-template: train row 2: {message}"):
        sent(ChatTemplate(), rows, chatty, cpu_run(processor=chatty, hooks=Refusing()))
    run = cpu_run(processor=chatty, hooks=Heard())
    made = sent(ChatTemplate(), [rows[0], row, rows[1]], chatty, run)
    assert [made[0], made[1]] == [sent(ChatTemplate(), rows[:2], chatty)[n] for n in (0, 1)]
    assert [reason.startswith("chat-template: train row 1: ") for reason in run.hooks.reasons] == [True]


def test_a_template_that_refuses_a_row_is_told(chatty):
    """What a template raises names the row."""
    template = "{% if messages[0]['content'] == 'a' %}{{ raise_exception('no such role') }}{% endif %}b"
    rows = [{"messages": [{"role": "user", "content": content}]} for content in ("b", "a")]
    with pytest.raises(DataError, match="train row 1: the chat template refuses it: TemplateError: no such role"):
        sent(ChatTemplate(template=template), rows, chatty, cpu_run(processor=chatty, hooks=Refusing()))


def test_a_prompt_that_is_no_beginning_is_told(chatty):
    """Where the template writes the prompt otherwise when an answer follows, nothing is guessed."""
    template = "{{ messages | length }} {{ messages[0]['content'] }}"
    with pytest.raises(DataError, match="row 0: the template renders the prompt otherwise when an answer follows"):
        sent(
            ChatTemplate(template=template),
            [{"prompt": "a", "completion": "b"}],
            chatty,
            cpu_run(processor=chatty, hooks=Refusing()),
        )


def test_rows_of_two_kinds_and_sets_without_rows_are_told(chatty):
    """Columns need one kind of row, and at least one of it."""
    run = cpu_run(processor=chatty, hooks=Heard())
    made = sent(ChatTemplate(), [{"messages": CHATS[0]}, {"prompt": "a", "completion": "b"}], chatty, run)
    assert len(made) == 1
    assert "row 1: it is of another kind than those before" in run.hooks.reasons[0]
    with pytest.raises(DataError, match=r"the train data has no usable row. Received: 1 rows"):
        sent(ChatTemplate(), [{"text": "a"}], chatty, run)


def test_what_a_tokenizer_cannot_do_is_told_at_assembly(chatty):
    """No template, and masks that no template marks, are refused with what to do."""
    with pytest.raises(ConfigError, match=r"(?s)does not mark answers.*\{% generation %\}"):
        sent(ChatTemplate(assistant_masks=True, template=UNMARKED), [{"messages": CHATS[0]}], chatty)
    chatty.chat_template = None
    with pytest.raises(ConfigError, match=r"(?s)the tokenizer has no chat template.*give `template`"):
        sent(ChatTemplate(), [{"messages": CHATS[0]}], chatty)
    assert len(sent(ChatTemplate(template=UNMARKED), [{"messages": CHATS[0]}], chatty)) == 1
    assert sent(ChatTemplate(), None, chatty) is None


@pytest.mark.parametrize("raw", [False, True])
def test_streams_are_made_block_by_block(raw, chatty, monkeypatch):
    """A stream or an iterable gives the rows of the map-style set, bad ones in their place, from any position."""
    monkeypatch.setattr(chat_template, "BATCH", 3)
    rows = [{"messages": CHATS[number % 2]} for number in range(7)]
    whole = sent(ChatTemplate(), rows, chatty)
    expected = [whole[n] for n in range(7)]
    rows[4] = {"messages": [{"role": "user"}]}

    class Lines(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    stream = sent(ChatTemplate(), Lines() if raw else Iterated(rows), chatty)
    stream = pickle.loads(pickle.dumps(stream)) if not raw else stream
    made = list(stream.open(0))
    assert isinstance(made[4], BadRow)
    assert made[4].reason.startswith("chat-template: train row 4: field 'messages', message 0: it has no content")
    assert [row for n, row in enumerate(made) if n != 4] == [row for n, row in enumerate(expected) if n != 4]
    for start in range(8):
        reader = stream.open(1)
        for _ in range(start):
            next(reader)
        rest = list(stream.open(1, reader.position()))
        assert rest == made[start:]


@pytest.mark.parametrize("stream", [False, True])
def test_conversations_train_a_model_on_the_answers(stream, chatty):
    """From messages to steps: map-style or streamed, the run counts the answers' tokens, and learns."""
    from transformers import GPT2Config, GPT2LMHeadModel

    class Processor:
        @hookimpl(wrapper=True)
        def build_model(self, run):
            model = yield
            run.processor, run.shifted_labels = chatty, True
            return model

        provides = ("processor",)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = GPT2Config(
            vocab_size=len(WORDS),
            n_positions=32,
            n_embd=8,
            n_layer=1,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        model = GPT2LMHeadModel(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{"messages": CHATS[number % 2]} for number in range(8)]
    plugins = [Processor(), ChatTemplate(assistant_masks=True), CompletionOnly(), Loader(batch_size=4), SGD(lr=0.1)]
    trainer = Trainer(model, plugins, device="cpu", steps=2)
    trainer.fit(iter_rows(rows) if stream else rows)
    assert trainer.run.progress.items == 2 * (2 * 2 + 2 * 7)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.run.model.state_dict().items())


def iter_rows(rows):
    class Again:
        def __iter__(self):
            return iter(rows)

    return Again()
