"""`jsonl`: rows from files, and bad lines by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
import torch
from data_helpers import assert_goes_on, drain, lenient_run, reasons, standard_library, strict_run, write_jsonl
from plugin_helpers import as_rows, assert_same_weights, columns, fit, net

from drivetrain import DataError
from drivetrain_plugins import SGD, Evaluate, Jsonl
from drivetrain_plugins.data._files import FileStream
from drivetrain_plugins.data.jsonl import parse


def test_rows_are_the_objects_of_the_file(tmp_path):
    """Each line is a row, in order; empty lines are passed over; text keeps its characters and line ends do not matter."""
    rows = [{"text": "Zürich 北京 \u2028 end", "label": 1}, {"text": "b", "values": [1.5, None, True]}]
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes(f"{lines[0]}\r\n\n  \n{lines[1]}".encode())
    assert Jsonl(str(file)).build_dataset(strict_run(), "train") == rows


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
        (b'{"a": 1}\n{"a": "\\ud83d"}\n', 2, "surrogates not allowed"),
        (b'{"a": 1}\n{"a": [{"b": "x\\u0000"}]}\n', 2, "NUL character"),
        (b'{"a": 1}\n{"\\u0000": 1}\n', 2, "NUL character"),
        (b'{"a": 1}\n{"a": "x\0"}\n', 2, "NUL characters"),
        (b'{"a": 1}\n{"b": {"a": 1, "a": 2}}\n', 2, "field 'a' stands there twice"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", 1, "4300 digits"),
    ],
)
def test_bad_lines_are_named(content, line, message, tmp_path):
    """A line that is no JSON object in UTF-8 is refused with file, line and what stands there."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)rows\.jsonl:{line}: .*{message}"):
        Jsonl(str(file)).build_dataset(strict_run(), "train")


@pytest.mark.parametrize("url", ["no/such/file.jsonl", "nosuchprotocol://a/b.jsonl", ""])
def test_a_file_that_cannot_be_opened_is_named(url):
    """A missing file, and a URL that nothing reads, are refused by name."""
    with pytest.raises(DataError, match=f"{url}: cannot be read"):
        Jsonl(url).build_dataset(strict_run(), "train")


def test_a_folder_is_no_file(tmp_path):
    """A folder in place of a file is refused by name."""
    with pytest.raises(DataError, match="cannot be read: IsADirectoryError"):
        Jsonl(str(tmp_path)).build_dataset(strict_run(), "train")


def test_other_file_systems_are_read():
    """Any fsspec URL will do."""
    with fsspec.open("memory://test_jsonl/rows.jsonl", "wt") as file:
        file.write('{"a": 1}\n{"a": 2}\n')
    assert Jsonl("memory://test_jsonl/rows.jsonl").build_dataset(strict_run(), "train") == [{"a": 1}, {"a": 2}]


def test_escapes_that_are_text_pass(tmp_path):
    """A pair of surrogates, and a backslash before letters that look like an escape, are text."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": "\\ud83d\\ude00 \\\\u0000"}\n')
    assert Jsonl(str(file)).build_dataset(strict_run(), "train") == [{"a": "\U0001f600 \\u0000"}]


SIX = b'{"n": 0}\n\nbroken\n{"n": 1}\r\n[2]\n  \n{"n": 2}'


def test_bad_lines_are_told_and_left_out(tmp_path):
    """Where the run leaves bad rows out, it is told of each by file and line, and has the others."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(SIX)
    run, told = lenient_run()
    assert Jsonl(str(file)).build_dataset(run, "train") == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert [reason.partition(" ")[0] for reason in told] == [f"{file}:3:", f"{file}:5:"]


