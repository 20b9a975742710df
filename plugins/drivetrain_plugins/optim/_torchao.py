"""torchao's AdamW with quantized state, as the loop knows optimizers: rates that are numbers, and a plain state.

The library wants the rate as a tensor, keeps its state as tensor subclasses, and wraps the update in `torch.compile`
anew for each parameter in each step. Here rates are written into tensors of its own, the state is flattened into plain
tensors, and how the update runs is decided once.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._library import library, refuse_unfit, several, silence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain import Run

# Weights from which on a CPU gains more by compiled updates than it waits for the compiler, within ten steps or so.
LARGE = 1_000_000
PARTS = ("codes", "scale", "qmap")


class QuantizedAdamW(torch.optim.Optimizer):
    """What stands before the library's class: `class_of` joins the two."""

    block_size: int
    bf16_stochastic_round: bool
    is_adamw: bool
    _new_buffer: Callable[..., Any]
    _update: Callable[..., None]
    _context: Callable[[], Any]
    _first = True
    _rates: Sequence[torch.Tensor] = ()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add as torch does: the library would make the rate a tensor."""
        torch.optim.Optimizer.add_param_group(self, param_group)

    def compiled(self, update: Callable[..., None], context: Callable[[], Any], *, compiles: bool) -> None:
        """Take the library's update, as it is or compiled; it is compiled for every shape, in the first step."""
        self._update = torch.compile(update, fullgraph=True, dynamic=False) if compiles else update
        self._context = context
        self._rates = [torch.tensor(group["lr"], dtype=torch.float32) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        if self._first:
            self._first = False
            with silence():  # torch and torchao disagree about caches of compiled code
                self._step()
        else:
            self._step()

    def _step(self) -> None:
        with self._context():
            for group, rate in zip(self.param_groups, self._rates, strict=True):
                rate.fill_(group["lr"])
                beta1, beta2 = group["betas"]
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        state["exp_avg"] = self._new_buffer(p, True)
                        state["exp_avg_sq"] = self._new_buffer(p, False)
                    state["step"] += 1
                    self._update(
                        p.detach(), p.grad, state["step"], state["exp_avg"], state["exp_avg_sq"],
                        None, rate, beta1, beta2, group["weight_decay"], group["eps"],
                        self.is_adamw, self.bf16_stochastic_round and p.dtype is torch.bfloat16,
                    )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does, each quantized tensor as a dictionary of its parts."""
        made = super().state_dict()
        states = made["state"].items()
        made["state"] = {number: {key: _parts(value) for key, value in state.items()} for number, state in states}
        return made

    def load_state_dict(self, state_dict: Any) -> None:
        """Load what `state_dict` returned; torch itself would cast the parts to the parameter's type."""
        states = state_dict["state"]
        plain = {n: {k: v for k, v in s.items() if not isinstance(v, dict)} for n, s in states.items()}
        super().load_state_dict({**state_dict, "state": plain})
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            quantized = {k: v for k, v in states.get(number, {}).items() if isinstance(v, dict)}
            for key, parts in quantized.items():
                buffer = self._new_buffer(p, parts["signed"])
                if not hasattr(buffer, "codes") or buffer.scale.shape != parts["scale"].shape:
                    raise ValueError(f"the saved {key} of parameter {number} has blocks of another size")
                for name in PARTS:
                    getattr(buffer, name).copy_(parts[name])
                self.state[p][key] = buffer


def _parts(value: Any) -> Any:
    if not hasattr(value, "codes"):
        return value
    return {"signed": value.signed, **{name: getattr(value, name) for name in PARTS}}


@cache
def class_of(base: type) -> Any:
    """Return the library's class with our steps and our state."""
    return type(f"Plain{base.__name__}", (QuantizedAdamW, base), {})


def build(plugin: Any, name: str, run: Run, groups: Any, base: str, *, sharded: bool) -> QuantizedAdamW:
    """Return the optimizer of a plugin with the options lr, betas, eps, ...

    Args:
        plugin: its instance.
        name: its name.
        run: whose optimizer it is.
        groups: the run's.
        base: the name of the library's class.
        sharded: whether parameters may be `DTensor`.

    Raises:
        ConfigError: gradients or parameters do not suit it, or it is to be compiled and there is no compiler.
    """
    optimizers = library("torchao.optim", name)
    refuse_unfit(name, run, groups, sharded=sharded)
    compiles = _compiles(
        plugin.compile, name, run.device, sum(p.numel() for group in groups for _, p in group["params"])
    )
    made: QuantizedAdamW = class_of(getattr(optimizers, base))(
        with_decay(groups, plugin.weight_decay), lr=plugin.lr, betas=several("betas", plugin.betas, 2), eps=plugin.eps,
        block_size=plugin.block_size, bf16_stochastic_round=plugin.bf16_stochastic_round,
    )  # fmt: skip
    update = importlib.import_module("torchao.optim.adam").single_param_adam
    limits = importlib.import_module("torch._dynamo.utils").disable_cache_limit if compiles else torch.no_grad
    made.compiled(update, limits, compiles=compiles)
    return made


def _compiles(asked: bool | None, name: str, device: torch.device, size: int) -> bool:
    """Tell whether updates are to be compiled: as asked, or where it pays off and can be done."""
    small = device.type == "cpu" and size < LARGE
    if asked is False or (asked is None and small):
        return False
    lacking = _lacks_compiler(device)
    if lacking and (asked or device.type != "cpu"):
        what = f"{name} is to compile its update, and torch.compile does not work here"
        raise ConfigError([Problem(what, lacking, "install it, or set compile = false")])
    return not lacking


def _lacks_compiler(device: torch.device) -> str:
    """Return what is missing for `torch.compile` on `device`, or nothing."""
    if device.type == "cpu":
        builder = importlib.import_module("torch._inductor.cpp_builder")
        try:
            builder.get_cpp_compiler()
        except Exception as error:  # noqa: BLE001 - inductor's own kinds, of many versions
            return f"no C++ compiler: {error}"
        return ""
    return "" if importlib.import_module("torch.utils._triton").has_triton() else f"no Triton for {device.type}"
