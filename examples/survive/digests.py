"""Print the SHA-256 of all that a run leaves: what it exported, each file of its last checkpoint, and its log.

    python examples/survive/digests.py runs/survive [s3://bucket/checkpoints]

The manifest is left out, as the list of these digests and of the machine it is.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import fsspec

run = Path(sys.argv[1])
store, root = fsspec.core.url_to_fs(sys.argv[2] if len(sys.argv) > 2 else str(run / "checkpoints"))
found = sorted(store.glob(f"{root}/step-*"), key=lambda path: int(path.rpartition("-")[2]))
if not found:
    sys.exit(f"there is no checkpoint in {root}")
last = found[-1]
folder = last
if store.exists(f"{last}/COMMIT"):  # in an object store it names the attempt that counts
    folder = f"{last}/{json.loads(store.cat_file(f'{last}/COMMIT'))['attempt']}"
names = sorted(json.loads(store.cat_file(f"{folder}/manifest.json"))["files"])
contents = {path: (run / path).read_bytes() for path in ("model.safetensors", "log.jsonl")}
contents |= {f"{last.rpartition('/')[2]}/{name}": store.cat_file(f"{folder}/{name}") for name in names}
for name, content in contents.items():
    print(f"  {hashlib.sha256(content).hexdigest()}  {name}")
