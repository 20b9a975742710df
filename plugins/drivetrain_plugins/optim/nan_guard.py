"""What becomes of a step whose gradients or loss are not finite."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import TrainingError, hookimpl, option, plugin

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from drivetrain import Run, Step

log = logging.getLogger("drivetrain")
SHOWN = 8  # names of an error
NEVER = 2**62
HALVES = (torch.float16, torch.bfloat16)


@plugin(role="optim", example={"policy": "skip"})
class NanGuard:
    """Look for gradients and losses that are not finite, and raise, skip the step, or roll back.

    All gradients are looked at on the device, by one norm for each of them. "raise" leaves the flag there: it is read
    at the log interval, before a checkpoint is written and when an epoch ends, and the error names the step it was in;
    on a CPU it is read at once, before the weights are touched. "skip" and "roll-back" read one number in each step.
    "roll-back" skips, and after `limit` bad steps in a row goes back to weights and optimizer state that were good at
    most `every` updates before, and on with the next data; counters, schedules and what other plugins keep stay where
    they are. Two such rows without a good step between them raise.
    """

    policy: str = option("raise", choices=("raise", "skip", "roll-back"), help="what to do about a bad step")
    limit: int = option(10, ge=1, help="bad steps in a row after which skip raises, and roll-back rolls back")
    every: int = option(100, ge=1, help="roll-back: updates between two copies of the weights in memory")
    at_once: bool | None = option(
        None, help="raise: read the flag in each step, which waits for the device; None does on a CPU"
    )
    _reads: bool = option(True, init=False)
    _names: Any = option(factory=list, init=False)
    _dtype: Any = option(None, init=False)
    _first: Any = option(None, init=False)  # int64 (), the first bad step, or NEVER
    _flags: Any = option(None, init=False)  # bool (parameters + 1,), which were bad in it; the last is the loss
    _zero: Any = option(None, init=False)
    _bad: int = option(0, init=False)  # bad steps in a row
    _due: bool = option(False, init=False)  # roll back when the step is over
    _rolled: bool = option(False, init=False)  # since the last good step
    _copy: dict[str, Any] = option(factory=dict, init=False)  # weights and optimizer state that were good
    _copied_at: int = option(0, init=False)  # updates done then

    @property
    def facts(self) -> dict[str, Any]:
        """Say that it may skip."""
        return {} if self.policy == "raise" else {"may_skip": True}

    @property
    def conflicts(self) -> tuple[str, ...]:
        """Who leaves no gradients to look at, or has begun the update when they are there."""
        return ("lomo", "adalomo", "optimizer-in-backward", *(() if self.policy == "raise" else ("lbfgs",)))

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Forget an earlier run."""
        names = {id(p): n for n, p in run.model.named_parameters()}
        self._names = [*(repr(names[id(p)]) for p in run.parameters), "the loss"]
        self._reads = self.policy != "raise" or (run.device.type == "cpu" if self.at_once is None else self.at_once)
        self._dtype = torch.float32 if any(p.dtype in HALVES for p in run.parameters) else None
        self._zero = torch.zeros((), device=run.device)
        self._first = torch.full((), NEVER, dtype=torch.int64, device=run.device)
        self._flags = torch.zeros(len(self._names), dtype=torch.bool, device=run.device)
        self._bad, self._due, self._rolled, self._copy, self._copied_at = 0, False, False, {}, 0

    # --- looking -------------------------------------------------------------------------------------------------

    @hookimpl(trylast=True)  # whoever changes gradients has done so
    def gradients_ready(self, step: Step) -> None:
        """Look at every gradient and at the loss.

        Raises:
            TrainingError: they are not finite, and the policy or `limit` says that training ends.
        """
        run = step.run
        if step.skipped is not None or step.loss is None:
            return
        sizes = self._sizes(step)
        if not self._reads:
            flags = sizes.isfinite().logical_not_()
            new = flags.any() & (self._first == NEVER)
            self._flags = torch.where(new, flags, self._flags)
            self._first = torch.where(new, step.number, self._first)
            return
        if run.world_size > 1:  # NaN and infinity survive the sum
            torch.distributed.all_reduce(sizes)
        if math.isfinite(sizes.sum().item()):
            self._bad, self._rolled = 0, False
        elif bad := self._really(step, sizes):
            self._act(step, bad)

    def _sizes(self, step: Step) -> torch.Tensor:
        """Return the norm of each gradient and the loss, (parameters + 1,)."""
        parameters = step.run.parameters
        # Of the norms, the 2-norm is the one that is vectorised everywhere; it only reads.
        norms = iter(torch._foreach_norm([p.grad for p in parameters if p.grad is not None], 2, dtype=self._dtype))  # noqa: SLF001
        found = [self._zero if p.grad is None else next(norms) for p in parameters]
        return torch.stack([*(norm.float() for norm in found), step.loss.float()])

    def _really(self, step: Step, sizes: torch.Tensor) -> list[str]:
        """Return the names of what is not finite; a norm may be infinite where its gradient is only large."""
        bad = sizes.isfinite().logical_not_().tolist()
        if step.run.world_size == 1:
            for index, parameter in enumerate(step.run.parameters):
                grad = parameter.grad
                bad[index] = bad[index] and grad is not None and not bool(grad.isfinite().all())
        return [name for name, is_bad in zip(self._names, bad, strict=True) if is_bad]

    def _act(self, step: Step, bad: list[str]) -> None:
        if self.policy == "raise":
            raise TrainingError(_told(step.number, bad))
        self._bad += 1
        step.skip("non-finite gradients")
        if self._bad < self.limit:
            return
        if self.policy == "roll-back" and self._copy and not self._rolled:
            self._due = True
            return
        what = "a roll-back has not helped" if self._rolled else f"{self._bad} steps in a row were not"
        raise TrainingError(f"{_told(step.number, bad)}; {what}")

    # --- raising later -------------------------------------------------------------------------------------------

    @hookimpl
    def log(self, run: Run) -> None:
        """Read the flag where the loss is read anyway."""
        self._read(run)

    @hookimpl(wrapper=True)
    def save(self, run: Run, path: Path) -> Generator[None, Any, Any]:  # noqa: ARG002
        """Let no bad weights be written."""
        self._read(run)
        return (yield)

    @hookimpl(wrapper=True)
    def epoch(self, run: Run) -> Generator[None, Any, Any]:
        """Leave no flag unread where a run stops between two logs."""
        result = yield
        self._read(run)
        return result

    def _read(self, run: Run) -> None:
        if self._reads:
            return
        first = own = self._first.item()
        if run.world_size > 1:
            earliest = self._first.clone()
            torch.distributed.all_reduce(earliest, torch.distributed.ReduceOp.MIN)
            first = earliest.item()
        if first != NEVER:
            flags = self._flags.tolist() if first == own else []
            raise TrainingError(_told(int(first), [n for n, is_bad in zip(self._names, flags, strict=False) if is_bad]))

    # --- rolling back --------------------------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, Any, Any]:
        """Copy the weights when it is time; they are kept if their gradients turn out to be finite."""
        run, copied = step.run, None
        applied = run.progress.applied
        if self.policy == "roll-back" and (not self._copy or applied - self._copied_at >= self.every):
            state = run.state_dict()
            copied = {part: _clones(state[part]) for part in ("model", "optimizer")}
        result = yield
        if copied is not None and step.skipped is None:
            self._copy, self._copied_at = copied, applied
        return result

    @hookimpl(tryfirst=True)
    def step_end(self, step: Step) -> None:
        """Roll back, if it was decided in this step."""
        if not self._due:
            return
        run, progress = step.run, step.run.progress
        run.load_state_dict({**run.state_dict(), **_clones(self._copy), "plugins": {}})
        run.progress = progress  # others may hold it, and nothing in it has changed
        self._due, self._rolled, self._bad = False, True, 0
        log.warning("nan-guard: step %d: back to the weights of update %d", step.number, self._copied_at)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next bad step depends on, the copy of the weights included."""
        return {"bad": self._bad, "rolled": self._rolled, "copy": self._copy, "copied_at": self._copied_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on."""
        self._bad, self._rolled = state["bad"], state["rolled"]
        self._copy, self._copied_at = _clones(state["copy"]), state["copied_at"]


def _told(step: int, bad: list[str]) -> str:
    shown = ", ".join(bad[:SHOWN]) + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
    what = "the loss is" if bad == ["the loss"] else "gradients are"
    do = "Lower the rate, clip, look at the data of this step, or let nan-guard skip such steps"
    return f"step {step}: {what} not finite. {do}. Received: {shown or 'it on another rank'}"


def _clones(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: _clones(value) for key, value in tree.items()}
    return [_clones(value) for value in tree] if isinstance(tree, (list, tuple)) else tree