def test_a_stream_puts_bad_rows_in_their_place_and_goes_on_anywhere(tmp_path):
    """Read as a stream, the rows are the same, bad ones stand between them, and any position leads on to the rest."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_bytes(SIX)
    stream = Jsonl(str(tmp_path / "*.jsonl"), stream=True).build_dataset(strict_run(), "train")
    rows = assert_goes_on(stream)
    assert [row["n"] if isinstance(row, dict) else "bad" for row in rows] == [0, "bad", 1, "bad", 2] * 2
    lines = [f"{tmp_path}/{name}.jsonl:{line}:" for name in ("one", "two") for line in (3, 5)]
    assert [reason.partition(" ")[0] for reason in reasons(rows)] == lines


def test_a_position_is_file_byte_and_line(tmp_path):
    """What a checkpoint keeps of a stream is the file, its name, the byte after the row and the line."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(SIX)
    stream = Jsonl(str(file), stream=True).build_dataset(strict_run(), "train")
    positions = [drain(stream, count=count)[1] for count in range(4)]
    assert positions == [[0, "rows.jsonl", byte, line] for byte, line in ((0, 0), (9, 1), (17, 3), (27, 4))]


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_compressed_files_are_read_and_gone_on_in(suffix, tmp_path):
    """Compression is told by the suffix; a position in a compressed file counts bytes of the text."""
    rows = standard_library(40)
    with fsspec.open(f"file://{tmp_path}/rows.jsonl{suffix}", "wt", compression="infer") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    path = f"{tmp_path}/rows.jsonl{suffix}"
    assert Jsonl(path).build_dataset(strict_run(), "train") == rows
    assert assert_goes_on(Jsonl(path, stream=True).build_dataset(strict_run(), "train"), every=17) == rows


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_compressed_file_is_named(suffix, damage, tmp_path):
    """A download that was cut, and one with a wrong checksum, end the run; they are more than a bad row."""
    path = tmp_path / f"rows.jsonl{suffix}"
    with fsspec.open(f"file://{path}", "wb", compression="infer") as file:
        file.write(b"".join(b'{"n": %d}\n' % (n * 7919 % 1013) for n in range(3000)))
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        del raw[-len(raw) // 3 :]
    else:
        raw[-6 if suffix == ".gz" else len(raw) // 2] ^= 0x55
    path.write_bytes(raw)
    run, _ = lenient_run()
    for read in (
        lambda: Jsonl(str(path)).build_dataset(run, "train"),
        lambda: drain(FileStream((str(path),), "", parse)),
    ):
        with pytest.raises(DataError, match=rf"rows.jsonl{suffix}: cannot be read: \w+"):
            read()


def test_several_files_and_globs_are_read_in_order(tmp_path):
    """A list keeps its order, a glob is sorted; one that matches nothing is refused by name."""
    for n, name in enumerate("bca"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"n": n}])
    run = strict_run()
    listed = Jsonl([f"{tmp_path}/c.jsonl", f"{tmp_path}/a.jsonl"], evaluate={"x": f"{tmp_path}/[bc].jsonl"})
    assert listed.build_dataset(run, "train") == [{"n": 1}, {"n": 2}]
    assert listed.build_dataset(run, "evaluate/x") == [{"n": 0}, {"n": 1}]
    (tmp_path / "[1].jsonl").write_text('{"n": 9}\n')
    assert Jsonl(f"{tmp_path}/[1].jsonl").build_dataset(run, "train") == [{"n": 9}]
    with pytest.raises(DataError, match=r"none\*.jsonl: no file matches"):
        Jsonl(f"{tmp_path}/none*.jsonl").build_dataset(run, "train")


def test_globs_of_other_file_systems_keep_their_protocol():
    """A glob in a URL is filled in by its file system."""
    for n in range(3):
        with fsspec.open(f"memory://test_jsonl_glob/{n}.jsonl", "wt") as file:
            file.write(f'{{"n": {n}}}\n')
    assert Jsonl("memory://test_jsonl_glob/*.jsonl").build_dataset(strict_run(), "train") == [
        {"n": n} for n in range(3)
    ]


def test_a_position_in_other_files_is_refused(tmp_path):
    """A stream is gone on in only where its files are still those of the position."""
    rows = [{"n": n} for n in range(20)]
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    stream = Jsonl(str(tmp_path / "*.jsonl"), stream=True).build_dataset(strict_run(), "train")
    _, position = drain(stream, count=25)
    for changed, message in (
        (lambda: write_jsonl(tmp_path / "aa.jsonl", rows), "position to go on from is in 'b.jsonl', which was file 2"),
        (lambda: write_jsonl(tmp_path / "b.jsonl", rows[:3]), r"b.jsonl: no row ends at byte 45 \(line 5\)"),
        (lambda: write_jsonl(tmp_path / "b.jsonl", [{"number": n} for n in range(20)]), "file has changed since"),
    ):
        path = Path(changed())
        with pytest.raises(DataError, match=message):
            drain(Jsonl(str(tmp_path / "*.jsonl"), stream=True).build_dataset(strict_run(), "train"), 0, position)
        if path.name == "aa.jsonl":
            path.unlink()


def test_splits_that_were_not_given_are_none(tmp_path):
    """Without an evaluation file there is no such split; named sets have only their names."""
    train, run = write_jsonl(tmp_path / "train.jsonl", [{"a": 1}]), strict_run()
    assert Jsonl(train).build_dataset(run, "evaluate") is None
    named = Jsonl(train, evaluate={"easy": train})
    assert named.build_dataset(run, "evaluate") is None
    assert named.build_dataset(run, "evaluate/easy") == [{"a": 1}]
    assert named.build_dataset(run, "evaluate/other") is None
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
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    sets = {"a": write_jsonl(tmp_path / "a.jsonl", held[:4]), "b": write_jsonl(tmp_path / "b.jsonl", held[4:])}
    ours, theirs = FromLists(), FromLists()
    trainer, _ = fit(ours, [Jsonl(train, evaluate=sets), SGD(lr=0.1), Evaluate()], None, epochs=2)
    given = {"a": held[:4], "b": held[4:]}
    other, _ = fit(theirs, [SGD(lr=0.1), Evaluate()], rows, given, epochs=2)
    assert_same_weights(ours, theirs)
    assert {k for k in trainer.run.metrics if k.startswith("evaluate")} == {"evaluate/a/loss", "evaluate/b/loss"}
    assert trainer.run.metrics == other.run.metrics
