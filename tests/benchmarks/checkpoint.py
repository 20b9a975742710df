"""What a save costs the loop: `python tests/benchmarks/checkpoint.py [FOLDER] [--rounds 3] [--only NAME ...] [--json FILE]`.

A model of 50 M parameters with AdamW's state (604 MB in float32) trains on one thread, and is saved by `checkpoint`,
`async-checkpoint` (in a thread, and in a forked child), torch.save, raw safetensors, raw safetensors with a digest of the
bytes and an fsync (what `checkpoint` has to be measured against: it promises both), torch.distributed.checkpoint and
`transformers.Trainer` (which needs `accelerate`). All of them train the same: their parameters are compared.

Every contender runs in a fresh process, interleaved. Reported are medians over rounds, the first save of a process apart
from later ones, as it allocates what those reuse: CPU seconds of the thread that trains and wall seconds for which the loop
stands still; CPU seconds that the save takes in all, wherever it is made; what the next ten steps take, over ten steps
without a save; the most memory over that of the same process without a save (a forked child's own pages included); MB of files; seconds until the files are complete. The CPU seconds are
the figures to trust on a machine that others use too. Files are removed, and the disk made idle, between saves and rounds.
Not a test: it asserts no time.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1")

from checkpoint_contenders import CONTENDERS, DURABLE, children_of, one

SAMPLE_S = 0.25  # between two looks at the memory of children


def memory_of(pid: int) -> float:
    """Return the MB of a process and its children, where pages they share are counted once; 0 if it has none."""
    try:
        children = children_of(pid)
        rollups = [Path(f"/proc/{each}/smaps_rollup").read_text() for each in [pid, *children] if children]
    except OSError:  # one of them has just ended
        return 0.0
    return sum(int(text.partition("Pss:")[2].split()[0]) for text in rollups) / 1e3


def spawn(name: str, saves: int, folder: Path) -> dict[str, Any]:
    """Run one contender in a process of its own, with an eye on the children it forks."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = [sys.executable, __file__, output, "--one", name, "--saves", str(saves)]
        with tempfile.TemporaryFile("w+") as said:  # libraries warn of much that is no matter here
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
            together = 0.0
            while not select.select([process.stdout], [], [], SAMPLE_S)[0]:  # it prints once, at its end
                together = max(together, memory_of(process.pid))
            printed = process.communicate()[0]
            if process.returncode:
                said.seek(0)
                sys.exit(f"{name} failed with status {process.returncode}:\n{said.read()}")
    os.sync()
    result = json.loads(printed.splitlines()[-1])
    for save in result.get("saves", []):
        save["memory"] = max(save["memory"], together - result["memory_before"])
    return result


def disk(folder: Path) -> str:
    """Say where the files go, and how fast 256 MB get there."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    device, _, system = max((m for m in mounts if folder.is_relative_to(m[1])), key=lambda m: len(m[1]))
    chunk, started = os.urandom(2**20), time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(256):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    speed = 256 * 2**20 / 1e6 / (time.perf_counter() - started)
    free = shutil.disk_usage(folder).free / 1e9
    return f"{folder}: {system} on {device}, {free:.0f} GB free, {speed:.0f} MB/s written and synced"


def middle(found: list[dict[str, Any]], key: str, saves: slice) -> float:
    """Return the median of a figure over rounds, for some of a process's saves."""
    return statistics.median(save[key] for result in found for save in result["saves"][saves])


def row(name: str, found: list[dict[str, Any]]) -> str:
    """Return a line of the table."""
    if reasons := [result["skipped"] for result in found if "skipped" in result]:
        return f"{name:<29}skipped: {reasons[0]}"
    first, later, both = slice(0, 1), slice(1, None), slice(None)
    if len(found[0]["saves"]) == 1:
        later = first
    return (
        f"{name:<29}{middle(found, 'cpu', first):>8.3f}{middle(found, 'cpu', later):>8.3f}"
        f"{middle(found, 'wall', first):>9.3f}{middle(found, 'wall', later):>8.3f}{middle(found, 'cpu_of_all', both):>9.2f}"
        f"{middle(found, 'slow_cpu', both):>8.2f}{middle(found, 'slow_wall', both):>7.2f}"
        f"{max(s['memory'] for r in found for s in r['saves']):>8.0f}{middle(found, 'written', both):>7.0f}"
        f"{middle(found, 'complete', both):>9.2f}{'yes' if name in DURABLE else 'no':>9}"
    )


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where checkpoints go; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saves", type=int, default=3, help="of each process")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every save there, too")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        result = json.dumps(one(given.one, given.saves, given.folder))
        print(result, flush=True)
        os._exit(0)  # nothing at the end of a run is timed, and no half-written save is waited for
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        where = disk(folder)
        print(f"{where}\nload average {' '.join(f'{each:.1f}' for each in os.getloadavg())} on {os.cpu_count()} CPUs")
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in given.only}
        for number in range(given.rounds):
            for name in list(found) if number % 2 else list(found)[::-1]:
                found[name].append(spawn(name, given.saves, folder))
                print(f"round {number + 1}: {name}", file=sys.stderr)
    everyone = [result for results in found.values() for result in results if "saves" in result]
    same = len({result["weights"] for result in everyone}) == 1
    step = statistics.median(save["step"] for result in everyone for save in result["saves"])
    print(f"parameters equal at the first save: {same}; a step without a save takes {step:.2f} s")
    print(
        f"{'':<29}{'stall, CPU s':>16}{'stall, wall s':>17}{'in all':>9}{'next 10 steps':>15}{'memory':>8}{'files':>7}{'complete':>9}"
    )
    columns = ["first", "later", "first", "later", "CPU s", "CPU", "wall", "MB", "MB", "after s", "durable"]
    print(f"{'':<29}" + "".join(f"{c:>{w}}" for c, w in zip(columns, (8, 8, 9, 8, 9, 8, 7, 8, 7, 9, 9), strict=True)))
    for name, results in found.items():
        print(row(name, results))
    if given.json:
        given.json.write_text(json.dumps({"disk": where, "load": os.getloadavg(), "found": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
