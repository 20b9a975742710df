"""Peak memory and time of a training step with chunked cross-entropy and with full logits.

Each measurement is a process of its own. Run: `python tests/benchmarks/chunked_loss.py [--vocabulary 50000] [--tokens 4096]`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time

WAYS = ("cross-entropy", "chunked 4096", "chunked 1024", "chunked 256")


def measure(way, vocabulary, tokens, steps):
    """Train a small Llama with a large vocabulary; print MiB above the model's start, and seconds a step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from drivetrain import Trainer, hookimpl
    from drivetrain_plugins import SGD, Loader
    from drivetrain_plugins.loss.chunked_cross_entropy import ChunkedCrossEntropy
    from drivetrain_plugins.loss.cross_entropy import CrossEntropy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    length = 256
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            use_cache=False,
        )
    )
    ids = torch.randint(0, vocabulary, (tokens // length, length))
    times = []

    class Clock:
        @hookimpl
        def step_end(self, step):
            times.append(time.perf_counter())

    name, _, chunk = way.partition(" ")
    loss = ChunkedCrossEntropy(chunk=int(chunk)) if chunk else CrossEntropy()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keep = {}

    class Keep:
        @hookimpl
        def gradients_ready(self, step):
            keep.setdefault("norm", step.run.hooks.grad_norm(step).item())

    trainer = Trainer(
        model, [(name, loss), Loader(batch_size=len(ids)), SGD(lr=0.1), Clock(), Keep()], steps=steps, device="cpu"
    )
    trainer.fit({"input_ids": ids, "labels": ids})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = min(b - a for a, b in itertools.pairwise(times))
    print(json.dumps({"mib": (peak - before) / 1024, "seconds": best, "norm": keep["norm"]}))


def main():
    """Print a line for each way, and how it compares with the first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--way")
    given = parser.parse_args()
    if given.way:
        measure(given.way, given.vocabulary, given.tokens, given.steps)
        return
    print(f"{given.tokens} tokens, vocabulary {given.vocabulary}, 2 layers of 128; one thread")
    print(f"{'loss':<16} {'peak MiB':>9} {'share':>6} {'s/step':>7} {'share':>6} {'gradient norm':>14}")
    first = None
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for way in WAYS:
        shared = ["--vocabulary", str(given.vocabulary), "--tokens", str(given.tokens), "--steps", str(given.steps)]
        ran = subprocess.run(
            [sys.executable, __file__, "--way", way, *shared],
            check=True, capture_output=True, text=True, env=environment,
        )  # fmt: skip
        found = json.loads(ran.stdout.splitlines()[-1])
        first = first or found
        print(
            f"{way:<16} {found['mib']:9.0f} {found['mib'] / first['mib']:6.2f} {found['seconds']:7.2f} "
            f"{found['seconds'] / first['seconds']:6.2f} {found['norm']:14.8f}"
        )


if __name__ == "__main__":
    main()
