"""The plugin `preemption`: a signal or a file asks a run to save and stop at a step boundary."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain.errors import nearest

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType

    from drivetrain import Run, Step

log = logging.getLogger("drivetrain")
KNOWN = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR")  # they ask for something
LOOK_S = 1.0  # between two looks for the file
SAME_S = 0.5  # who sends a signal to a process and to its group, as `timeout` does, sends it twice


def _names(value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    there = [name for name in KNOWN if hasattr(signal, name)]
    for name in names:
        if name not in there:
            hint = nearest(name, there) if isinstance(name, str) else f"known: {', '.join(there)}"
            raise ValueError(f"{name!r} is no signal that a run can be asked with: {hint}")
    return tuple(dict.fromkeys(names))


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or (value and Path(value).name != value) or value == "..":
        raise ValueError(f'stop_file is the name of a file in the run\'s folder, or "" for none. Received: {value!r}')
    return value


@plugin(role="checkpoint", effect="observes")
class Preemption:
    """Save and stop at the next step boundary when a signal or a file asks for it.

    While the run is fitted, a signal of `signals` sets a flag and nothing else. When the step that is under way is
    over, the ranks agree, the run saves and stops; one that goes on from there ends as if it had never stopped. All
    ranks stop at the same step, whichever of them was sent the signal. An evaluation is not broken off: the request
    takes effect at its step's boundary, and an evaluation that is due there comes before the save. So the time to the
    save is that of a step or an evaluation and a save; let the grace period be longer (`torchrun --shutdown-timeout`).

    When the run has ended, `fit` raises SystemExit with 128 and the signal's number, on every rank, so that nothing
    that follows takes time: the process exits with 143 after SIGTERM, 130 after SIGINT, 138 after SIGUSR1. A signal
    that comes during the last save has the same code, and a run that is complete. After several signals the first
    counts, and over ranks the highest number. With `exit=False`, `fit` returns and `Result.stopped` names the signal.

    The same signal once more, half a second later or after that, leaves at once with the same code and without
    saving; the checkpoints there are stay whole. A signal of `save_signals` asks for a save, and the run goes on. A
    file `stop_file` in the run's folder, which rank 0 looks for at most once a second, stops the run as a signal does
    and is removed; `fit` returns then.

    Before and after `fit`, signals do what they did. Processes that the run forks get what they would get without it.
    """

    signals: tuple[str, ...] = option(
        ("SIGTERM", "SIGINT", "SIGUSR1"), converter=_names, help="signals after which the run saves and stops"
    )
    save_signals: tuple[str, ...] = option(
        ("SIGUSR2",), converter=_names, help="signals after which the run saves and goes on"
    )
    stop_file: str = option("stop", converter=_file_name, help='a file in the run\'s folder that stops it; "" for none')
    exit: bool = option(True, help="end the process by SystemExit after a signal, instead of returning from fit")
    _before: dict[int, Any] = option(factory=dict, init=False)  # what the signals did before
    _process: int = option(0, init=False)
    _heard: dict[int, float] = option(factory=dict, init=False)  # those that stop -> when, in the order they came
    _wanted: str = option("", init=False)  # the last one that saves
    _news: bool = option(False, init=False)  # something came that nobody has looked at
    _look_at: float = option(math.inf, init=False)  # when to look for the file
    _file: Path | None = option(None, init=False)
    _saves: bool = option(False, init=False)

    def __attrs_post_init__(self) -> None:
        """Refuse a signal that would do both."""
        if both := [name for name in self.signals if name in self.save_signals]:
            do = "SIGUSR2 saves by default: set save_signals, too" if both == ["SIGUSR2"] else "take it out of one"
            raise ValueError(f"{', '.join(both)} stands in signals and in save_signals; {do}")

    @hookimpl(wrapper=True, tryfirst=True)  # the outermost: when it ends the process, the others have finished
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Hear signals while the run lasts; end the process if one stopped it.

        Raises:
            ConfigError: it is not the main thread, where alone signals can be handled.
            SystemExit: a signal came, the run has ended, and `exit` is set.
        """
        self._begin(run)
        try:
            self._listen()
            result = yield
        finally:
            self._look_at = math.inf
            for number, handler in self._before.items():
                signal.signal(number, handler)
        number = self._first(run) if self.exit else 0  # signals are what they were: none that came is forgotten
        if number:
            raise SystemExit(128 + number)
        return result

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Pass on what was asked for."""
        if self._news or time.monotonic() >= self._look_at:
            self._ask(step.run)

    @hookimpl
    def evaluated(self, run: Run) -> None:
        """Pass it on after an evaluation too, whose boundary can still save and stop."""
        if self._news or time.monotonic() >= self._look_at:
            self._ask(run)

    # --- the parts -----------------------------------------------------------------------------------------------

    def _begin(self, run: Run) -> None:
        self._process, self._news, self._wanted = os.getpid(), False, ""
        self._heard, self._before = {}, {}
        self._saves = run.plan.hooks["save"].owner is not None
        output = run.settings.output if run.rank == 0 and self.stop_file else None
        self._file = None if output is None else output / self.stop_file
        self._look_at = math.inf if self._file is None else 0.0
        if threading.current_thread() is not threading.main_thread() and (self.signals or self.save_signals):
            what = "preemption: signals can be handled in the main thread only, and fit was called in another"
            do = "call fit in the main thread, or set signals = [] and save_signals = [] and use the stop file"
            raise ConfigError([Problem(what, f"thread {threading.current_thread().name!r}", do)])
        if not self._saves:
            log.warning("preemption: no plugin of this run saves: it will stop without saving. Add `checkpoint`")

    def _listen(self) -> None:
        for names, handler in ((self.signals, self._on_stop), (self.save_signals, self._on_save)):
            for name in names:
                number = getattr(signal, name)
                before = signal.getsignal(number)
                self._before[number] = signal.SIG_DFL if before is None else before  # None: C code has set it
                signal.signal(number, handler)

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._pass_on(number)
        elif time.monotonic() - self._heard.setdefault(number, time.monotonic()) > SAME_S:
            os._exit(128 + number)
        else:
            self._news = True

    def _on_save(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._pass_on(number)
        else:
            self._wanted, self._news = signal.Signals(number).name, True

    def _pass_on(self, number: int) -> None:
        """Do in a forked process what the signal did before: who ends its children by SIGTERM waits for their end."""
        signal.signal(number, self._before[number])
        os.kill(os.getpid(), number)

    def _ask(self, run: Run) -> None:
        self._news = False  # before looking: what comes from here on is looked at the next time
        if self._wanted:
            run.request_save(self._wanted)
            self._wanted = ""
        reason = signal.Signals(next(iter(self._heard))).name if self._heard else self._found_file()
        if reason:
            log.warning("preemption: %s: the run stops after step %d", reason, run.progress.step)
            if self._saves:  # whether or not it would be saved at the end
                run.request_save(reason)
            run.request_stop(reason)

    def _found_file(self) -> str:
        self._look_at = time.monotonic() + LOOK_S
        if self._file is None or not self._file.is_file():
            return ""
        try:
            self._file.unlink()
        except OSError as error:
            log.warning("preemption: %s cannot be removed and will stop the next run, too: %s", self._file, error)
        return f"the file {self._file}"

    def _first(self, run: Run) -> int:
        """Return the number of the signal that ends the process, the same on all ranks, or 0."""
        number = next(iter(self._heard), 0)
        if run.world_size > 1:
            highest = torch.tensor([number], device=run.device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            number = int(highest)
        return number
