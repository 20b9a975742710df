"""Groups of parameters with rates and weight decays of their own."""

from __future__ import annotations

import logging
import math
import re
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain.errors import nearest
from drivetrain.loop import Defaults
from drivetrain_plugins.optim import _layers, _names

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Run

log = logging.getLogger("drivetrain")
# What transformers' Trainer does not decay, by name, besides everything in a torch.nn.LayerNorm.
REFERENCE = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
KEYS = ("pattern", "name", "lr", "lr_factor", "weight_decay")
RULE = "{pattern, and any of name, lr (a rate) or lr_factor (of the optimizer's), weight_decay}"


def _rule(given: Any) -> dict[str, Any]:
    """Return a rule that is in order.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(given, dict) or not isinstance(given.get("pattern"), str) or not given["pattern"]:
        raise ValueError(f"a rule is a table: {RULE}. Received: {given!r}")
    if unknown := sorted(given.keys() - set(KEYS)):
        raise ValueError(f"a rule has no key {unknown[0]!r}: {nearest(unknown[0], KEYS)}. Received: {given!r}")
    if "lr" in given and "lr_factor" in given:
        raise ValueError(f"a rule has a rate or a factor, not both. Received: {given!r}")
    if not isinstance(given.get("name", ""), str):
        raise ValueError(f"a rule's name is a text. Received: {given!r}")  # noqa: TRY004 - as all options
    for key in ("lr", "lr_factor", "weight_decay"):
        value = given.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"a rule's {key} must be a number >= 0. Received: {given!r}")
    return dict(given)


def _rules(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"rules are a list of tables: {RULE}. Received: {value!r}")  # noqa: TRY004 - as all options
    return tuple(_rule(given) for given in value)


@attrs.frozen
class _Kind:
    """What the parameters of a group have in common."""

    label: str
    name: str | None = None  # given by the user, and kept in the optimizer's group
    lr: float | None = None
    lr_factor: float | None = None
    weight_decay: float | None = None

    def options(self) -> dict[str, Any]:
        """Return them as an optimizer's group has them."""
        return {k: v for k, v in attrs.asdict(self).items() if v is not None and k != "label"}


