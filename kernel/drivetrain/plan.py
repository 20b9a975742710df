"""The plan: which plugin acts where, in which order, and everything that is wrong, before anything is built."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain.dispatch import Manager
from drivetrain.errors import ConfigError, PlanError, Problem, nearest
from drivetrain.hooks import DEFAULT_CALLS, Hooks
from drivetrain.options import option_values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain.catalogue import Catalogue
    from drivetrain.state import Settings

# Facts that the kernel's default of an operation reads; another owner must say that it reads them too.
READERS = {"accumulation": "plan_step"}


@attrs.define
class Acting:
    """Who acts on one hook, in call order (wrappers outermost first)."""

    kind: str
    owner: str | None = None
    wrappers: list[str] = attrs.field(factory=list)
    listeners: list[str] = attrs.field(factory=list)
    reason: str = "list order"


@attrs.define
class Plan:
    """A composition of plugins: who acts where, what they declare, and what is wrong with it."""

    plugins: dict[str, dict[str, Any]]
    hooks: dict[str, Acting]
    facts: dict[str, Any]
    settings: dict[str, Any]
    problems: list[Problem] = attrs.field(factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, for diffing and for the run's folder."""
        return attrs.asdict(self)

    def __str__(self) -> str:
        """Draw the loop with every plugin in its place."""
        from drivetrain.explain import draw  # noqa: PLC0415 - a run does not draw its plan

        return draw(self)


