"""What the plugins of `bitsandbytes` share: embeddings in 32 bits, paged state, and a state that can be saved."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._library import library, refuse_unfit

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run

DEVICES = ("cpu", "cuda", "xpu", "hpu")  # that the library has kernels for
PAGED_DEVICES = ("cuda", "xpu")
STATES = ("state1", "state2")


class PlainState(torch.optim.Optimizer):
    """What stands before the library's class: `class_of` joins the two."""

    is_paged: bool
    init_state: Callable[..., None]
    update_step: Callable[..., None]
    get_state_buffer: Callable[..., torch.Tensor]
    _get_state_double_buffer: Callable[..., torch.Tensor]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient, without waiting for the GPU after each.

        The library waits so that pages are where they belong; what is not paged is in order on its stream.
        """
        if self.is_paged or closure is not None:
            return super().step(closure)
        for number, group in enumerate(self.param_groups):
            for place, p in enumerate(group["params"]):
                if p.grad is not None:
                    if not self.state[p]:
                        self.init_state(group, p, number, place)
                    self.update_step(group, p, number, place)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does; the library hides its tensors from FSDP under a key of its own."""
        return torch.optim.Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: Any) -> None:
        """Load as the library does, which leaves types alone; what is paged is never whole in the GPU's memory."""
        super().load_state_dict(state_dict, move_to_device=not self.is_paged)  # type: ignore[call-arg]
        for p, state in self.state.items() if self.is_paged else ():
            for name, value in state.items():
                if name in STATES:
                    double = value.shape != p.shape  # AdEMAMix keeps two means in one tensor
                    make = self._get_state_double_buffer if double else self.get_state_buffer
                    state[name] = make(p, dtype=value.dtype).copy_(value)
                elif isinstance(value, torch.Tensor):
                    state[name] = value.to(p.device)


@cache
def class_of(base: type) -> Any:
    """Return the library's class with our state."""
    return type(f"Plain{base.__name__}", (PlainState, base), {})


def build(plugin: Any, name: str, run: Run, groups: Any, base: str, **options: Any) -> torch.optim.Optimizer:
    """Return the optimizer of a plugin with the options lr, weight_decay, bits, min_8bit_size and embedding_bits.

    Args:
        plugin: its instance; it may have `paged`.
        name: its name.
        run: whose optimizer it is.
        groups: the run's.
        base: the name of the library's class.
        options: more arguments of it.

    Raises:
        ConfigError: gradients or parameters do not suit it, or the device does not.
    """
    optimizers = library("bitsandbytes.optim", name)
    refuse_unfit(name, run, groups, sharded=False)
    device, paged = run.device.type, getattr(plugin, "paged", False)
    if device not in DEVICES:
        what, do = f"{name}: bitsandbytes has kernels for {', '.join(DEVICES)} only", "take adamw"
        raise ConfigError([Problem(what, device, do)])
    if paged and device not in PAGED_DEVICES:
        what, do = f"{name} pages its state between a GPU's memory and the host's", "leave paged out"
        raise ConfigError([Problem(what, f"paged=True on {device}", do)])
    if paged:
        options["is_paged"] = True
    made: Any = class_of(getattr(optimizers, base))(
        with_decay(groups, plugin.weight_decay), lr=plugin.lr, optim_bits=plugin.bits,
        min_8bit_size=plugin.min_8bit_size, **options,
    )  # fmt: skip
    # The library looks settings of single parameters up in an object that all optimizers of a process share, by the
    # parameter's address, and forgets none: a later run could find those of a model that is gone. So each has its own.
    made.mng = optimizers.GlobalOptimManager.__new__(optimizers.GlobalOptimManager)
    made.mng.initialize()
    if plugin.bits != plugin.embedding_bits:
        tables = [m.weight for m in run.model.modules() if isinstance(m, (torch.nn.Embedding, torch.nn.EmbeddingBag))]
        if tables:
            made.mng.override_config(tables, "optim_bits", plugin.embedding_bits)
    optimizer: torch.optim.Optimizer = made
    return optimizer
