"""Passes and runtimes of others: found by entry points, checked before they are believed, and known by where they are.

A package offers them in its pyproject.toml:

    [project.entry-points."mpcompile.passes"]
    round-to-bf16 = "their_package.passes:RoundToBF16"

    [project.entry-points."mpcompile.runtimes"]
    their-chip = "their_package.runtime:TheirChip"

A pass is a class, a frozen dataclass; a runtime is an instance, or a class that takes no arguments. Nothing is loaded
before a recipe names it or everything is listed, so that a broken package breaks only those who use it. Built-in names
are looked up first and cannot be taken.
"""

import contextlib
import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from mpcompile.errors import UsageError, first_line
from mpcompile.passes import PASSES
from mpcompile.pipeline.pass_manager import Effect
from mpcompile.runtimes import RUNTIMES, Runtime

PASS_GROUP, RUNTIME_GROUP = "mpcompile.passes", "mpcompile.runtimes"
GIVEN = "given in Python"

T = TypeVar("T")
# Classes of passes are type[Any] here: Pass is a protocol with fields, of which no class can be asked to be one.


@dataclass(frozen=True, slots=True)
class Foreign(Generic[T]):
    """A pass class or a runtime that is not built in. `origin` says for reports whose code it is."""

    value: T
    origin: str


@dataclass(frozen=True)
class Installed(Generic[T]):
    """What the entry points of a group offer, by name, and a sentence for each that cannot be used."""

    found: dict[str, Foreign[T]]
    broken: tuple[str, ...]


def installed_pass(name: str) -> Foreign[type[Any]] | None:
    """The pass that an installed package offers under a name, or None. Raises UsageError where it cannot be used."""
    point = _the_one(PASS_GROUP, name)
    return None if point is None else _pass_at(point)


def installed_runtime(name: str) -> Foreign[Runtime] | None:
    """The runtime that an installed package offers under a name, or None. Raises UsageError likewise."""
    point = _the_one(RUNTIME_GROUP, name)
    return None if point is None else _runtime_at(point)


def installed_passes() -> Installed[type[Any]]:
    """Every pass that installed packages offer; all are loaded."""
    return _installed(PASS_GROUP, PASSES, installed_pass)


def installed_runtimes() -> Installed[Runtime]:
    """Every runtime that installed packages offer; all are loaded."""
    return _installed(RUNTIME_GROUP, RUNTIMES, installed_runtime)


def given_pass(step: object) -> str | None:
    """Where the class of a pass given in Python is, or None where it is built in. Raises UsageError where it is no
    pass, or has a built-in one's name.
    """
    kind = type(step)
    if kind in PASSES.values():
        return None
    if isinstance(step, type):
        raise UsageError(f"{_place(step)} is a class; passes are given as instances, {step.__name__}()")
    if fault := pass_fault(kind):
        raise UsageError(f"{_a(step)} is no pass: {_place(kind)}: {fault}")
    if kind.name in PASSES:  # type: ignore[attr-defined]
        raise UsageError(f"{_place(kind)} has the name of the built-in pass {kind.name}; give it another")  # type: ignore[attr-defined]
    return f"{_place(kind)}, {GIVEN}"


def given_runtime(runtime: object) -> str | None:
    """The same of a runtime given in Python."""
    kind = type(runtime)
    if kind in map(type, RUNTIMES.values()):
        return None
    if isinstance(runtime, type):
        raise UsageError(f"{_place(runtime)} is a class; a runtime is given as an instance, {runtime.__name__}()")
    if fault := runtime_fault(runtime):
        raise UsageError(f"{_a(runtime)} is no runtime: {fault}")
    if runtime.name in RUNTIMES:  # type: ignore[attr-defined]
        raise UsageError(f"{_place(kind)} has the name of the built-in target {runtime.name}; give it another")  # type: ignore[attr-defined]
    configured = dataclasses.is_dataclass(runtime) and dataclasses.fields(runtime)
    return f"{_place(kind)}{f' as {runtime}' if configured else ''}, {GIVEN}"


