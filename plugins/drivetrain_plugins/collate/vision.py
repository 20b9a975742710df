"""Images to pixel values, by a model's image processor or by a few options."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import fsspec
import numpy as np
import torch

from drivetrain import ConfigError, DataError, DrivetrainError, hookimpl, option, plugin, require
from drivetrain_plugins.collate._padding import LABELS, Padding, column, fields, raw

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from drivetrain import Run

CHANNELS = (1, 3, 4)
RESAMPLE = ("nearest", "bilinear", "bicubic", "lanczos")


@functools.cache
def _pil(module: str) -> ModuleType:
    return require(f"PIL.{module}", extra="vision", plugin="vision")


def open_image(value: Any) -> Any:
    """Return the PIL image of what a row holds.

    Args:
        value: a PIL image; uint8 (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4; an encoded file's bytes, its path
            or URL, or {"bytes", "path"} as the datasets library has it.

    Raises:
        TypeError: it is nothing of that.
        Exception: whatever PIL raises for a damaged file.
    """
    library = _pil("Image")
    if isinstance(value, library.Image):
        return value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decoded(io.BytesIO(value))
    if isinstance(value, (str, os.PathLike)):
        with fsspec.open(os.fspath(value), "rb") as file:
            return _decoded(file)
    return library.fromarray(_pixels(value))


def _decoded(file: Any) -> Any:
    image = _pil("Image").open(file)
    image.load()  # now, while the file is open, and where an error can be told
    return _pil("ImageOps").exif_transpose(image)


def _pixels(value: Any) -> np.ndarray[Any, Any]:
    """Return uint8 (H, W) or (H, W, C)."""
    made = np.asarray(value)
    if isinstance(value, (list, tuple)) and made.dtype.kind in "iu" and made.size and made.min() >= 0:
        made = made.astype(np.uint8) if made.max() <= np.iinfo(np.uint8).max else made
    if made.ndim == 3 and made.shape[2] not in CHANNELS and made.shape[0] in CHANNELS:  # noqa: PLR2004
        made = made.transpose(1, 2, 0)
    shaped = made.ndim == 2 or (made.ndim == 3 and made.shape[2] in CHANNELS)  # noqa: PLR2004
    if not shaped or not made.size or made.dtype != np.uint8:
        raise TypeError(
            "an image is a PIL image, a file's bytes or path, or uint8 of shape (H, W), (H, W, C) or (C, H, W), "
            f"not {type(value).__name__} of {made.dtype} {made.shape}"
        )
    return np.ascontiguousarray(made[..., 0] if made.shape[2:] == (1,) else made)


@attrs.frozen
class Resized:
    """Images resized, scaled and normalized with PIL and numpy."""

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    resample: str

    def __call__(self, images: Sequence[Any]) -> torch.Tensor:
        """Return float32 (B, C, H, W) of PIL images of one mode.

        Raises:
            DataError: the images differ in size, and no size was given.
        """
        if self.size is not None:
            how = getattr(_pil("Image").Resampling, self.resample.upper())
            images = [image.resize(self.size[::-1], how) for image in images]
        if len(sizes := {image.size[::-1] for image in images}) > 1:
            raise DataError(
                "vision: the images of a batch differ in size. Give `size`, or a model with an image processor. "
                f"Received: (height, width) {sorted(sizes)[:8]}"
            )
        pixels = np.stack([np.asarray(image) for image in images])
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels  # noqa: PLR2004 - grey ones have no channels
        made: np.ndarray[Any, Any] = pixels.astype(np.float32) * np.float32(self.scale)
        made = (made - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(made.transpose(0, 3, 1, 2)))


@attrs.frozen
class Processed:
    """Images by an image processor of transformers."""

    processor: Any

    def __call__(self, images: Sequence[Any]) -> torch.Tensor:
        """Return float32 (B, C, H, W) of PIL images.

        Raises:
            DataError: the processor refuses them.
        """
        try:
            made = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
            return torch.as_tensor(made, dtype=torch.float32)
        except Exception as error:  # a processor's own code
            sizes = [image.size[::-1] for image in images][:8]
            raise DataError(
                f"vision: {type(self.processor).__name__} makes no pixel values of these images: "
                f"{type(error).__name__}: {error}. Received: (height, width) {sizes}"
            ) from error


@attrs.frozen
class VisionCollator:
    """Open, perhaps flip, and prepare a batch's images; picklable."""

    image: str
    label: str
    mode: str
    prepare: Processed | Resized
    flip: float
    stream: str | None  # set where it draws: it is then called with a generator

    numbers: ClassVar[Padding] = Padding({})

    def __call__(self, rows: Sequence[Any], generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """Return "pixel_values" float32 (B, C, H, W) and, where rows have a label, "labels" (B,) or (B, classes).

        Raises:
            DataError: a row has no image, or one that cannot be read.
        """
        names = fields(rows, plugin="vision")
        if self.image not in names:
            raise DataError(f"vision: rows need the field {self.image!r}. Received: rows with the fields {names}")
        images = [self._opened(place, value) for place, value in enumerate(raw(rows, self.image))]
        if self.flip:
            draws = torch.rand(len(images), generator=generator).tolist()
            side = _pil("Image").Transpose.FLIP_LEFT_RIGHT
            images = [i.transpose(side) if draw < self.flip else i for i, draw in zip(images, draws, strict=True)]
        batch = {"pixel_values": self.prepare(images)}
        label = next((name for name in (self.label, *LABELS) if name in names), None)
        if label is not None:
            batch.update(self.numbers({"labels": column(rows, label, plugin="vision")}, plugin="vision"))
        return batch

    def _opened(self, place: int, value: Any) -> Any:
        try:
            return open_image(value).convert(self.mode)
        except DrivetrainError:
            raise
        except Exception as error:  # decoders raise many kinds
            received = type(value).__name__ if hasattr(value, "shape") else repr(value)[:80]
            raise DataError(
                f"vision: field {self.image!r} of row {place} of the batch holds no image that can be read: "
                f"{type(error).__name__}: {error}. Received: {received}"
            ) from error


@plugin(
    role="collate",
    example={"flip": 0.5},
    rows="images",
    companions={"hf-model?": {"path": "{kit}/vit", "task": "image-classification"}},
)
class Vision:
    """Turn images into pixel values with the model's image processor, or by size, mean, std and scale."""

    processor: Any = option(None, help="an image processor, unless a model plugin brings it or options replace it")
    image: str = option("image", help="field with the image: PIL, uint8 array, an encoded file's bytes, path or URL")
    label: str = option("label", help="field with the label, if rows have one")
    mode: str = option("RGB", choices=("RGB", "L"), help="colour or grey: what images are converted to first")
    size: tuple[int, ...] = option((), ge=1, help="height and width to resize to, or one number for both")
    mean: tuple[float, ...] = option((), help="subtracted from each channel after scaling; 0 if empty")
    std: tuple[float, ...] = option((), gt=0, help="divides each channel after the mean; 1 if empty")
    scale: float | None = option(None, gt=0, help="factor on the bytes; None for 1/255")
    resample: str = option("bilinear", choices=RESAMPLE, help="how images are resized to size")
    flip: float = option(0.0, ge=0, le=1, help="probability of mirroring a training image left to right")

    @hookimpl
    def build_collator(self, run: Run, split: str) -> Callable[..., Any]:
        """Take the processor, or the options where there is none or they are given; flip in training only."""
        _pil("Image")
        flip = self.flip if split == "train" else 0.0
        stream = "vision" if flip else None
        return VisionCollator(self.image, self.label, self.mode, _preparation(self, run), flip, stream)


def _preparation(vision: Vision, run: Run) -> Processed | Resized:
    own = bool(vision.size or vision.mean or vision.std or vision.scale is not None)
    if own and vision.processor is not None:
        raise ConfigError("vision: give a processor, or size, mean, std and scale, not both")
    found = vision.processor if vision.processor is not None else _image_processor(run.processor)
    if found is not None and not own:
        return Processed(found)
    channels = len(vision.mode)
    if len(vision.size) > 2 or any(len(each) not in (0, 1, channels) for each in (vision.mean, vision.std)):  # noqa: PLR2004
        raise ConfigError(
            "vision: size takes one or two numbers; mean and std one, or one a channel. "
            f"Received: size={vision.size}, mean={vision.mean}, std={vision.std}, mode={vision.mode!r}"
        )
    size = (vision.size[0], vision.size[-1]) if vision.size else None
    scale = 1 / 255 if vision.scale is None else vision.scale
    return Resized(size, tuple(vision.mean) or (0.0,), tuple(vision.std) or (1.0,), scale, vision.resample)


def _image_processor(processor: Any) -> Any:
    """Return the part of a run's processor that takes images, or None."""
    inner = getattr(processor, "image_processor", processor)
    return inner if "pixel_values" in (getattr(inner, "model_input_names", None) or ()) else None
