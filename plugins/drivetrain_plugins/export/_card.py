"""What a model card says: where it stands, its metadata as YAML, its sections, and nothing of the machine."""

from __future__ import annotations

import json
import math
import platform
import re
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import event
from drivetrain.options import option_values
from drivetrain_plugins.export._exporting import AtEnd
from drivetrain_plugins.export._paths import target

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from drivetrain import Run

PIPELINES = {
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "seq2seq-lm": "text2text-generation",
    "question-answering": "question-answering",
    "multiple-choice": "multiple-choice",
    "image-classification": "image-classification",
}
AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
}
ROLES, AROUND = ("schedule", "precision"), ("report", "checkpoint", "export")
LOCAL_PATH = re.compile(r"(^|[\s=:\"'(\[])(/|~|[A-Za-z]:\\)|file:/")
LOCAL, HUB_ID = "(a local path)", re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


class CardHooks:
    """A hook of the role: who uploads exports tells first that they are there."""

    @event()
    def exported(self, run: Run) -> None:
        """Hear, on rank 0, that the exports of the run's end are written and will be uploaded next."""


@attrs.frozen
class Export:
    """What one exporter of the run writes when it ends."""

    format: str
    path: Path


def exports_of(run: Run) -> list[Export]:
    """Return what the run's exporters write at its end, a folder for transformers first."""
    writers = [p for p in run.plugins.values() if isinstance(p, AtEnd) and p.at_end]
    found = [Export(p.format, target(run, p.to, p.default, p.plugin)) for p in writers]
    return sorted(found, key=lambda export: export.format != "hf")


def card_folder(run: Run) -> Path:
    """Return where the run's card belongs: where its plugin says, or with the model for transformers, or its folder."""
    for name, plugin in run.plugins.items():
        if name.partition(":")[0] == "model-card" and plugin.to is not None:
            return Path(plugin.to).expanduser()
    folders = [export.path for export in exports_of(run) if export.format == "hf"]
    return folders[0] if folders else target(run, None, ".", "model-card")


# --- metadata --------------------------------------------------------------------------------------------------------


def yaml_text(value: Any, indent: int = 0) -> str:
    """Return plain values as block YAML; strings are quoted as JSON does, so none is taken for something else."""
    pad = "  " * indent
    if isinstance(value, dict) and value:
        return "\n".join(f"{pad}{key}:{_inline(item, indent + 1)}" for key, item in value.items())
    if isinstance(value, list) and value:
        return "\n".join(f"{pad}-{_inline(item, indent + 1, in_list=True)}" for item in value)
    return pad + _scalar(value)


def _inline(value: Any, indent: int, *, in_list: bool = False) -> str:
    if not isinstance(value, (dict, list)) or not value:
        return f" {_scalar(value)}"
    text = yaml_text(value, indent)
    return f" {text.lstrip()}" if in_list and isinstance(value, dict) else f"\n{text}"


def _scalar(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    number = isinstance(value, float) and "e" in text and "." not in text
    return text.replace("e", ".0e") if number else text  # YAML 1.1 takes 1e-05 for a string


def results(history: Sequence[Mapping[str, Any]], pipeline: str, name: str, datasets: Sequence[str]) -> dict[str, Any]:
    """Return the model-index: the newest metrics of every set that was evaluated."""
    newest = {row["split"]: row["metrics"] for row in history}
    found = [
        {
            "task": {"type": pipeline},
            "dataset": {"name": split, "type": datasets[0] if datasets else "custom"},
            "metrics": [
                {"type": kind, "name": kind, "value": value} for kind, value in values.items() if math.isfinite(value)
            ],
        }
        for split, values in newest.items()
    ]
    return {"name": name, "results": [one for one in found if one["metrics"]]}


# --- what a run says of itself ---------------------------------------------------------------------------------------


def public(value: Any, run: Run) -> Any:
    """Return a value without what belongs to the machine: local paths, its name, and passwords in addresses."""
    if isinstance(value, dict):
        return {key: public(item, run) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item, run) for item in value]
    if not isinstance(value, str):
        return value
    host, home = socket.gethostname(), str(Path.home())
    places = [home] if len(home) > 1 else []
    if run.settings.output is not None:
        places.append(str(run.settings.output))
    if LOCAL_PATH.search(re.sub(r"\b(?!file)\w+://", "", value)) or any(place in value for place in places):
        return LOCAL
    value = re.sub(r"://[^/@\s]+@", "://", value)
    return re.sub(rf"\b{re.escape(host)}\b", "(host)", value)


def base_model(run: Run) -> tuple[str | None, str]:
    """Return the hub id of the model that training began with, and what to call it."""
    for plugin in run.plugins.values():
        path, pretrained = getattr(plugin, "path", None), getattr(plugin, "pretrained", None)
        if getattr(type(plugin), "role", "") == "model" and isinstance(path, str) and pretrained is not None:
            if path.startswith("package:"):
                return None, f"`{path.removeprefix('package:')}` of an installed package"
            is_id = HUB_ID.fullmatch(path) is not None and not Path(path).exists()
            start = "" if pretrained else ", with random weights"
            return (path if is_id and pretrained else None), (f"`{path}`" if is_id else "a local checkpoint") + start
    return None, "the model given to the trainer"


