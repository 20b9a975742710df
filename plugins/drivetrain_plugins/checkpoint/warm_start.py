"""The plugin `warm-start`: a new run that begins with weights of an old one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import CheckpointError, hookimpl, option, plugin
from drivetrain_plugins.checkpoint import _saved
from drivetrain_plugins.checkpoint._format import from_safetensors
from drivetrain_plugins.checkpoint._place import checkpoint_at, shelf_of

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

log = logging.getLogger("drivetrain")


@plugin(role="checkpoint", example={"path": "{kit}/weights.safetensors", "strict": False})
class WarmStart:
    """Begin with the weights of a checkpoint, and with nothing else of it: a new run, from step 0.

    The optimizer, the schedule, the order of rows and every stream are the new run's own; to go on with a run, resume
    it instead. Nothing is executed that comes from the file, and a checkpoint's every byte is verified.
    """

    path: str = option(
        help="a checkpoint, a run's folder (its newest valid one), the URL of one, or a .safetensors file"
    )
    strict: bool = option(True, help="refuse weights that are missing, left over or of another shape or type")

    @hookimpl(wrapper=True)
    def build_model(self) -> Generator[None, Any, Any]:
        """Put the weights into the model that was built.

        Raises:
            CheckpointError: there are none at `path`, they are damaged, or with `strict` they are not the model's.
        """
        model = yield
        self._load(model, self._weights())
        return model

    def _weights(self) -> Mapping[str, torch.Tensor]:
        place = Path(self.path).expanduser()
        if self.path.endswith(".safetensors"):
            try:
                return from_safetensors(bytearray(place.read_bytes()))
            except Exception as error:
                raise CheckpointError(f"warm-start: {place} cannot be read as safetensors: {error}") from error
        for shelf in (self.path.rstrip("/"), f"{self.path.rstrip('/')}/checkpoints"):  # a store's, a run's
            if found := _saved.newest(shelf_of(shelf), _tell, resume=False):
                return found.tree["model"]  # type: ignore[no-any-return]
        return _saved.read(*checkpoint_at(self.path)).tree["model"]  # type: ignore[no-any-return]

    def _load(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        own = dict(model.state_dict(keep_vars=True))
        kept = set(own)  # a buffer that is not persistent need not be there
        own.update({name: buffer for name, buffer in model.named_buffers() if name not in own})
        tied = {id(tensor): name for name, tensor in own.items() if name in weights}
        missing = sorted(name for name in kept - weights.keys() if id(own[name]) not in tied)
        extra = sorted(weights.keys() - own.keys())
        fits = {n: t for n, t in weights.items() if n in own and _about(t) == _about(own[n])}
        unlike = [
            f"{n} is {_about(weights[n])} there, {_about(own[n])} here" for n in own if n in weights and n not in fits
        ]
        lines = [f"{word}: {', '.join(names[:8])} ({len(names)})" for word, names in
                 (("missing", missing), ("left over", extra), ("unlike", unlike)) if names]  # fmt: skip
        if lines and self.strict:
            raise CheckpointError(
                f"warm-start: the weights at {self.path} are not those of this model: {'; '.join(lines)}. "
                "Take those that fit with strict = false"
            )
        if lines:
            log.warning("warm-start: %d of %d tensors taken; %s", len(fits), len(own), "; ".join(lines))
        with torch.no_grad():
            for name, tensor in fits.items():
                own[name].copy_(tensor)


def _about(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _tell(reason: str) -> None:
    log.warning("warm-start: passed over: %s", reason)