@plugin(role="optim", example={"rules": [{"pattern": "*[nN]orm*", "lr": 0.02, "weight_decay": 0.1}]})
class ParameterGroups:
    """Give parameters rates and decays by name, layer, and role in the model; the groups are logged as a table.

    Weight decay spares biases and norms unless a rule sets it: by module ("modules", the kernel's rule), or by name as
    transformers' Trainer does ("names"), or "nothing" is spared. A parameter's rate is that of the first rule which
    matches it and has one; else `embedding_lr` or `head_lr`; else the optimizer's times a factor of `layer_decay`:
    with n layers, layer i (from 0) has decay^(n - i), embeddings have decay^(n + 1), and what is neither has 1
    (ELECTRA, Clark et al. 2020; BEiT, Bao et al. 2021). Lists of several lengths, as of an encoder and a decoder, count
    from their own top. A rule applies to what no rule before it matches. Schedules multiply each group's own rate.
    """

    spare: str = option(
        "modules", choices=("modules", "names", "nothing"), help="what is not decayed: biases and norms, found how"
    )
    rules: tuple[dict[str, Any], ...] = option((), converter=_rules, help=f"{RULE}; patterns are {_names.HELP}")
    layer_decay: float | None = option(None, gt=0, le=1, help="factor on the rate from each layer to the one below it")
    layers: tuple[str, ...] = option(
        (), converter=_names.parse, help='globs on the lists of layers, as "encoder.layer"; () finds them'
    )
    embedding_lr: float | None = option(None, gt=0, lt=float("inf"), help="rate of the embeddings")
    head_lr: float | None = option(None, gt=0, lt=float("inf"), help="rate of the head")
    embeddings: tuple[str, ...] = option((), converter=_names.parse, help="globs on what embeddings are; () finds them")
    head: tuple[str, ...] = option((), converter=_names.parse, help="globs on what the head is; () finds it")
    _groups: list[tuple[_Kind, list[torch.nn.Parameter]]] = option(factory=list, init=False)
    _rows: list[dict[str, Any]] = option(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        """Refuse lists that nothing reads."""
        if self.layers and self.layer_decay is None:
            raise ValueError(f"layers is read by layer_decay only. Received: layers={list(self.layers)}")
        if self.head and self.head_lr is None:
            raise ValueError(f"head is read by head_lr only. Received: head={list(self.head)}")
        if self.embeddings and self.embedding_lr is None and self.layer_decay is None:
            received = list(self.embeddings)
            raise ValueError(f"embeddings is read by embedding_lr and layer_decay only. Received: {received}")

    @hookimpl
    def parameter_groups(self, run: Run) -> list[dict[str, Any]]:
        """Return the groups; every parameter that is trained is in one of them.

        Raises:
            ConfigError: a pattern matches nothing, or what an option speaks of is not found in the model.
        """
        kinds = self._kinds(run)
        names = {id(p): name for name, p in run.model.named_parameters()}  # as the kernel's groups have them
        made: dict[_Kind, list[torch.nn.Parameter]] = {}
        for name, parameter in _names.named_parameters(run.model).items():
            if parameter.requires_grad:
                made.setdefault(kinds[name], []).append(parameter)
        self._groups = list(made.items())
        return [{"params": [(names[id(p)], p) for p in of], **kind.options()} for kind, of in self._groups]

    @hookimpl(wrapper=True)
    def build_optimizer(self, run: Run) -> Generator[None, Any, Any]:
        """Multiply the optimizer's rates by the groups' factors, and log the groups.

        Raises:
            ConfigError: the optimizer does not keep rates or decays of groups.
        """
        optimizer = yield
        owner: dict[int, dict[str, Any]] = {}
        factors = {}
        for group in optimizer.param_groups:
            factors[id(group)] = group.pop("lr_factor", None)
            group["lr"] = group["lr"] if factors[id(group)] is None else group["lr"] * factors[id(group)]
            owner.update({id(p): group for p in group["params"]})
        self._rows = []
        for kind, parameters in self._groups:
            groups = [owner.get(id(p)) for p in parameters]
            for group in groups:
                if group is None or not _keeps(group, kind, factors[id(group)]):
                    what = f"parameter-groups: {run.plan.hooks['build_optimizer'].owner!r} does not keep {kind.label!r}"
                    received = f"{kind.options()} became {_shown(group)}"
                    do = "take another optimizer, or leave these rates and decays out"
                    raise ConfigError([Problem(what, received, do, kind="conflict")])
            self._rows.append(
                {
                    "name": kind.label,
                    "tensors": len(parameters),
                    "parameters": sum(p.numel() for p in parameters),
                    **_shown(groups[0]),
                }
            )
        log.info("parameter groups:\n%s", self.table())
        return optimizer

    def describe(self) -> list[dict[str, Any]]:
        """Return a row for each group of the run: "name", "tensors", "parameters", "lr" and "weight_decay"."""
        return [dict(row) for row in self._rows]

    def table(self) -> str:
        """Return `describe` as text, a line for each group."""
        head = ("group", "tensors", "parameters", "rate", "decay")
        rows = [
            (r["name"], str(r["tensors"]), f"{r['parameters']:,}", _number(r["lr"]), _number(r["weight_decay"]))
            for r in self._rows
        ]
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines = (
            f"  {row[0]:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
            for row in (head, *rows)
        )
        return "\n".join(lines)

    # --- which parameter is of which kind --------------------------------------------------------------------------

    def _kinds(self, run: Run) -> dict[str, _Kind]:
        """Return the kind of every parameter by name."""
        model = run.model
        names = list(_names.named_parameters(model))
        lists = {} if self.layer_decay is None else _layers.layer_lists(model, self.layers)
        inside = {name for name in names if _layers.place(name, lists)}
        embeddings = _layers.embeddings(model, names, self.embeddings, inside)
        head = set() if self.head_lr is None else _layers.head(model, names, self.head, inside) - embeddings
        for rate, found, what in ((self.embedding_lr, embeddings, "embedding"), (self.head_lr, head, "head")):
            if rate is not None and not found:
                received = f"parameters named like {_names.near(what, names)}"
                do = f"name them in {'head' if what == 'head' else 'embeddings'}"
                raise ConfigError([Problem(f"parameter-groups: {what}_lr finds no {what} in the model", received, do)])
        ruled = self._ruled(names)
        spared = self._spared(run)
        kinds = {}
        for name in names:
            kind = self._by_place(name, lists, embeddings, head)
            if name in spared:
                kind = attrs.evolve(kind, label=f"{kind.label}, no decay", weight_decay=0.0)
            if name in ruled:
                kind = _with_rule(ruled[name], kind)
            kinds[name] = kind
        return kinds

    def _by_place(self, name: str, lists: dict[str, int], embeddings: set[str], head: set[str]) -> _Kind:
        decay, layer = self.layer_decay, _layers.place(name, lists)
        if name in head:
            return _Kind("head", lr=self.head_lr)
        if name in embeddings and self.embedding_lr is not None:
            return _Kind("embeddings", lr=self.embedding_lr)
        if decay is None:
            return _Kind("others")
        if name in embeddings:
            return _Kind("embeddings", lr_factor=decay ** (max(lists.values()) + 1))
        return _Kind("top") if layer is None else _Kind(layer[0], lr_factor=decay ** (layer[1] + 1))

    def _ruled(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Return the rule of each parameter that has one.

        Raises:
            ConfigError: a rule matches nothing, or nothing that those before it leave.
        """
        found: dict[str, dict[str, Any]] = {}
        for rule in self.rules:
            fresh = [name for name in _names.select(rule["pattern"], names, "parameter-groups") if name not in found]
            if not fresh:
                what = "parameter-groups: a rule matches only what the rules before it match"
                raise ConfigError([Problem(what, repr(rule["pattern"]), "put it before them, or take it out")])
            found.update(dict.fromkeys(fresh, rule))
        return found

    def _spared(self, run: Run) -> set[str]:
        """Return the names of the parameters that are not decayed."""
        if self.spare == "nothing":
            return set()
        names = _names.named_parameters(run.model)
        if self.spare == "modules":
            groups = Defaults(run, run.model, {}).parameter_groups(run)
            spared = {id(p) for group in groups if "weight_decay" in group for _, p in group["params"]}
        else:
            norms = [m for m in run.model.modules() if isinstance(m, torch.nn.LayerNorm)]
            spared = {id(p) for norm in norms for p in norm.parameters()}
            spared |= {id(p) for name, p in names.items() if REFERENCE.search(name.lower())}
        return {name for name, p in names.items() if id(p) in spared}


def _with_rule(rule: dict[str, Any], kind: _Kind) -> _Kind:
    """Return `kind` with what a rule says put over it."""
    decay = rule.get("weight_decay", kind.weight_decay)
    label = rule.get("name", rule["pattern"])
    if "lr" not in rule and "lr_factor" not in rule and (kind.lr is not None or kind.lr_factor is not None):
        label = f"{label} in {kind.label.removesuffix(', no decay')}"
    if "weight_decay" not in rule and decay == 0:
        label += ", no decay"
    rate, factor = (
        (rule.get("lr"), rule.get("lr_factor")) if "lr" in rule or "lr_factor" in rule else (kind.lr, kind.lr_factor)
    )
    return _Kind(label, rule.get("name"), rate, factor, decay)


def _keeps(group: dict[str, Any], kind: _Kind, factor: float | None) -> bool:
    """Tell whether an optimizer's group has what a kind asks for; that spared weights do not decay is the default's."""
    rate = kind.lr is None or float(group["lr"]) == kind.lr
    decays = not kind.weight_decay or group.get("weight_decay") == kind.weight_decay
    return rate and decays and factor == kind.lr_factor


def _shown(group: dict[str, Any] | None) -> dict[str, Any]:
    return {key: None if group is None else group.get(key) for key in ("lr", "weight_decay")}


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.4g}"
