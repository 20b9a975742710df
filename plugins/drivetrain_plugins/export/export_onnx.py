"""An ONNX file, checked with onnxruntime."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from drivetrain import ConfigError, Problem, option, plugin, require
from drivetrain_plugins.export._examples import count_of, rows_doubled, trace
from drivetrain_plugins.export._exporting import DTYPES, AtEnd, first_lines
from drivetrain_plugins.export._paths import replace_whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from drivetrain import Run
    from drivetrain_plugins.export._examples import Traced

log = logging.getLogger("drivetrain")
LARGEST = 2**31 - 2**20  # bytes of weights: protobuf holds less than 2 GiB in one file
# How far onnxruntime may be from torch, as a share of the largest logit: it sums in another order and fuses operations.
# A float32 model of a few layers is at 1e-6; what is wrong (a missing mask, a fixed length) is at 1e-2 and more.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@plugin(role="export", effect="observes", example={"at_end": False, "check": False})
class ExportONNX(AtEnd):
    """Export an ONNX file that takes a batch's tensors by name and returns "logits", checked with onnxruntime.

    The inputs are those of the first evaluation batch (or training batch) of the run, without labels; their number of
    rows and their lengths stay free where the model leaves them free.
    """

    plugin: ClassVar[str] = "export-onnx"
    format: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    default: ClassVar[str] = "model.onnx"
    to: str | None = option(None, help="file; default: model.onnx in the run's folder")
    at_end: bool = option(True, help="write when the run has ended; else only when asked to")
    check: bool = option(True, help="convert before the first step too, so that a failure comes first")
    verify: bool = option(True, help="compare the file's logits with the model's, with onnxruntime")
    opset: int | None = option(None, ge=18, help="version of the operators; default: torch's choice")
    dtype: str | None = option(None, choices=DTYPES, help="type of weights and inputs; default: as trained")
    inputs: tuple[str, ...] = option((), help="names of the batch's tensors to take; default: all but labels")

    def refuse(self, run: Run) -> None:
        """Refuse a model that is too large for one file."""
        if not self.at_end:
            return
        for module in ("onnx", "onnxscript", *(["onnxruntime"] if self.verify else [])):
            require(module, plugin=self.plugin, extra="onnx")
        size = sum(p.numel() * self._bytes(p) for p in run.model.parameters())
        if size > LARGEST:
            do = 'give dtype = "float16", or take export-torch, export-safetensors or export-hf'
            raise ConfigError([Problem("export-onnx: an ONNX file holds less than 2 GiB", f"{size:,} bytes", do)])

    def _bytes(self, parameter: torch.Tensor) -> int:
        dtype: torch.dtype = parameter.dtype if self.dtype is None else getattr(torch, self.dtype)
        return dtype.itemsize

    def rehearse(self, run: Run) -> None:
        """Convert the untrained model."""
        if self.at_end and self.check:
            self._converted(run)

    def write(self, run: Run, path: Path) -> None:
        """Save the model to the file `path`."""
        content = self._converted(run)
        replace_whole(path, lambda fresh: fresh.write_bytes(content))

    def _converted(self, run: Run) -> bytes:
        """Return the file's content.

        Raises:
            ConfigError: it cannot be converted, or its logits differ from the model's.
        """
        for module in ("onnx", "onnxscript"):
            require(module, plugin=self.plugin, extra="onnx")
        traced = trace(run, self.plugin, dtype=self.dtype, inputs=self.inputs)
        if traced.fixed:
            log.warning("export-onnx: the file takes only as many rows as the example: %s", traced.fixed)
        try:
            with _quiet():
                made: Any = torch.onnx.export(
                    traced.program,
                    (),
                    kwargs=traced.inputs,
                    dynamo=True,
                    verbose=False,
                    input_names=list(traced.inputs),
                    output_names=["logits"],
                    opset_version=self.opset,
                )
                content: bytes = made.model_proto.SerializeToString()
        except Exception as error:  # the libraries raise many kinds
            what = "export-onnx: torch.onnx cannot convert the model"
            do = "give another `opset`, or take export-torch, export-safetensors or export-hf"
            raise ConfigError([Problem(what, f"{type(error).__name__}: {first_lines(error)}", do)]) from error
        if self.verify:
            self._verify(content, traced)
        return content

    def _verify(self, content: bytes, traced: Traced) -> None:
        """Compare onnxruntime's logits with the model's, for the example and for twice as many rows."""
        runtime = require("onnxruntime", plugin=self.plugin, extra="onnx")
        batches = [(traced.inputs, traced.outputs)]
        if count_of(traced.inputs) and not traced.fixed:
            doubled = rows_doubled(traced.inputs)
            with torch.no_grad():
                batches.append((doubled, traced.model(**doubled)))
        do = "take export-torch, give another `opset` or dtype = 'float32'; verify = false writes the file all the same"
        try:
            options = runtime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            got = [_run(session, inputs) for inputs, _ in batches]
        except Exception as error:  # the library raises kinds of its own
            what = "export-onnx: onnxruntime cannot run the exported model"
            raise ConfigError([Problem(what, f"{type(error).__name__}: {first_lines(error)}", do)]) from error
        for found, (_, wanted) in zip(got, batches, strict=True):
            limit = TOLERANCE.get(wanted.dtype, 0.0) * max(1.0, wanted.abs().max().item())
            far = (found.double() - wanted.double()).abs().max().item() if found.shape == wanted.shape else None
            if far is None or not far <= limit:
                what = "export-onnx: onnxruntime's logits are not the model's"
                received = f"{tuple(found.shape)} for {tuple(wanted.shape)}, {far} apart, allowed are {limit:.3g}"
                raise ConfigError([Problem(what, received, do)])


def _run(session: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    taken = {each.name for each in session.get_inputs()}  # an input that decides nothing is dropped
    values = {name: tensor.numpy() for name, tensor in inputs.items() if name in taken}
    return torch.from_numpy(session.run(None, values)[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch.onnx says in every conversion: torchvision is not installed, and a class it uses is old."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*", FutureWarning)
            yield
    finally:
        registration.setLevel(level)