def pipeline_of(run: Run) -> str | None:
    """Return the hub's word for the task, where a model plugin has one."""
    tasks = [getattr(p, "task", None) for p in run.plugins.values() if getattr(type(p), "role", "") == "model"]
    return next((PIPELINES[task] for task in tasks if task in PIPELINES), None)


def library_of(run: Run) -> str | None:
    """Return the library that loads the export folder."""
    folders = [export.path for export in exports_of(run) if export.format == "hf"]
    adapters = any((folder / "adapter_config.json").exists() for folder in folders)
    return ("peft" if adapters else "transformers") if folders else None


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), line("---" for _ in head), *map(line, rows)])


def number(value: Any) -> str:
    """Return a number as a reader wants it."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value:.5g}"


def data_table(run: Run) -> str:
    """Return how many rows each split has and who brings them."""
    sources = [n for n, p in run.plugins.items() if hasattr(type(p), "build_dataset")]
    rows = []
    for split, dataset in run.datasets.items():
        count = f"{len(dataset):,}" if hasattr(dataset, "__len__") else "a stream"
        rows.append((split, count, ", ".join(f"`{name}`" for name in sources) or "given to `fit`"))
    return table(["split", "rows", "plugins"], rows)


def recipe_table(run: Run) -> str:
    """Return the plugins in order with the options that differ from their defaults; secrets are masked.

    Where reports, checkpoints and exports go is no part of how the model was made.
    """
    rows = []
    for name, plugin in run.plugins.items():
        role = getattr(type(plugin), "role", "")
        changed = {} if role in AROUND else public(option_values(plugin, changed=True), run)
        shown = ", ".join(f"`{key} = {json.dumps(value, ensure_ascii=False)}`" for key, value in changed.items())
        rows.append((f"`{name}`", role, shown))
    return table(["plugin", "role", "options"], rows)


def hyperparameters(run: Run) -> dict[str, str]:
    """Return what is known of a run's numbers: nothing is guessed."""
    group, progress = run.optimizer.param_groups[0], run.progress
    made = f"{run.plan.hooks['build_optimizer'].owner} ({type(run.optimizer).__name__})"
    found: dict[str, Any] = {"optimizer": made, "learning rate": float(group["initial_lr"])}
    found |= {k.replace("_", " "): group[k] for k in ("weight_decay", "betas", "eps", "momentum") if k in group}
    of_role = {role: [n for n, p in run.plugins.items() if getattr(type(p), "role", "") == role] for role in ROLES}
    found["schedule"] = ", ".join(of_role["schedule"]) or "constant"
    sizes = [p.batch_size for p in run.plugins.values() if isinstance(getattr(p, "batch_size", None), int)]
    found |= {"rows a batch and rank": sizes[0]} if sizes else {}
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in run.model.parameters()})
    found |= {
        "accumulated batches": run.facts.get("accumulation", 1),
        "precision": " and ".join([*of_role["precision"], f"weights in {', '.join(dtypes)}"]),
        "seed": run.settings.seed,
        "optimizer steps": progress.step,
        "epochs": float(run.epochs),
        "rows seen": progress.rows,
        "target items seen": progress.items,
    }
    return {
        k: v if isinstance(v, str) else number(v) if isinstance(v, (int, float)) else str(v) for k, v in found.items()
    }


def environment(run: Run) -> dict[str, str]:
    """Return versions, device and number of ranks."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    packages = {about["distribution"] for about in run.plan.plugins.values()} - {None}
    used = [name for name in ("transformers", "peft") if name in sys.modules]
    for package in ("drivetrain", *used, *sorted(packages - {"drivetrain"})):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    kind = run.device.type
    found["device"] = torch.cuda.get_device_name(run.device) if kind == "cuda" else kind
    found["ranks"] = str(run.world_size)
    return found


def how_to_load(run: Run, pipeline: str | None) -> str:
    """Return a snippet for each format that was exported."""
    snippets = [_snippet(run, export, pipeline) for export in exports_of(run)]
    return "\n\n".join(f"```python\n{snippet}\n```" for snippet in snippets if snippet)


def _snippet(run: Run, export: Export, pipeline: str | None) -> str:
    name = export.path.name
    if export.format == "hf":
        return _from_pretrained(run, export, pipeline)
    return {
        "safetensors": "from safetensors.torch import load_model\n\n"
        f'model = ...  # a {type(run.model).__name__}\nload_model(model, "{name}")',
        "torch": f'import torch\n\nmodel = torch.export.load("{name}").module()',
        "onnx": f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{name}")',
        "gguf": f'from llama_cpp import Llama\n\nmodel = Llama("{name}")',
    }.get(export.format, "")


def _from_pretrained(run: Run, export: Export, pipeline: str | None) -> str:
    adapter = (export.path / "adapter_config.json").exists()
    auto = "AutoPeftModel" if adapter else AUTO.get(pipeline or "", type(run.model).__name__)
    lines = [f"from {'peft' if adapter else 'transformers'} import {auto}"]
    loads = [f"model = {auto}.from_pretrained(path)"]
    if run.processor is not None:
        processor = "AutoImageProcessor" if pipeline == "image-classification" else "AutoTokenizer"
        lines.append(f"from transformers import {processor}")
        loads.append(f"processor = {processor}.from_pretrained(path)")
    return "\n".join([*lines, "", 'path = "."  # this folder, or the name of the repository', *loads])