def kebab(name: str) -> str:
    """Return a class name the way entry points are written."""
    return "".join(f"-{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


def name_plugins(plugins: Sequence[Any], catalogue: Catalogue) -> dict[str, Any]:
    """Give every plugin its name: instances, catalogue names and (name, instance) pairs.

    Raises:
        ConfigError: a name is unknown, or two plugins have the same one.
    """
    named: dict[str, Any] = {}
    problems: list[Problem] = []
    for item in plugins:
        try:
            if isinstance(item, str):
                name, instance = item, catalogue.entry(item).load()()
            elif isinstance(item, tuple):
                name, instance = item
            else:
                entry = catalogue.entry_of(item)
                name, instance = entry.name if entry else kebab(type(item).__name__), item
        except ConfigError as error:
            problems += error.problems
            continue
        if name in named:
            do = f'give one of them a label: ("{name}:second", {type(instance).__name__}(...))'
            problems.append(Problem(f"plugin {name!r} is listed twice", do=do))
        named[name] = instance
    if problems:
        raise PlanError(problems)
    return named


def compose(
    plugins: dict[str, Any], settings: Settings, catalogue: Catalogue, *, has_model: bool, given: Sequence[str]
) -> tuple[Plan, Manager]:
    """Register `plugins` and return the plan with all problems, and the manager (still open for the defaults)."""
    manager, problems = Manager(), []
    for plugin in plugins.values():
        if hasattr(plugin, "add_hooks") and not isinstance(plugin, type):
            plugin.add_hooks(manager)
    sound = {}
    for name, plugin in plugins.items():
        found = check_plugin(name, plugin, manager)
        problems += found
        if not found:
            sound[name] = plugin
    owners: dict[str, list[str]] = {}
    for name, plugin in sound.items():
        for hook, opts in _implementations(plugin):
            if manager.spec_of(hook).drivetrain_kind == "operation" and not opts["wrapper"]:
                owners.setdefault(hook, []).append(name)
    manager.withheld = set(owners)
    for name in reversed(sound):  # pluggy calls the last registered first
        manager.register(sound[name], name)
    hooks = {hook: _acting(manager, hook) for hook in manager.names}
    about = {name: _about(plugin, catalogue) for name, plugin in sound.items()}
    facts = {name: fact for plugin in sound.values() for name, fact in getattr(plugin, "facts", {}).items()}
    shown = {f.name: getattr(settings, f.name) for f in attrs.fields(type(settings))}
    plan = Plan(
        about, hooks, facts, {k: v if isinstance(v, (int, float, type(None))) else str(v) for k, v in shown.items()}
    )
    problems += _two_owners(owners)
    problems += _words(sound)
    problems += _unreachable(plan, sound)
    problems += _unread(plan, sound, owners, given)
    problems += _missing(owners, settings, catalogue, has_model=has_model)
    plan.problems = problems
    return plan, manager


def _implementations(plugin: object) -> list[tuple[str, dict[str, Any]]]:
    return _implemented(type(plugin))  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _implemented(cls: type) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for name in dir(cls):
        opts = getattr(inspect.getattr_static(cls, name), "drivetrain_impl", None)
        if opts is not None:
            found.append((opts["specname"] or name, opts))
    return found


def check_plugin(name: str, plugin: object, manager: Manager) -> list[Problem]:
    """Return what pluggy would accept silently, or refuse one at a time with an object id for a name."""
    if isinstance(plugin, type):
        return [Problem(f"plugin {name!r} is a class", repr(plugin), f"write {plugin.__name__}(...)")]
    cls, problems = type(plugin), []
    try:
        hash(plugin)
    except TypeError:
        problems.append(
            Problem(f"plugin {name!r} is not hashable", repr(cls), "use @plugin or @attrs.define(eq=False)")
        )
    known = manager.names
    for attribute in dir(cls):
        function = inspect.getattr_static(cls, attribute)
        opts = getattr(function, "drivetrain_impl", None)
        where = f"plugin {name!r}, {cls.__name__}.{attribute}"
        if opts is None:
            if attribute in known and callable(function) and function is not getattr(Hooks, attribute, None):
                problems.append(Problem("is named like a hook but not marked", do="add @hookimpl", where=where))
            continue
        hook = opts["specname"] or attribute
        if hook not in known:
            problems.append(Problem(f"there is no hook {hook!r}", do=nearest(hook, known), where=where))
            continue
        problems += [Problem(what, do=do, where=where) for what, do in _signature(function, hook, opts, manager)]
    return problems


def _signature(function: Callable[..., Any], hook: str, opts: Any, manager: Manager) -> list[tuple[str, str]]:
    allowed = getattr(manager.hook, hook).spec.argnames
    kind = manager.spec_of(hook).drivetrain_kind
    wrong = []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            wrong.append((f"{parameter} cannot be filled by pluggy", "use plain arguments without defaults"))
        elif parameter.name not in allowed:
            wrong.append((f"hook {hook!r} has no argument {parameter.name!r}", f"it has: {', '.join(allowed)}"))
    if opts["hookwrapper"]:
        wrong.append(("old-style hookwrapper", "use @hookimpl(wrapper=True) and return the result of yield"))
    elif opts["wrapper"] and not inspect.isgeneratorfunction(function):
        wrong.append(("a wrapper must yield once", "write `result = yield` and return it"))
    elif opts["wrapper"] and kind != "operation":
        wrong.append((f"{hook!r} is of kind {kind!r} and takes no wrappers", "wrap the operation that fires it"))
    elif not opts["wrapper"] and inspect.isgeneratorfunction(function):
        wrong.append(("yields but is no wrapper", "mark it @hookimpl(wrapper=True)"))
    return wrong


def _acting(manager: Manager, hook: str) -> Acting:
    from drivetrain.loop import Defaults  # noqa: PLC0415 - keeps torch out of what only needs the names

    impls = list(reversed(getattr(manager.hook, hook).get_hookimpls()))
    acting = Acting(manager.spec_of(hook).drivetrain_kind)
    acting.wrappers = [i.plugin_name for i in impls if i.wrapper]
    plain = [i.plugin_name for i in impls if not i.wrapper]
    if acting.kind == "operation":
        acting.owner = plain[0] if plain else "drivetrain" if hasattr(Defaults, hook) else None
    else:
        acting.listeners = plain
    if any(i.tryfirst or i.trylast for i in impls):
        acting.reason = "list order, except tryfirst/trylast"
    return acting


def _about(plugin: object, catalogue: Catalogue) -> dict[str, Any]:
    entry, cls = catalogue.entry_of(plugin), type(plugin)
    return {
        "role": getattr(cls, "role", "-"),
        "summary": (cls.__doc__ or "").partition("\n")[0],
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "distribution": entry.distribution if entry else None,
        "version": entry.version if entry else None,
        "options": option_values(plugin),
        "changed": option_values(plugin, changed=True),
    }


def _two_owners(owners: dict[str, list[str]]) -> list[Problem]:
    return [
        Problem(f"two plugins own {hook!r}", " and ".join(names), "take out all but one of them", kind="conflict")
        for hook, names in owners.items()
        if len(names) > 1
    ]


def _words(plugins: dict[str, Any]) -> list[Problem]:
    """Check requires / provides / conflicts; a plugin's own name is a word it provides."""
    provided: dict[str, list[str]] = {}
    for name, plugin in plugins.items():
        for word in {name, name.partition(":")[0], *getattr(plugin, "provides", ())}:
            provided.setdefault(word, []).append(name)
    problems = []
    for name, plugin in plugins.items():
        for word in getattr(plugin, "requires", ()):
            if word not in provided:
                what = f"plugin {name!r} requires {word!r}, which no plugin of this run provides"
                problems.append(Problem(what, do=f"add a plugin that provides {word!r}", kind="missing"))
        for word in getattr(plugin, "conflicts", ()):
            for other in provided.get(word, ()):
                if other != name:
                    what = f"plugins {name!r} and {other!r} cannot be combined"
                    problems.append(Problem(what, f"{name!r} conflicts with {word!r}", "take one out", kind="conflict"))
    return problems


def _unreachable(plan: Plan, plugins: dict[str, Any]) -> list[Problem]:
    """Find hooks that never run because an operation around them is owned by someone who does not call them."""
    reached, todo = set(), ["fit"]
    while todo:
        hook = todo.pop()
        reached.add(hook)
        owner = plan.hooks[hook].owner
        calls = DEFAULT_CALLS.get(hook, ())
        if owner not in (None, "drivetrain"):
            calls = getattr(plugins[owner], "calls", {}).get(hook, ())
        todo += [c for c in calls if c not in reached]
    problems, around = [], {inner: outer for outer, calls in DEFAULT_CALLS.items() for inner in calls}
    for hook in [h for h in around if h not in reached]:
        outer = hook
        while outer not in reached:
            outer = around[outer]
        owner, acting = plan.hooks[outer].owner, plan.hooks[hook]
        if who := [
            name
            for name in (*acting.wrappers, *acting.listeners, acting.owner)
            if name not in (None, "drivetrain", owner)
        ]:
            what = f"hook {hook!r} of {', '.join(map(repr, who))} can never run"
            received = f"{owner!r} owns {outer!r} and does not call it"
            problems.append(Problem(what, received, f"take out {owner!r} or {who[0]!r}", kind="conflict"))
    return problems


def _unread(plan: Plan, plugins: dict[str, Any], owners: dict[str, list[str]], given: Sequence[str]) -> list[Problem]:
    """Find values that nobody will read."""
    problems = []
    for fact, hook in READERS.items():
        for owner in owners.get(hook, ()):
            if fact in plan.facts and fact not in getattr(plugins[owner], "reads", ()):
                what = f"{fact}={plan.facts[fact]} would not be read"
                problems.append(
                    Problem(what, f"{owner!r} owns {hook!r}", f"take out {owner!r} or {fact!r}", kind="conflict")
                )
    if given and "build_dataset" in owners:
        what = f"the data given to fit() would not be read: {owners['build_dataset'][0]!r} brings the data"
        problems.append(Problem(what, f"splits {list(given)}", "give the data in one place", kind="conflict"))
    if any(s.startswith("evaluate") for s in given) and plan.hooks["evaluate"].owner is None:
        problems.append(
            Problem("evaluation data is given, but no plugin evaluates", do="add Evaluate()", kind="missing")
        )
    return problems


def _missing(
    owners: dict[str, list[str]], settings: Settings, catalogue: Catalogue, *, has_model: bool
) -> list[Problem]:
    problems = []
    if not has_model and "build_model" not in owners:
        do = f"pass a model to Trainer, or name one of: {', '.join(_offering(catalogue, '.model.'))}"
        problems.append(Problem("the run has no model", do=do, kind="missing"))
    if "build_optimizer" not in owners:
        problems.append(
            Problem(
                "the run has no optimizer",
                do=f"name one of: {', '.join(_offering(catalogue, '.optim.'))}",
                kind="missing",
            )
        )
    if settings.epochs is None and settings.steps is None:
        problems.append(Problem("the run has no length", do="give epochs or steps", kind="missing"))
    return problems


def _offering(catalogue: Catalogue, folder: str) -> list[str]:
    return [name for name in catalogue.names if folder in catalogue.entry(name).value]
