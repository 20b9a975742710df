"""Fetch hand-labelled US addresses, and write them as JSON lines. Once; a second call finds them.

    python examples/addresses/fetch.py

They lie in the source distribution of `usaddress` (MIT), which pip downloads; its bytes are checked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

NAME, VERSION = "usaddress", "0.5.16"
SHA256 = "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6"
MEMBER = f"{NAME}-{VERSION}/training/labeled.xml"
FOLDER = Path(__file__).parent / "data"
KEPT_ASIDE = 0.2
Row = dict[str, list[str]]


def download(folder: Path) -> Path:
    """Let pip download the source distribution into `folder`; it refuses one with another checksum."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", NAME, "--require-hashes", "-r", str(wanted), "-d", str(folder)]
    print(f"asking pip for the source distribution of {NAME} {VERSION} ...")
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        last = "\n".join(f"  {line}" for line in done.stdout.strip().splitlines()[-6:])
        sys.exit(
            f"The addresses are missing: pip could not download the source distribution of {NAME} {VERSION}. "
            f"Its last lines:\n{last}\n"
            "Run this again where pip reaches a package index, or get the file yourself and run\n"
            f"  python {sys.argv[0]} --sdist {NAME}-{VERSION}.tar.gz"
        )
    return folder / f"{NAME}-{VERSION}.tar.gz"


def read(sdist: Path) -> list[Row]:
    """Return the labelled addresses in the distribution, without doubles."""
    try:
        found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    except OSError as error:
        sys.exit(f"{sdist} cannot be read: {error.strerror}. Give the file {NAME}-{VERSION}.tar.gz")
    if found != SHA256:
        sys.exit(f"{sdist} is another file: its SHA-256 is {found}, not {SHA256}. Get {NAME}-{VERSION}.tar.gz again")
    with tarfile.open(sdist) as archive:
        text = archive.extractfile(MEMBER).read()
    rows: dict[str, Row] = {}
    for address in ET.fromstring(text):  # noqa: S314 - the file's bytes are known
        row = {"words": [str(word.text) for word in address], "tags": [word.tag for word in address]}
        rows.setdefault(key(row["words"]), row)
    return list(rows.values())


def key(words: list[str]) -> str:
    """Return letters and digits: addresses that differ in commas and capitals only are the same."""
    return "".join(c for c in "".join(words).lower() if c.isalnum())


def split(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows to train on and those to keep aside; which ones depends on their text only."""
    parts: dict[str, list[Row]] = {"train": [], "evaluate": []}
    for row in rows:
        number = int(hashlib.sha256(key(row["words"]).encode()).hexdigest(), 16)
        parts["evaluate" if number % 1000 < 1000 * KEPT_ASIDE else "train"].append(row)
    return parts


def main() -> None:
    """Fetch, convert, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help=f"take this {NAME}-{VERSION}.tar.gz instead of asking pip")
    parser.add_argument(
        "--to", type=Path, default=FOLDER, help="folder for the files (default: data, beside this file)"
    )
    given = parser.parse_args()
    files = {name: given.to / f"{name}.jsonl" for name in ("train", "evaluate")}
    if all(file.is_file() for file in files.values()):
        print(f"they are there already: {', '.join(map(str, files.values()))}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows = read(given.sdist or download(Path(scratch)))
    given.to.mkdir(parents=True, exist_ok=True)
    for name, part in split(rows).items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        unfinished = files[name].with_suffix(".part")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(files[name])
        print(f"wrote {len(part)} addresses, {sum(len(row['words']) for row in part)} words, to {files[name]}")


if __name__ == "__main__":
    main()
