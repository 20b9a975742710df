"""What `checkpoint.py` compares: one model, one loop's work, and ways to save it; each runs in a process of its own.

`Meter` is told of every step's end and of every save, and knows nothing of who trains and who writes. It takes ten steps
without a save, then a save, then ten steps beside it, and again: whatever is left unfinished by then gets as many steps as
it needs, and the files are removed and the disk is idle before the next ten.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WARM, STEPS = 3, 10  # steps before anything is timed; steps without a save, and beside one
PATIENCE = 400  # steps that an unfinished save may take
VOCABULARY, WIDTH, ROWS, LENGTH, RATE = 65_856, 704, 8, 16, 1e-3


class Model(torch.nn.Module):
    """50.3 M parameters, most of them an embedding, so that a step costs little more than its update."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 2816), torch.nn.Linear(2816, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 16)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the mean cross-entropy of (B, L) against (B,)."""
        hidden = self.embed(input_ids).mean(1)
        logits = self.head(hidden + self.down(torch.relu(self.up(hidden))))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels)}


def data(steps: int) -> dict[str, torch.Tensor]:
    """Return the rows of so many steps, which everyone takes in their order."""
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (steps * ROWS, LENGTH), generator=draws)
    return {"input_ids": ids, "labels": torch.randint(0, 16, (steps * ROWS,), generator=draws)}


def clocks() -> tuple[float, float]:
    """Return seconds of wall time, and of CPU time of this thread: the one that trains."""
    return time.perf_counter(), time.thread_time()


def peak_memory() -> float:
    """Return the most MB that this process had resident so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def cpu_of_all() -> float:
    """Return CPU seconds of every thread of this process, and of the children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def children_of(pid: int) -> list[str]:
    """Return the processes that a process forked, from whichever thread, and did not wait for yet."""
    lists = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return [child for each in lists for child in each.split()]


class Enough(Exception):  # noqa: N818 - no error
    """Everything was measured."""


@attrs.define
class Meter:
    """Measures a run from the ends of its steps (`tick`) and its saves (`saving`)."""

    saves: int
    model: torch.nn.Module
    found: list[dict[str, float]] = attrs.field(factory=list)
    weights: str = ""  # a digest of the parameters that the first save holds
    memory_before: float = 0.0  # MB, the most until the first save
    _step: int = -WARM  # since the last save was over
    _beside: bool = False
    _before: list[tuple[float, float]] = attrs.field(factory=list)
    _after: list[tuple[float, float]] = attrs.field(factory=list)
    _cpu: list[float] = attrs.field(factory=list)  # of all, when the save began; then of each step beside it
    _mark: tuple[float, float] = (0.0, 0.0)
    _now: dict[str, float] = attrs.field(factory=dict)
    _place: Path | None = None
    _complete: Callable[[], bool] = bool

    def tick(self) -> bool:
        """Count a step; tell whether it is time to save."""
        now = clocks()
        spent = now[0] - self._mark[0], now[1] - self._mark[1]
        self._step += 1
        due = False
        if self._beside:
            self._beside_a_save(spent)
        elif self._step > 0:
            self._before.append(spent)
            due = self._step == STEPS
        if due and not self.weights:
            self.memory_before = peak_memory()
            values = b"".join(hashlib.sha256(p.detach().numpy()).digest() for p in self.model.parameters())
            self.weights = hashlib.sha256(values).hexdigest()
        self._mark = clocks()
        return due

    @contextlib.contextmanager
    def saving(self, place: Path, complete: Callable[[], bool] | None = None) -> Iterator[None]:
        """Time what the loop waits for a save that makes `place`; `complete` tells when that is whole."""
        self._place, self._complete = place, complete or place.exists
        self._now["began"], self._cpu, started = time.time(), [cpu_of_all()], clocks()
        yield
        ended = clocks()
        self._now.update(wall=ended[0] - started[0], cpu=ended[1] - started[1])
        self._beside, self._step, self._mark = True, 0, clocks()

    def _beside_a_save(self, spent: tuple[float, float]) -> None:
        if self._step <= STEPS:
            self._after.append(spent)
        self._cpu.append(spent[1])
        if self._step < STEPS or not self._complete() or children_of(os.getpid()):
            if self._step > PATIENCE:
                raise TimeoutError(f"the save was not complete after {PATIENCE} steps")
            return
        assert self._place is not None
        files = [self._place, *self._place.rglob("*")]
        written = sum(f.stat().st_size for f in files if f.is_file())
        whole = max(f.stat().st_ctime for f in files) - self._now.pop("began")
        totals = [[sum(s[i] for s in steps) for i in (0, 1)] for steps in (self._before, self._after)]
        self.found.append({
            **self._now, "memory": peak_memory() - self.memory_before, "written": written / 1e6,
            "complete": max(whole, self._now["wall"]),
            "slow_wall": totals[1][0] / totals[0][0], "slow_cpu": totals[1][1] / totals[0][1], "step": totals[0][0] / STEPS, "cpu_of_all": cpu_of_all() - sum(self._cpu),
        })  # fmt: skip
        if len(self.found) == self.saves:
            raise Enough
        shutil.rmtree(self._place) if self._place.is_dir() else self._place.unlink()
        os.sync()  # outside what is timed: the next save starts on an idle disk
        self._before, self._after, self._beside, self._step = [], [], False, -WARM


# --- by hand ---------------------------------------------------------------------------------------------------------


