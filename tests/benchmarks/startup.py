"""What importing drivetrain costs over importing torch: `python tests/benchmarks/startup.py`.

Fresh processes run interleaved; reported is the CPU time (user and system) of each, the minimum over rounds, and what it
adds to `import torch`. Compiled bytecode is there before the first round. Not a test: it asserts no time.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

CASES = {
    "python": "pass",
    "import torch": "import torch",
    "import torch, drivetrain": "import torch, drivetrain",
    "... and from drivetrain import Trainer": "import torch; from drivetrain import Trainer",
    "... and plugins": "import torch; from drivetrain import Trainer; from drivetrain_plugins import AdamW, Linear, Loader",
    "import drivetrain, no torch": "import drivetrain",
    "drivetrain plugins, no torch": "import drivetrain.cli as c; c.main(['plugins'], standalone_mode=False)",
    "drivetrain --help, no torch": "import drivetrain.cli as c; c.main(['--help'], standalone_mode=False)",
}


def cpu_seconds(code: str) -> float:
    """Return the CPU time of one fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    best = dict.fromkeys(CASES, float("inf"))
    for _ in range(rounds + 1):  # the first one compiles bytecode and warms the file cache; a minimum forgets it
        for name, code in CASES.items():
            best[name] = min(best[name], cpu_seconds(code))
    print(f"{'':<40} {'CPU s':>7} {'over torch':>11}")
    for name, seconds in best.items():
        over = f"{seconds - best['import torch']:+.3f}" if name.startswith(("import torch,", "...")) else ""
        print(f"{name:<40} {seconds:>7.3f} {over:>11}")


if __name__ == "__main__":
    main()
