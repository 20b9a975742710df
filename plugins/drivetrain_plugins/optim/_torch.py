"""What the plugins of torch's own optimizers share: which of torch's implementations takes the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain import Run

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
# torch's own choice. On a CPU its loop over parameters is faster where they are large: RMSprop over 10 M of them takes
# 16 ms, in its foreach form 29 ms.
FOREACH_DEVICES = ("cuda", "xpu", "mtia")
CAPTURABLE_DEVICES = ("cuda", "xpu", "hpu", "xla")


def implementation(
    name: str,
    run: Run,
    groups: list[dict[str, Any]],
    *,
    foreach: bool | None,
    fused: bool | None = False,
    fused_on: Sequence[str] = (),
    capturable: bool = False,
) -> dict[str, bool]:
    """Return torch's arguments `foreach`, and `fused` where the class has it, decided once for the run.

    Args:
        name: the plugin's.
        run: whose device it is.
        groups: those the optimizer will have.
        foreach: what the user asked for; None takes it where torch would.
        fused: the same; None takes it where device and types allow it and `foreach` was not asked for.
        fused_on: devices that have the fused kernel; none, if the class has no `fused`.
        capturable: whether it was asked for.

    Raises:
        ConfigError: what was asked for is not to be had, alone or together.
    """
    device = run.device.type
    parameters = [one[1] if isinstance(one, tuple) else one for group in groups for one in group["params"]]
    able = device in fused_on and all(p.is_floating_point() for p in parameters)
    problems = []
    if fused and foreach:
        do = f"take out one of them; {name} is fused by itself where the device has the kernel"
        problems.append(Problem(f"{name} is either fused or foreach", "fused=True, foreach=True", do))
    elif fused and not able:
        what = f"{name} has a fused kernel for floating-point parameters on {', '.join(fused_on)} only"
        types = ", ".join(sorted({str(p.dtype) for p in parameters}))
        problems.append(Problem(what, f"fused=True with {types} on {device}", "leave fused out, or set it to false"))
    if capturable and device not in CAPTURABLE_DEVICES:
        what = f"{name} can be captured in a graph on {', '.join(CAPTURABLE_DEVICES)} only"
        problems.append(Problem(what, f"capturable=True on {device}", "leave capturable out"))
    if problems:
        raise ConfigError(problems)
    chosen: dict[str, bool] = {}
    if fused_on:
        chosen["fused"] = able and not foreach if fused is None else fused
    if foreach is None:
        plain = all(type(p) in (torch.Tensor, torch.nn.Parameter) for p in parameters)
        foreach = device in FOREACH_DEVICES and plain and not chosen.get("fused", False)
    return {**chosen, "foreach": foreach}
