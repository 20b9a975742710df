"""Several optimizers that look like one to the loop: one list of groups, one state, one state dict."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Composite(torch.optim.Optimizer):
    """Take the steps of several optimizers as one.

    `param_groups` is the concatenation of the inner groups, in the order of the optimizers. They are the very same
    dicts, so a rate that is written into one of them is the rate of the inner step. `state` shows the inner states:
    what is read or written at a parameter is in the state of the optimizer that updates it. The state dict is the
    inner ones', each made and loaded by its own optimizer, with parameters numbered over all of them.

    Args:
        optimizers: each over parameters of its own; at least one.

    Raises:
        ValueError: none is given, or two of them update one parameter.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Gather the groups; nothing is copied."""
        self.optimizers = tuple(optimizers)
        super().__init__([group for inner in self.optimizers for group in inner.param_groups], {})
        self.state: Any = _States(self.optimizers)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Let each update its parameters, after `closure`, if there is one, was called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in self.optimizers:
            inner.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the inner state dicts as one, in torch's form."""
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        for first, inner in self._numbered():
            own = inner.state_dict()
            state.update({number + first: entry for number, entry in own["state"].items()})
            groups += [
                {**group, "params": [number + first for number in group["params"]]} for group in own["param_groups"]
            ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each its part of what `state_dict` returned.

        Raises:
            ValueError: the saved groups are of another number or size.
        """
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the saved parameter groups are of another number or size than the optimizer's")
        groups = iter(saved)
        for first, inner in self._numbered():
            own = [next(groups) for _ in inner.param_groups]
            numbers = {number for group in own for number in group["params"]}
            inner.load_state_dict(
                {
                    "state": {n - first: entry for n, entry in state_dict["state"].items() if n in numbers},
                    "param_groups": [{**group, "params": [n - first for n in group["params"]]} for group in own],
                }
            )
        # Loading makes new dicts; the list stays the one that the loop may hold.
        self.param_groups[:] = [group for inner in self.optimizers for group in inner.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in a group that one of the optimizers has.

        Raises:
            ValueError: none has it, so that nobody would update its parameters.
        """
        if not any(param_group is group for inner in self.optimizers for group in inner.param_groups):
            raise ValueError("add the group to one of `.optimizers` first: nobody knows which of them is to update it")
        super().add_param_group(param_group)
        self.state = _States(self.optimizers)

    def _numbered(self) -> Iterator[tuple[int, torch.optim.Optimizer]]:
        """Yield each optimizer with the number of its first parameter."""
        first = 0
        for inner in self.optimizers:
            yield first, inner
            first += sum(len(group["params"]) for group in inner.param_groups)


class _States(MutableMapping[Any, Any]):
    """What the optimizers keep, by parameter; looked up in them, as loading replaces their states."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._owner = {p: inner for inner in optimizers for group in inner.param_groups for p in group["params"]}

    def __getitem__(self, parameter: Any) -> Any:
        return self._owner[parameter].state[parameter]  # an empty one where there is none yet, as in torch

    def __setitem__(self, parameter: Any, entry: Any) -> None:
        self._owner[parameter].state[parameter] = entry

    def __delitem__(self, parameter: Any) -> None:
        del self._owner[parameter].state[parameter]

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._owner and parameter in self._owner[parameter].state

    def get(self, parameter: Any, default: Any = None) -> Any:
        """Return the entry of `parameter`, or `default`; makes none."""
        owner = self._owner.get(parameter)
        return default if owner is None else owner.state.get(parameter, default)

    def __iter__(self) -> Iterator[Any]:
        return (parameter for inner in self._optimizers for parameter in inner.state)

    def __len__(self) -> int:
        return sum(len(inner.state) for inner in self._optimizers)
