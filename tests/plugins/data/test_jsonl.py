"""`jsonl`: rows from files, and bad lines by file and line."""

from __future__ import annotations

import json

import fsspec
import pytest
import torch
from plugin_helpers import as_rows, assert_same_weights, columns, fit, net

from drivetrain import DataError
from drivetrain_plugins import SGD, Evaluate, Jsonl


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_are_the_objects_of_the_file(tmp_path):
    """Each line is a row, in order; empty lines are passed over; text keeps its characters and line ends do not matter."""
    rows = [{"text": "Zürich 北京 \u2028 end", "label": 1}, {"text": "b", "values": [1.5, None, True]}]
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes(f"{lines[0]}\r\n\n  \n{lines[1]}".encode())
    assert Jsonl(str(file)).build_dataset("train") == rows


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'{"a": 1}\n\n{"a": 2', 3, "not JSON"),  # a download that was cut
        (b'{"a": 1}\nnothing\n', 2, "not JSON.*'nothing"),
        (b'{"a": 1}\n[1, 2]\n', 2, r"a row must be a JSON object. Received: '\[1, 2\]"),
        (b'3\n{"a": 1}\n', 1, "a row must be a JSON object. Received: '3"),
        (b'{"a": 1}\n{"a": "\xff\xfe"}\n{"a": 2}\n', 2, "not JSON in UTF-8.*0xff"),
        (b'{"a": 1}\n' + b"[" * 100_000, 2, "not JSON"),
        (b'\xef\xbb\xbf{"a": 1}\n', 1, "BOM"),
        (b'{"a": 1}{"a": 2}\n', 1, "Extra data"),
    ],
)
def test_bad_lines_are_named(content, line, message, tmp_path):
    """A line that is no JSON object in UTF-8 is refused with file, line and what stands there."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)rows\.jsonl:{line}: .*{message}"):
        Jsonl(str(file)).build_dataset("train")


@pytest.mark.parametrize("url", ["no/such/file.jsonl", "nosuchprotocol://a/b.jsonl", ""])
def test_a_file_that_cannot_be_opened_is_named(url):
    """A missing file, and a URL that nothing reads, are refused by name."""
    with pytest.raises(DataError, match=f"{url}: cannot be read"):
        Jsonl(url).build_dataset("train")


def test_a_folder_is_no_file(tmp_path):
    """A folder in place of a file is refused by name."""
    with pytest.raises(DataError, match="cannot be read: IsADirectoryError"):
        Jsonl(str(tmp_path)).build_dataset("train")


def test_other_file_systems_are_read():
    """Any fsspec URL will do."""
    with fsspec.open("memory://test_jsonl/rows.jsonl", "wt") as file:
        file.write('{"a": 1}\n{"a": 2}\n')
    assert Jsonl("memory://test_jsonl/rows.jsonl").build_dataset("train") == [{"a": 1}, {"a": 2}]


def test_splits_that_were_not_given_are_none(tmp_path):
    """Without an evaluation file there is no such split; named sets have only their names."""
    train = write(tmp_path / "train.jsonl", [{"a": 1}])
    assert Jsonl(train).build_dataset("evaluate") is None
    named = Jsonl(train, evaluate={"easy": train})
    assert named.build_dataset("evaluate") is None
    assert named.build_dataset("evaluate/easy") == [{"a": 1}]
    assert named.build_dataset("evaluate/other") is None
    assert named.facts == {"splits": ["evaluate/easy"]}


class FromLists(torch.nn.Module):
    """A `Net` that takes what the default collation makes of lists of numbers."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, features, labels):
        return self.net(torch.stack(features, 1).float(), labels)


def test_run_trains_on_the_files_and_evaluates_each_named_set(tmp_path):
    """Training from files equals training on the rows, and every named set is evaluated under its name."""

    def plain(rows):
        return [{"features": row["features"].tolist(), "labels": int(row["labels"])} for row in rows]

    rows, held = plain(as_rows(columns(20))), plain(as_rows(columns(9, seed=8)))
    train = write(tmp_path / "train.jsonl", rows)
    sets = {"a": write(tmp_path / "a.jsonl", held[:4]), "b": write(tmp_path / "b.jsonl", held[4:])}
    ours, theirs = FromLists(), FromLists()
    trainer, _ = fit(ours, [Jsonl(train, evaluate=sets), SGD(lr=0.1), Evaluate()], None, epochs=2)
    given = {"a": held[:4], "b": held[4:]}
    other, _ = fit(theirs, [SGD(lr=0.1), Evaluate()], rows, given, epochs=2)
    assert_same_weights(ours, theirs)
    assert {k for k in trainer.run.metrics if k.startswith("evaluate")} == {"evaluate/a/loss", "evaluate/b/loss"}
    assert trainer.run.metrics == other.run.metrics
