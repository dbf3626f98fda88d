"""Passes and runtimes that are not built in: found by entry points or given in Python, and checked before use.

A package offers them in its pyproject.toml:

    [project.entry-points."mpcompile.passes"]
    round-to-bf16 = "their_package.passes:RoundToBF16"

    [project.entry-points."mpcompile.runtimes"]
    their-chip = "their_package.runtime:TheirChip"

The entry point of a pass is a frozen dataclass. The entry point of a runtime is an instance, or a class that takes no
arguments. A package is imported only if a recipe names its pass or runtime, or if a command lists all of them; a broken
package therefore affects only its own users. A built-in name takes precedence over an entry point of the same name.
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
from mpcompile.pipeline.pass_record import Effect
from mpcompile.runtimes import RUNTIMES, Runtime

PASS_GROUP, RUNTIME_GROUP = "mpcompile.passes", "mpcompile.runtimes"
GIVEN = "given in Python"

T = TypeVar("T")
# Pass classes have the type type[Any]: Pass is a protocol with fields, and issubclass does not accept those.


@dataclass(frozen=True, slots=True)
class Foreign(Generic[T]):
    """A pass class or a runtime that is not built in. `origin` is its package or class, for reports."""

    value: T
    origin: str


@dataclass(frozen=True)
class Installed(Generic[T]):
    """The usable entry points of a group, by name, and a sentence for each that cannot be used."""

    found: dict[str, Foreign[T]]
    broken: tuple[str, ...]


def installed_pass(name: str) -> Foreign[type[Any]] | None:
    """The pass that an installed package offers under a name, or None. Raises UsageError if it cannot be used."""
    point = _entry_point(PASS_GROUP, name)
    return None if point is None else _pass_at(point)


def installed_runtime(name: str) -> Foreign[Runtime] | None:
    """The runtime that an installed package offers under a name, or None. Raises UsageError if it cannot be used."""
    point = _entry_point(RUNTIME_GROUP, name)
    return None if point is None else _runtime_at(point)


def installed_passes() -> Installed[type[Any]]:
    """All passes that installed packages offer. This imports the packages."""
    return _installed(PASS_GROUP, PASSES, installed_pass)


def installed_runtimes() -> Installed[Runtime]:
    """All runtimes that installed packages offer. This imports the packages."""
    return _installed(RUNTIME_GROUP, RUNTIMES, installed_runtime)


def given_pass(step: object) -> str | None:
    """The origin of a pass given in Python, such as `pkg.mod.Class, given in Python`; None if it is built in.

    Raises UsageError if it is not a pass or has the name of a built-in pass.
    """
    kind = type(step)
    if kind in PASSES.values():
        return None
    if isinstance(step, type):
        raise UsageError(f"{_class_path(step)} is a class; passes are given as instances, {step.__name__}()")
    if fault := pass_fault(kind):
        raise UsageError(f"{_type_and_value(step)} is not a pass: {_class_path(kind)}: {fault}")
    if kind.name in PASSES:  # type: ignore[attr-defined]
        raise UsageError(f"{_class_path(kind)} has the name of the built-in pass {kind.name}; rename it")  # type: ignore[attr-defined]
    return f"{_class_path(kind)}, {GIVEN}"


def given_runtime(runtime: object) -> str | None:
    """The origin of a runtime given in Python, with its fields if it is a dataclass; None if it is built in.

    Raises UsageError if it is not a runtime or has the name of a built-in target.
    """
    kind = type(runtime)
    if kind in map(type, RUNTIMES.values()):
        return None
    if isinstance(runtime, type):
        raise UsageError(f"{_class_path(runtime)} is a class; a runtime is given as an instance, {runtime.__name__}()")
    if fault := runtime_fault(runtime):
        raise UsageError(f"{_type_and_value(runtime)} is not a runtime: {fault}")
    if runtime.name in RUNTIMES:  # type: ignore[attr-defined]
        raise UsageError(f"{_class_path(kind)} has the name of the built-in target {runtime.name}; rename it")  # type: ignore[attr-defined]
    configured = dataclasses.is_dataclass(runtime) and dataclasses.fields(runtime)
    return f"{_class_path(kind)}{f' as {runtime}' if configured else ''}, {GIVEN}"


def pass_fault(kind: object) -> str | None:
    """Why an object is not a pass class, as a sentence with `it` as its subject; None if it is one."""
    if not isinstance(kind, type):
        return f"it is {_type_and_value(kind)}; a pass is a frozen dataclass"
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return "it is not a frozen dataclass"
    if not isinstance(name := getattr(kind, "name", None), str) or not name:
        return "its name is not a non-empty string"
    if not isinstance(getattr(kind, "effect", None), Effect):
        return "its effect is not one of Effect.ANALYSIS, EXACT and LOSSY"
    requires = getattr(kind, "requires", None)
    if not isinstance(requires, tuple) or not all(isinstance(name, str) for name in requires):
        return "its requires is not a tuple of the names of passes that must run before it"
    if not any("__call__" in vars(base) for base in kind.__mro__):
        return "it has no __call__(model, data)"
    try:
        TypeAdapter(kind).json_schema()
    except Exception as error:  # pydantic's own errors, or any that evaluating an annotation raises
        return (
            f"its fields cannot be written into a recipe ({_first_line(error)}); use numbers, text, patterns, or "
            "tuples of these"
        )
    return None


def runtime_fault(value: object) -> str | None:
    """Why an object is not a runtime, as a sentence with `it` as its subject; None if it is one."""
    required = sorted(name for name in vars(Runtime) if not name.startswith("_"))
    required += [name for name in Runtime.__annotations__ if name not in required]
    absent = [name for name in required if not hasattr(value, name)]
    if absent:
        return f"it lacks {', '.join(absent)}"
    if not isinstance(name := getattr(value, "name", None), str) or not name:
        return "its name is not a non-empty string"
    return None


def _pass_at(point: importlib.metadata.EntryPoint) -> Foreign[type[Any]]:
    """The pass class of an entry point. Raises UsageError if it cannot be used."""
    kind, origin = _loaded(point), _origin(point)
    fault = pass_fault(kind)
    if fault is None and kind.name != point.name:
        fault = f"its name is {kind.name!r}, which differs from its entry point"
    if fault:
        raise UsageError(f"pass {point.name!r} of {origin} cannot be used: {fault}")
    return Foreign(kind, origin)


def _runtime_at(point: importlib.metadata.EntryPoint) -> Foreign[Runtime]:
    """The runtime of an entry point. Raises UsageError if it cannot be used."""
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
        fault = f"its name is {value.name!r}, which differs from its entry point"
    if fault:
        raise UsageError(f"target {point.name!r} of {origin} cannot be used: {fault}")
    return Foreign(value, origin)


def _entry_point(group: str, name: str) -> importlib.metadata.EntryPoint | None:
    """The entry point of a name, or None. Raises UsageError if two packages offer that name."""
    points = list(importlib.metadata.entry_points(group=group, name=name))
    if len({point.value for point in points}) > 1:
        offers = " and ".join(map(_origin, points))
        raise UsageError(f"{_kind(group)} {name!r} is offered by {offers}; uninstall all but one")
    return points[0] if points else None


def _installed(group: str, built_in: Collection[str], load: Callable[[str], Foreign[T] | None]) -> Installed[T]:
    """All entry points of a group, each loaded by `load`."""
    found: dict[str, Foreign[T]] = {}
    broken = []
    points = {point.name: point for point in importlib.metadata.entry_points(group=group)}
    for name, point in sorted(points.items()):
        if name in built_in:
            broken.append(
                f"{_kind(group)} {name!r} of {_origin(point)} is not used: a built-in {_kind(group)} has this name"
            )
            continue
        try:
            offered = load(name)
        except UsageError as error:
            broken.append(str(error))
        else:
            found |= {name: offered} if offered else {}
    return Installed(found, tuple(broken))


def _loaded(point: importlib.metadata.EntryPoint) -> Any:
    """The object of an entry point. Raises UsageError for any exception, or exit, while its module is imported."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results only
            return point.load()
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{_kind(point.group)} {point.name!r} of {_origin(point)} does not load: {_first_line(error)}"
        ) from error


def _kind(group: str) -> str:
    return "pass" if group == PASS_GROUP else "target"


def _origin(point: importlib.metadata.EntryPoint) -> str:
    """Package, version and object of an entry point: `their-package 1.2 (their_package.passes:RoundToBF16)`."""
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
    return f"{package} ({point.value})"


def _class_path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _type_and_value(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
