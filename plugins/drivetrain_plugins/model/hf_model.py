"""Models of `transformers`, by task, with their tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from drivetrain import ConfigError, Problem, hookimpl, option, plugin, require
from drivetrain.data import shifts_labels
from drivetrain_plugins.model._batch_checks import checks_for

if TYPE_CHECKING:
    from drivetrain import Run

AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
}
Task = Literal[
    "sequence-classification", "token-classification", "causal-lm", "masked-lm", "seq2seq-lm",
    "question-answering", "multiple-choice", "image-classification",
]  # fmt: skip


def resolve(path: str) -> str:
    """Return the folder or hub id that `path` means; "package:NAME/sub" is a folder inside an installed package."""
    if not path.startswith("package:"):
        return str(Path(path).expanduser()) if Path(path).expanduser().exists() else path
    name, _, inside = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError([Problem(f"hf-model: there is no installed package {name!r}", path, f"pip install {name}")])
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise ConfigError([Problem(f"hf-model: package {name!r} has no folder {inside!r}", path)])
    return str(folder)


def _check_vocabulary(processor: Any, folder: Path) -> None:
    """Refuse a tokenizer without its files: the library makes one that knows no word, and says nothing."""
    names = getattr(processor, "vocab_files_names", {})
    wanted = {*names.values(), "tokenizer.json", "tokenizer_config.json"}
    if names and folder.is_dir() and not any((folder / name).exists() for name in wanted):
        raise ValueError(f"the folder has no tokenizer (none of {', '.join(sorted(wanted))})")


@plugin(role="model", provides=["model", "processor"], example={"path": "{kit}/model", "labels": ["a", "b", "c"]})
class HFModel:
    """Load a transformers model for a task, with its tokenizer, from a folder, a package or the hub."""

    path: str = option(help='a folder, "package:NAME/folder" inside an installed package, or a hub id')
    task: Task = option("sequence-classification", choices=list(AUTO), help="which head the model gets")
    labels: tuple[str, ...] = option((), help="class names in the order of their ids; rows may name them")
    pretrained: bool = option(True, help="False starts from the configuration with random weights")
    arguments: dict[str, Any] = option(factory=dict, help="further keyword arguments of from_pretrained")

    @hookimpl
    def build_model(self, run: Run) -> Any:
        """Load the weights (what the checkpoint lacks is drawn from stream "model") and the tokenizer."""
        transformers = require("transformers", extra="hf", plugin="hf-model")
        path, given = resolve(self.path), dict(self.arguments)
        if self.labels:
            given["num_labels"] = len(self.labels)
            given["id2label"] = dict(enumerate(self.labels))
            given["label2id"] = {name: index for index, name in enumerate(self.labels)}
        auto = getattr(transformers, AUTO[self.task])
        try:
            if self.pretrained:
                model = auto.from_pretrained(path, **given)
            else:
                model = auto.from_config(transformers.AutoConfig.from_pretrained(path, **given))
            images = self.task == "image-classification"
            processor = transformers.AutoImageProcessor if images else transformers.AutoTokenizer
            run.processor = processor.from_pretrained(path)
            _check_vocabulary(run.processor, Path(path))
        except Exception as error:  # the libraries raise many kinds for a damaged or unfitting folder
            do = "give an existing folder that fits the task, or a hub id with the network at hand"
            raise ConfigError(
                [Problem("hf-model: the model cannot be loaded", f"{self.path}: {type(error).__name__}: {error}", do)]
            ) from error
        run.shifted_labels = shifts_labels(model)
        return model

    @hookimpl
    def batch_checks(self, run: Run) -> list[Any]:
        """Refuse ids that the embedding does not have, and labels that the head does not have."""
        return checks_for(run.model, self.task)
