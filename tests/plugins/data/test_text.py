"""`text`: lines, paragraphs and files as rows, against Python's own reading of real sources."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import pytest
from data_helpers import assert_goes_on, drain, lenient_run, reasons, strict_run

from drivetrain import DataError
from drivetrain_plugins.data.text import Text

SOURCES = [str(Path(sysconfig.get_path("stdlib")) / name) for name in ("bisect.py", "this.py", "keyword.py")]


def expected(by):
    """Return the texts by independent means: splitlines, a regular expression, read_text."""
    found = []
    for path in SOURCES:
        text = Path(path).read_text("utf-8")
        pieces = {
            "line": text.splitlines,
            "paragraph": lambda t=text: re.split(r"\n(?:[ \t]*\n)+", t),
            "file": lambda t=text: [t],
        }
        found += [piece.strip("\n") for piece in pieces[by]() if piece.strip()]
    return found


@pytest.mark.parametrize("by", ["line", "paragraph", "file"])
def test_rows_are_what_python_reads(by):
    """Lines, paragraphs and files of real sources are those that Python's own means give, indentation kept."""
    rows = Text(SOURCES, by=by).build_dataset(strict_run(), "train")
    assert [row["text"].rstrip() for row in rows] == [text.rstrip() for text in expected(by)]
    assert all(list(row) == ["text"] for row in rows)


@pytest.mark.parametrize("by", ["line", "paragraph", "file"])
def test_a_stream_goes_on_anywhere(by):
    """The rows of a stream are those of the whole, from every position on."""
    stream = Text(SOURCES, by=by, stream=True).build_dataset(strict_run(), "train")
    assert assert_goes_on(stream, every=7 if by == "line" else 1) == Text(SOURCES, by=by).build_dataset(
        strict_run(), "train"
    )


@pytest.mark.parametrize(("by", "lines", "left"), [("line", [4, 7], 3), ("paragraph", [3, 7], 1), ("file", [1], 0)])
def test_what_is_no_text_is_named_by_its_line(by, lines, left, tmp_path):
    """Bytes that are no UTF-8, and NUL, are told by file and the line where the row begins; the others are rows."""
    (tmp_path / "a.txt").write_bytes(
        b"\none\ntwo\nthree \xff\n\n  \nfour \0\n\n\nfive\n"
        if by != "paragraph"
        else b"\n \nthree\n\xff\n\n  \nfour \0\n\n\nfive"
    )
    run, told = lenient_run()
    rows = Text(str(tmp_path / "*.txt"), by=by).build_dataset(run, "train")
    assert len(rows) == left
    assert [int(re.search(r"a.txt:(\d+): no text in UTF-8", reason)[1]) for reason in told] == lines
    streamed, _ = drain(Text(str(tmp_path / "*.txt"), by=by, stream=True).build_dataset(run, "train"))
    assert reasons(streamed) == told
    with pytest.raises(DataError, match=f"a.txt:{lines[0]}: no text in UTF-8"):
        Text(str(tmp_path / "a.txt"), by=by).build_dataset(strict_run(), "train")


def test_line_ends_of_other_systems_are_line_ends(tmp_path):
    """A carriage return before the line end belongs to it, and a blank line may have one."""
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    for by, texts in (("line", ["one", "two", "three"]), ("paragraph", ["one\ntwo", "three"])):
        rows = Text(str(tmp_path / "a.txt"), by=by).build_dataset(strict_run(), "train")
        assert [row["text"] for row in rows] == texts


def test_named_evaluation_sets_and_missing_files(tmp_path):
    """Sets by name are splits of their own; a file that is not there is named."""
    (tmp_path / "a.txt").write_text("x\n")
    plugin = Text(str(tmp_path / "no.txt"), evaluate={"a": str(tmp_path / "a.txt")})
    assert plugin.facts == {"splits": ["evaluate/a"]}
    assert plugin.build_dataset(strict_run(), "evaluate/a") == [{"text": "x"}]
    assert plugin.build_dataset(strict_run(), "evaluate") is None
    with pytest.raises(DataError, match=r"no\.txt: cannot be read: FileNotFoundError"):
        plugin.build_dataset(strict_run(), "train")