def pass_fault(kind: object) -> str | None:
    """Why something is not the class of a pass, or None."""
    if not isinstance(kind, type):
        return f"it is {_a(kind)}; needed is a class, a frozen dataclass"
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return "it is not a frozen dataclass"
    if not isinstance(name := getattr(kind, "name", None), str) or not name:
        return "it has no name, a string"
    if not isinstance(getattr(kind, "effect", None), Effect):
        return "it has no effect, one of Effect.ANALYSIS, EXACT and LOSSY"
    requires = getattr(kind, "requires", None)
    if not isinstance(requires, tuple) or not all(isinstance(name, str) for name in requires):
        return "it has no requires, a tuple of the names of passes that must stand before it"
    if not any("__call__" in vars(base) for base in kind.__mro__):
        return "it has no __call__(model, data)"
    try:
        TypeAdapter(kind).json_schema()
    except Exception as error:  # pydantic's own, and whatever annotations of others raise
        return (
            f"its fields cannot be written into a recipe ({_first_line(error)}); numbers, text, patterns and tuples of "
            "them can"
        )
    return None


def runtime_fault(value: object) -> str | None:
    """Why something is not a runtime, or None."""
    needed = sorted(name for name in vars(Runtime) if not name.startswith("_"))
    needed += [name for name in Runtime.__annotations__ if name not in needed]
    lacking = [name for name in needed if not hasattr(value, name)]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    if not isinstance(name := getattr(value, "name", None), str) or not name:
        return "it has no name, a string"
    return None


def _pass_at(point: importlib.metadata.EntryPoint) -> Foreign[type[Any]]:
    """The pass class of an entry point. Raises UsageError."""
    kind, origin = _loaded(point), _origin(point)
    fault = pass_fault(kind)
    if fault is None and kind.name != point.name:
        fault = f"its name is {kind.name!r}, and not that of its entry point"
    if fault:
        raise UsageError(f"pass {point.name!r} of {origin} cannot be used: {fault}")
    return Foreign(kind, origin)


def _runtime_at(point: importlib.metadata.EntryPoint) -> Foreign[Runtime]:
    """The runtime of an entry point. Raises UsageError."""
    value, origin = _loaded(point), _origin(point)
    if isinstance(value, type):
        try:
            value = value()
        except Exception as error:
            raise UsageError(
                f"target {point.name!r} of {origin} cannot be made without arguments: {_first_line(error)}"
            ) from error
    fault = runtime_fault(value)
    if fault is None and value.name != point.name:
        fault = f"its name is {value.name!r}, and not that of its entry point"
    if fault:
        raise UsageError(f"target {point.name!r} of {origin} cannot be used: {fault}")
    return Foreign(value, origin)


def _the_one(group: str, name: str) -> importlib.metadata.EntryPoint | None:
    """The entry point of a name, or None. Raises UsageError where two packages offer it."""
    points = list(importlib.metadata.entry_points(group=group, name=name))
    if len({point.value for point in points}) > 1:
        offers = " and ".join(map(_origin, points))
        raise UsageError(f"{_what(group)} {name!r} is offered by {offers}; uninstall all but one")
    return points[0] if points else None


def _installed(group: str, built_in: Collection[str], one: Callable[[str], Foreign[T] | None]) -> Installed[T]:
    """Everything that a group offers, each by `one`."""
    found: dict[str, Foreign[T]] = {}
    broken = []
    points = {point.name: point for point in importlib.metadata.entry_points(group=group)}
    for name, point in sorted(points.items()):
        if name in built_in:
            broken.append(
                f"{_what(group)} {name!r} of {_origin(point)} is not used: the name is that of a built-in one"
            )
            continue
        try:
            offered = one(name)
        except UsageError as error:
            broken.append(str(error))
        else:
            found |= {name: offered} if offered else {}
    return Installed(found, tuple(broken))


def _loaded(point: importlib.metadata.EntryPoint) -> Any:
    """What an entry point names. Raises UsageError, whatever its module does when it is imported."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # results alone belong on standard output
            return point.load()
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{_what(point.group)} {point.name!r} of {_origin(point)} does not load: {_first_line(error)}"
        ) from error


def _what(group: str) -> str:
    return "pass" if group == PASS_GROUP else "target"


def _origin(point: importlib.metadata.EntryPoint) -> str:
    """Such as `their-package 1.2 (their_package.passes:RoundToBF16)`."""
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
    return f"{package} ({point.value})"


def _place(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _a(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