def by_hand(save: Any, meter: Meter, folder: Path) -> None:
    """Train with the loop that people write, and `save(model, optimizer, path)`."""
    model = meter.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    rows, number = data(PATIENCE), 0
    while True:
        at = slice(number % PATIENCE * ROWS, (number % PATIENCE + 1) * ROWS)
        model(**{name: column[at] for name, column in rows.items()})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        number += 1
        if meter.tick():
            future: list[Any] = []
            place = folder / f"save-{number}"
            with meter.saving(place, lambda future=future: all(f.done() for f in future)):
                future += filter(None, [save(model, optimizer, place)])


def tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the model's and the optimizer's tensors by name; the few numbers beside them are not worth a file here."""
    flat = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        flat |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    return flat


def torch_save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write one file with torch's own format."""
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def safetensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write one safetensors file."""
    from safetensors.torch import save_file

    save_file(tensors(model, optimizer), path)


def safetensors_sha_fsync(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write one safetensors file, digest the same bytes (in memory, which is cheaper than reading them back), and sync."""
    from safetensors.torch import save_file

    state, digest = tensors(model, optimizer), hashlib.sha256()
    save_file(state, path)
    for tensor in state.values():
        digest.update(tensor.detach().reshape(-1).numpy())
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    path.with_suffix(".sha256").write_text(digest.hexdigest())


def _for_dcp(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def dcp_save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write a folder with torch.distributed.checkpoint."""
    from torch.distributed import checkpoint

    checkpoint.save(_for_dcp(model, optimizer), checkpoint_id=path, no_dist=True)


def dcp_async_save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> Any:
    """The same in torch's background thread; return the future."""
    from torch.distributed import checkpoint

    return checkpoint.async_save(_for_dcp(model, optimizer), checkpoint_id=path, no_dist=True)


# --- frameworks ------------------------------------------------------------------------------------------------------


def ours(make: Callable[[], Any], meter: Meter, folder: Path) -> None:
    """Train with drivetrain; `make` returns the plugin that saves."""
    from drivetrain import Trainer, hookimpl
    from drivetrain_plugins import AdamW, Loader, Sequential

    class Watch:
        """Ask for the saves, and time them from outside of everything that acts on `save`."""

        @hookimpl
        def step_end(self, step: Any) -> None:
            if meter.tick():
                step.run.request_save("it is time")

        @hookimpl(wrapper=True)
        def save(self, path: Path) -> Any:
            with meter.saving(Path(path)):
                return (yield)

    plugins = [("watch", Watch()), Sequential(), Loader(batch_size=ROWS), AdamW(lr=RATE, weight_decay=0.0), make()]
    trainer = Trainer(meter.model, plugins, output=folder / "run", steps=10**6, log_every=10**6, device="cpu")
    trainer.fit(data(PATIENCE))


def checkpoint(meter: Meter, folder: Path) -> None:
    """Save with `checkpoint`."""
    from drivetrain_plugins import Checkpoint

    ours(lambda: Checkpoint(every=f"{10**9} steps", at_end=False), meter, folder)


def async_checkpoint(how: str) -> Callable[[Meter, Path], None]:
    """Return the contender that saves with `async-checkpoint`."""

    def contender(meter: Meter, folder: Path) -> None:
        from drivetrain_plugins import AsyncCheckpoint

        ours(lambda: AsyncCheckpoint(every=f"{10**9} steps", at_end=False, how=how), meter, folder)

    return contender


def transformers_trainer(meter: Meter, folder: Path) -> None:
    """Save with `transformers.Trainer`, which needs accelerate."""
    import accelerate  # noqa: F401 - said here, if it is missing
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        """Ask for the saves."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = meter.tick()

    class Timed(Trainer):
        """Time them."""

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            with meter.saving(folder / f"checkpoint-{self.state.global_step}"):
                super()._save_checkpoint(model, trial)

    logging.disable(logging.WARNING)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=10**6, per_device_train_batch_size=ROWS, learning_rate=RATE, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=0.0, optim="adamw_torch_fused", train_sampling_strategy="sequential",
        save_strategy="steps", save_steps=10**6, report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    columns = data(PATIENCE)
    rows = [{name: column[i] for name, column in columns.items()} for i in range(PATIENCE * ROWS)]
    trainer = Timed(meter.model, arguments, train_dataset=rows, callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def hand(save: Any) -> Callable[[Meter, Path], None]:
    """Return the contender that is a hand-written loop."""
    return lambda meter, folder: by_hand(save, meter, folder)


CONTENDERS: dict[str, Callable[[Meter, Path], None]] = {
    "checkpoint": checkpoint,
    "async-checkpoint, thread": async_checkpoint("thread"),
    "async-checkpoint, fork": async_checkpoint("fork"),
    "torch.save": hand(torch_save),
    "safetensors": hand(safetensors),
    "safetensors + sha256 + fsync": hand(safetensors_sha_fsync),
    "DCP save": hand(dcp_save),
    "DCP async_save": hand(dcp_async_save),
    "transformers.Trainer": transformers_trainer,
}
DURABLE = {  # whose files are on the disk, not only in the system's memory, when the save is complete
    "checkpoint", "async-checkpoint, thread", "async-checkpoint, fork", "safetensors + sha256 + fsync", "DCP save", "DCP async_save",
}  # fmt: skip


def one(name: str, saves: int, folder: Path) -> dict[str, Any]:
    """Run one contender; return what it measured, or why it does not run here."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    meter = Meter(saves, Model())
    try:
        CONTENDERS[name](meter, folder)
    except Enough:
        pass
    except ImportError as error:
        return {"skipped": str(error)}
    return {"saves": meter.found, "weights": meter.weights, "memory_before": meter.memory_before}
