"""Finds the weights of an architecture in the content of a checkpoint.

Training scripts store weights under different keys (`state_dict`, `model_state_dict`, `ema`) and under prefixes of
wrappers (`module.`, Lightning's `model.`). Instead of a list of such names, every mapping and every prefix is searched
for all names that the architecture needs.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import LoadError, UsageError, did_you_mean
from mpcompile.frontend.plain_weights import adapter_entry, plain_weights, quantized_entry

# Usual keys of weights, in the order in which the differences of a file that fits nowhere are listed.
USUAL_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module", "net")
AVERAGED = frozenset({"ema", "swa", "avg", "averaged"})  # words in the name of averaged weights
COMPILED = "_orig_mod."  # in the names of a module that torch.compile wrapped
DEPTH = 3  # levels of mappings that are searched
# Names that torch's load_state_dict may do without: torch before 0.4.1 did not save the first one.
OPTIONAL = ("num_batches_tracked", "_extra_state")


@dataclass(frozen=True, slots=True)
class WeightSet:
    """One set of weights in a checkpoint.

    Attributes:
        name: the keys and the prefix that lead to it, joined by dots; empty for the top level.
        state: its tensors, without the prefix, with the version numbers of torch's state dicts (`_metadata`).
        unused: names of tensors beside the prefix, which belong to other parts of a training, such as a loss.
        notes: how parametrized weights were computed, as sentences.
    """

    name: str
    state: Mapping[str, Tensor]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def chosen_weights(
    content: Mapping[Any, Any],
    needed: Set[str],
    path: Path,
    key: str | None = None,
    other_names: Sequence[Set[str]] = (),
) -> tuple[WeightSet, tuple[str, ...]]:
    """The set of weights that holds all names that an architecture needs, and sentences about the choice.

    Args:
        content: the content of the file.
        needed: names in the state dict of the architecture.
        path: the file, for messages.
        key: the name of the set to take (--weights-key); None chooses. Of averaged weights and others, the averaged
            ones are taken, as timm does. Without a set that fits, the one that shares most names is returned.
        other_names: other sets of names that are as good, such as those that transformers writes into files.

    Raises LoadError if there are no tensors, if the weights are quantised, or if several sets fit and differ;
    UsageError if no set has the name `key`.
    """
    mappings = dict(_mappings(content))
    if not mappings:
        keys = ", ".join(map(str, list(content)[:5]))
        raise LoadError(f"{path} holds no tensors (its keys: {keys or 'none'})")
    for names in (needed, *other_names):
        fitting = [found for name, entries in mappings.items() for found in _fitting_sets(name, entries, names)]
        if fitting:
            break
    if key is not None:
        fitting = _named(fitting, mappings, key, needed, path)
    if not fitting:
        nearest = _nearest(mappings, needed)
        _require_no_adapter(nearest[1], path)
        if found := _with_second_prefix(*nearest, needed):
            return found, (f"{path.name}: {found.notes[0]}",)
        if entry := quantized_entry(nearest[1]):
            raise LoadError(
                f"{path} holds quantised weights ({entry}), and masks are chosen on floating-point ones; give the "
                "checkpoint that was quantised"
            )
        return _without_shared_prefix(*nearest, needed), ()
    best, notes = _best(fitting, path)
    _require_no_adapter([*best.state, *best.unused], path)
    doubles = [name for name, value in best.state.items() if value.dtype == torch.float64]
    if doubles:
        notes += (f"{path.name}: {len(doubles)} weights are float64 (the first is {doubles[0]}); converted to float32",)
    if best.unused:
        listed = ", ".join(best.unused[:3]) + (", …" if len(best.unused) > 3 else "")
        count = f"{len(best.unused)} tensors" if len(best.unused) > 1 else "1 tensor"
        verb = "are" if len(best.unused) > 1 else "is"
        notes += (f"{path.name}: {count} outside {best.name!r} {verb} not used: {listed}",)
    return best, notes + tuple(f"{path.name}: {note}" for note in best.notes)


def _require_no_adapter(names: Iterable[Any], path: Path) -> None:
    """Raises LoadError if a name among those of the weights belongs to a LoRA adapter, which would not be applied."""
    if found := adapter_entry(names):
        raise LoadError(
            f"{path} holds a LoRA adapter ({found}), which changes the weights beside it; merge it into them, such as "
            "with PEFT's model.merge_and_unload(), and save the result"
        )


def _mappings(
    content: Mapping[Any, Any], name: str = "", depth: int = DEPTH
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every mapping that holds tensors, by its keys joined by dots: usual keys first, then the top level, then others.

    States of optimizers are left out.
    """
    if {"param_groups", "state"} <= content.keys():
        return
    usual = [key for key in USUAL_KEYS if isinstance(content.get(key), Mapping)]
    own = any(isinstance(value, Tensor) for value in content.values())
    for key in usual:
        if depth:
            yield from _mappings(content[key], _joined(name, key), depth - 1)
    if own:
        yield name, content
    for key, value in content.items():
        if isinstance(value, Mapping) and isinstance(key, str) and key not in usual and depth:
            yield from _mappings(value, _joined(name, key), depth - 1)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _fitting_sets(name: str, entries: Mapping[Any, Any], needed: Set[str]) -> Iterator[WeightSet]:
    """For each prefix under which a mapping holds all needed names: the set without the prefix."""
    for plain, notes in _forms(entries):
        tensors = {str(key): value for key, value in plain.items() if isinstance(value, Tensor)}
        prefixes = _prefixes(tensors, needed)
        for prefix in prefixes:
            state = _Versioned(
                {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            )
            state._metadata = _metadata(entries, prefix)
            unused = tuple(key for key in tensors if not key.startswith(prefix))
            yield WeightSet(_joined(name, prefix.rstrip(".")), state, unused, notes)
        if prefixes:
            return


def _forms(entries: Mapping[Any, Any]) -> Iterator[tuple[Mapping[Any, Any], tuple[str, ...]]]:
    """The entries as they are, with plain weights, and without the `_orig_mod` of parts that torch.compile wrapped."""
    yield entries, ()
    yield plain_weights(entries)
    inside = {key.replace(COMPILED, "") if isinstance(key, str) else key: value for key, value in entries.items()}
    if inside.keys() != entries.keys():
        yield plain_weights(inside)


class _Versioned(dict[str, Tensor]):
    """A state dict with torch's version numbers, by which `load_state_dict` knows old formats."""

    _metadata: dict[str, Any]


def _metadata(entries: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    """The version numbers of modules below a prefix, by their names without it; empty if the file has none."""
    versions = getattr(entries, "_metadata", None)
    if not isinstance(versions, Mapping):
        return {}
    inside = {
        str(key)[len(prefix) :] if prefix else str(key): value
        for key, value in versions.items()
        if str(key).startswith(prefix.rstrip(".")) and isinstance(value, Mapping)
    }
    return {**inside, **({"": versions[prefix[:-1]]} if prefix and prefix[:-1] in versions else {})}


def _prefixes(tensors: Mapping[str, Tensor], needed: Set[str]) -> list[str]:
    """The prefixes under which all needed names exist; only the empty one if it is among them."""
    required = [key for key in needed if not key.endswith(OPTIONAL)]
    if not required:
        return [""] if not tensors or tensors.keys() <= needed else []
    longest = max(required, key=len)
    ends = [key.removesuffix(longest) for key in tensors if key.endswith(longest)]
    found = [end for end in ends if (not end or end.endswith(".")) and all(end + key in tensors for key in required)]
    return [""] if "" in found else found


def _named(
    fitting: list[WeightSet], mappings: Mapping[str, Mapping[Any, Any]], key: str, needed: Set[str], path: Path
) -> list[WeightSet]:
    """The sets called `key`, or the part of their name before a prefix. Raises UsageError if there are none."""
    exact = [found for found in fitting if found.name == key]
    below = [found for found in fitting if found.name.startswith(f"{key}.")]
    if found := exact or below:
        return found
    if key in mappings:
        return [_without_shared_prefix(key, mappings[key], needed)]
    names = list(dict.fromkeys([*(found.name for found in fitting if found.name), *filter(None, mappings)]))
    raise UsageError(
        f"{path} has no weights {key!r}{did_you_mean(key, names)}; --weights-key takes {', '.join(names[:8]) or 'none'}"
    )


def _best(fitting: list[WeightSet], path: Path) -> tuple[WeightSet, tuple[str, ...]]:
    """One of the sets that fit, with a note if there was a choice. Raises LoadError if the choice is the user's."""
    distinct = _distinct(fitting)
    if len(distinct) == 1:
        return distinct[0], ()
    shown = [found.name or "the top level" for found in distinct]
    averaged = _distinct([found for found in fitting if _is_averaged(found.name)])
    if len(averaged) != 1:
        raise LoadError(
            f"{path} holds {len(distinct)} sets of weights that fit and differ: {', '.join(shown)}; choose one with "
            f"--weights-key, such as --weights-key {distinct[0].name or distinct[1].name}"
        )
    [taken] = averaged
    other = next(found.name for found in distinct if not _equal(found.state, taken.state))
    return taken, (
        f"{path.name} holds {len(distinct)} sets of weights that fit: {', '.join(shown)}. {taken.name} was taken, the "
        f"averaged weights; --weights-key {other} takes the others",
    )


def _is_averaged(name: str) -> bool:
    """Whether a name has a word for averaged weights in it, such as `model_ema`."""
    return bool(AVERAGED & set(name.lower().replace(".", "_").split("_")))


def _distinct(sets: list[WeightSet]) -> list[WeightSet]:
    """The sets without those that hold the values of an earlier one."""
    distinct: list[WeightSet] = []
    for found in sets:
        if not any(_equal(found.state, other.state) for other in distinct):
            distinct.append(found)
    return distinct


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets hold the same values."""
    try:
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    except (RuntimeError, NotImplementedError):  # layouts and types that cannot be compared
        return False


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values; NaN is the same as NaN."""
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and one.shape == other.shape and torch.allclose(one, other, 0, 0, equal_nan=True)


def _nearest(mappings: Mapping[str, Mapping[Any, Any]], needed: Set[str]) -> tuple[str, Mapping[Any, Any]]:
    """The mapping that shares most names with the architecture, prefixes removed; the first one of equal ones."""

    def shared(item: tuple[str, Mapping[Any, Any]]) -> int:
        return len(needed & _without_shared_prefix(*item, needed).state.keys())

    return max(mappings.items(), key=shared)


def _with_second_prefix(name: str, entries: Mapping[Any, Any], needed: Set[str]) -> WeightSet | None:
    """The weights if most are under one prefix and all others under a second one, as mmpretrain has `backbone.` and
    `head.`; None if they are not, or if there are several second prefixes.
    """
    tensors = {str(key): value for key, value in entries.items() if isinstance(value, Tensor)}
    matches = Counter(prefix for key in tensors for prefix in _prefixes_of_name(key, needed) if prefix)
    required = {key for key in needed if not key.endswith(OPTIONAL)}
    for first, count in matches.most_common(1):
        rest = required - {key.removeprefix(first) for key in tensors if key.startswith(first)}
        others = [one for one in matches if one != first and all(one + key in tensors for key in rest)]
        if rest and 2 * count > len(required) and len(others) == 1:
            [second] = others
            state = _Versioned(
                {key.removeprefix(first): value for key, value in tensors.items() if key.startswith(first)}
            )
            state |= {key: tensors[second + key] for key in rest}
            state._metadata = _metadata(entries, first)
            note = f"{', '.join(sorted(rest)[:3])} taken from {second!r}, all others from {first!r}"
            return WeightSet(_joined(name, first.rstrip(".")), state, (), (note,))
    return None


PREFIXES = ("module.", "model.", COMPILED)
LONGEST_NAME = 500  # characters


def _without_shared_prefix(name: str, entries: Mapping[Any, Any], needed: Set[str]) -> WeightSet:
    """The tensors of a mapping without the prefix under which most names are `needed`, to list the differences.

    If no name is, the usual prefixes of wrappers that all names share are removed.
    """
    tensors = {str(key): value for key, value in entries.items() if isinstance(value, Tensor)}
    matches = Counter(prefix for key in tensors for prefix in _prefixes_of_name(key, needed))
    prefix = max(matches, key=lambda one: (matches[one], -len(one)), default="")
    if prefix and matches[prefix] > matches[""]:
        return WeightSet(name, {key.removeprefix(prefix): value for key, value in tensors.items()})
    while (
        tensors
        and not matches
        and (wrapper := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), ""))
    ):
        tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    return WeightSet(name, tensors)


def _prefixes_of_name(key: str, needed: Set[str]) -> Iterator[str]:
    """What stands before a needed name in a name, for each way to split it at a dot."""
    if len(key) > LONGEST_NAME:
        return
    parts = key.split(".")
    for count in range(len(parts)):
        end = ".".join(parts[count:])
        if end in needed:
            yield key.removesuffix(end)
