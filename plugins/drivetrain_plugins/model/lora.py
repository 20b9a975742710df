"""LoRA: train low-rank additions to frozen weights (Hu et al. 2021, https://arxiv.org/abs/2106.09685), by `peft`."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, Stage, Transform, hookimpl, option, plugin, require
from drivetrain.errors import nearest
from drivetrain.options import option_fields

if TYPE_CHECKING:
    from drivetrain import Run

log = logging.getLogger("drivetrain")
TASKS = {  # the end of a transformers class -> peft's word for it, by which AutoPeftModelFor... finds saved adapters
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip
HEADED = ("Classification", "QuestionAnswering", "MultipleChoice")
INITS = ("default", "gaussian", "pissa", "olora", "orthogonal")  # those without data that can be drawn again
FIELDS = {  # option -> field of LoraConfig
    "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules",
    "exclude_modules": "exclude_modules", "bias": "bias", "modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora", "use_dora": "use_dora", "init": "init_lora_weights",
    "layers_to_transform": "layers_to_transform",
}  # fmt: skip
NO_CONCERN = (
    "fan_in_fan_out is set to",  # peft notices by itself that GPT-2's weights are transposed
    ".*is_gradient_checkpointing",  # peft 0.21 asks transformers 5 in the old way
)


def _patterns(value: Any) -> Any:
    """Read a regular expression or a list of names."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"a text is a regular expression: {error}. Received: {value!r}") from error
    elif value is not None:
        value = _listed(value)
    if value in ("", ()):
        raise ValueError(f"name modules in a list, or give a regular expression. Received: {value!r}")
    return value


def _listed(value: Any) -> tuple[str, ...] | None:
    """Read a list of names."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) and part for part in value):
        raise ValueError(f"modules are a list of names. Received: {value!r}")
    return tuple(value)


@plugin(role="model", provides=["adapters"], example={"rank": 2, "alpha": 4.0})
class LoRA:
    """Freeze the model and train low-rank additions to its linear layers, with `peft`.

    A layer with weight W gets W + s B A, s = alpha / rank (alpha / sqrt(rank) with rsLoRA), where A is random and B
    is zero at first, so that the model begins as it was. Only A and B are trained, and the modules of
    `modules_to_save`: a classification model's head is one of them unless another list is given. Additions to a base in
    half precision are float32. A model that was given to `Trainer` keeps its adapters, and fitting it again goes on.
    """

    rank: int = option(8, ge=1, help="inner size of the additions")
    alpha: float = option(16.0, gt=0, lt=float("inf"), help="weight of the additions, divided by the rank")
    dropout: float = option(0.0, ge=0, lt=1, help="dropout on the inputs of the additions")
    target_modules: str | tuple[str, ...] = option(
        "all-linear", converter=_patterns, help="names of modules (or their ends), a regular expression, or all-linear"
    )
    exclude_modules: str | tuple[str, ...] | None = option(
        None, converter=_patterns, help="of these, the ones without additions: names or a regular expression"
    )
    bias: str = option("none", choices=["none", "all", "lora_only"], help="which biases of the model are trained")
    modules_to_save: tuple[str, ...] | None = option(
        None, converter=_listed, help="modules trained in full and kept with the adapters; None: a classifier's head"
    )
    use_rslora: bool = option(False, help="scale by alpha / sqrt(rank), which suits high ranks")
    use_dora: bool = option(False, help="train magnitudes of the weights apart from their directions")
    init: str = option("default", choices=INITS, help="how A and B begin; pissa and olora take a part out of W")
    layers_to_transform: tuple[int, ...] | None = option(None, help="numbers of the layers with additions; None: all")
    adapter: str | None = option(None, help="folder of saved adapters to go on from, which bring their configuration")
    arguments: dict[str, Any] = option(factory=dict, help="further fields of peft's LoraConfig")
    _made: Any = option(None, init=False)  # the model with adapters that was made last

    def __attrs_post_init__(self) -> None:
        """Refuse what is said twice."""
        if doubles := sorted(self.arguments.keys() & set(FIELDS.values())):
            ours = {field: name for name, field in FIELDS.items()}
            raise ValueError(f"use the option {ours[doubles[0]]!r}. Received: arguments with {doubles[0]!r}")
        if self.adapter is not None:
            fields = option_fields(type(self))
            changed = [name for name in FIELDS if getattr(self, name) != fields[name].default]
            if changed or self.arguments:
                given = ", ".join([*changed, *self.arguments])
                raise ValueError(f"a saved adapter brings its own configuration. Received: adapter, and {given}")

    @hookimpl
    def transforms(self, run: Run) -> list[Transform]:
        """Put adapters on the model before anything else changes it; their weights are drawn from stream "lora".

        Raises:
            ConfigError: names that match no module, fields or adapters that do not fit.
        """
        return [Transform(Stage.ADAPT, lambda model: self._adapted(run, model))]

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Say how much is trained."""
        trained, total = (sum(p.numel() for p in of) for of in (run.parameters, run.model.parameters()))
        if run.rank == 0:
            log.info("lora: %d of %d parameters are trained (%.2f %%)", trained, total, 100 * trained / total)

    # --- the parts -----------------------------------------------------------------------------------------------

    def _adapted(self, run: Run, model: torch.nn.Module) -> torch.nn.Module:
        peft = require("peft", extra="adapters", plugin="lora")
        if self._made is not None and self._made.get_base_model() is model:
            return self._made  # type: ignore[no-any-return]
        _refuse_adapters(peft, model)
        torch.manual_seed(run.seed_for("lora"))
        config = self._saved_config(peft) if self.adapter is not None else self._config(peft, model)
        try:
            with warnings.catch_warnings():
                for message in NO_CONCERN:
                    warnings.filterwarnings("ignore", message=message)
                # Not get_peft_model: its classes for tasks name the arguments of forward, and a model has others.
                made = peft.PeftModel(model, config)
        except Exception as error:  # peft raises many kinds for modules and fields that do not go together
            do = "change target_modules, or the options that are named"
            received = f"{type(error).__name__}: {error}"
            raise ConfigError([Problem("lora: peft cannot put adapters on this model", received, do)]) from error
        if self.adapter is not None:
            _load(peft, made, self.adapter)
        made.train(model.training)
        self._made = made
        return made  # type: ignore[no-any-return]

    def _config(self, peft: Any, model: torch.nn.Module) -> Any:
        known = list(peft.LoraConfig.__dataclass_fields__)
        if unknown := sorted(self.arguments.keys() - set(known)):
            do = nearest(unknown[0], known) or "see the documentation of peft.LoraConfig"
            raise ConfigError([Problem("lora: arguments has a field that LoraConfig lacks", unknown[0], do)])
        saved = _heads(model) if self.modules_to_save is None else list(self.modules_to_save)
        _check_names(model, saved, "modules_to_save", ends=str.endswith)
        if self.target_modules != "all-linear":
            _check_names(model, self.target_modules, "target_modules")
        if self.exclude_modules is not None:
            _check_names(model, self.exclude_modules, "exclude_modules")
        values = {field: getattr(self, name) for name, field in FIELDS.items()}
        values = {field: list(value) if isinstance(value, tuple) else value for field, value in values.items()}
        values |= {"init_lora_weights": True if self.init == "default" else self.init, "modules_to_save": saved or None}
        try:
            return peft.LoraConfig(
                task_type=_task(model), base_model_name_or_path=_origin(model), **{**values, **self.arguments}
            )
        except (TypeError, ValueError) as error:
            do = "take one of the options out"
            raise ConfigError([Problem("lora: peft does not take these options", str(error), do)]) from error

    def _saved_config(self, peft: Any) -> Any:
        folder = Path(str(self.adapter)).expanduser()
        if not (folder / "adapter_config.json").is_file():
            do = "give the folder that peft's save_pretrained or export-hf wrote"
            raise ConfigError([Problem("lora: the folder holds no saved adapter", str(folder), do)])
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
        except Exception as error:
            raise ConfigError([Problem("lora: the saved adapter cannot be read", f"{folder}: {error}")]) from error
        if not isinstance(config, peft.LoraConfig):
            what = "lora: the saved adapter is of another kind"
            raise ConfigError([Problem(what, f"{folder}: {config.peft_type}", "give one that is LoRA")])
        config.inference_mode = False
        return config


def _refuse_adapters(peft: Any, model: torch.nn.Module) -> None:
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    found = next((name for name, module in model.named_modules() if isinstance(module, layer)), None)
    if found is not None:
        do = "give lora a model without adapters, or train these without the plugin lora"
        raise ConfigError([Problem("lora: the model has adapters already", f"one at {found!r}", do)])


def _task(model: torch.nn.Module) -> str | None:
    """Return peft's word for what a transformers model does."""
    if not hasattr(model, "base_model_prefix"):
        return None
    return next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)


def _origin(model: torch.nn.Module) -> str | None:
    return getattr(model, "name_or_path", None) or None


def _heads(model: torch.nn.Module) -> list[str]:
    """Return what stands beside the body of a transformers model for classes, where there are parameters."""
    if not type(model).__name__.endswith(HEADED) or not hasattr(model, "base_model_prefix"):
        return []
    beside = [(n, part) for n, part in model.named_children() if n != model.base_model_prefix]
    return [name for name, part in beside if any(True for _ in part.parameters())]


def _check_names(
    model: torch.nn.Module, names: Any, option_name: str, ends: Any = lambda key, name: key.endswith("." + name)
) -> None:
    """Refuse a name or an expression that matches no module, and say which there are."""
    keys = [key for key, _ in model.named_modules() if key]
    if isinstance(names, str):
        missed = [] if any(re.fullmatch(names, key) for key in keys) else [names]
    else:
        missed = [name for name in names if not any(key == name or ends(key, name) for key in keys)]
    if not missed:
        return
    kinds: dict[str, list[str]] = {}
    for key, module in model.named_modules():
        if key and not list(module.children()) and any(True for _ in module.parameters()):
            kinds.setdefault(type(module).__name__, []).append(key.rpartition(".")[2])
    there = "; ".join(f"{kind}: {', '.join(dict.fromkeys(found))}" for kind, found in kinds.items())
    near = nearest(missed[0], [key.rpartition(".")[2] for key in keys])
    what = f"lora: {option_name} names what matches no module"
    raise ConfigError([Problem(what, ", ".join(map(repr, missed)), f"{near} There are {there}".strip())])


def _load(peft: Any, model: Any, folder: str) -> None:
    """Load saved adapters that fit exactly."""
    try:
        saved = peft.load_peft_weights(str(Path(folder).expanduser()), device="cpu")
    except Exception as error:
        raise ConfigError([Problem("lora: the saved adapter cannot be read", f"{folder}: {error}")]) from error
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = [f"{name} is missing" for name in wanted.keys() - saved.keys()]
    wrong += [f"{name} is not in the model" for name in saved.keys() - wanted.keys() if "lora_" in name]
    wrong += [
        f"{name} is {tuple(saved[name].shape)}, in the model {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    if wrong:
        received = f"{folder}: {'; '.join(sorted(wrong)[:3])} ({len(wrong)} differences)"
        do = "give an adapter that was trained on this model"
        raise ConfigError([Problem("lora: the saved adapter does not fit the model", received, do)])
    peft.set_peft_model_state_dict(model, saved)
