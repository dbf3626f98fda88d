"""Empties the caches of functions that a module calls, so that a recorded run computes what an earlier run has cached.

A function of sizes under `functools.lru_cache` returns the tensor that an earlier run made for the same sizes. In the
recorded graph, that tensor would be a constant with the batch size of that run. transformers caches position
embeddings in this way.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import nn


@contextmanager
def empty_caches(module: nn.Module) -> Iterator[None]:
    """Empties the functools caches of the module's classes and of the files that define them, before and after.

    After, since their keys hold sizes that were recorded.
    """
    caches = list(cached_functions(module))
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


def cached_functions(module: nn.Module) -> Iterator["functools._lru_cache_wrapper[Any]"]:
    """Each functools cache on a method of the module's classes, or on a function in the files that define them.

    A cache inside a decorator's closure counts too. Classes of torch itself are left out.
    """
    classes = {kind for part in module.modules() for kind in type(part).__mro__}
    own = [kind for kind in classes if kind.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc")]
    files = {kind.__module__ for kind in own} & set(sys.modules)
    found: dict[int, functools._lru_cache_wrapper[Any]] = {}
    for names in (*map(vars, own), *(vars(sys.modules[file]) for file in files)):
        for value in list(names.values()):
            found.update((id(cache), cache) for cache in _caches_in(value))
    yield from found.values()


def _caches_in(value: object) -> Iterator["functools._lru_cache_wrapper[Any]"]:
    """The cache that a value of a class or file is, wraps or closes over."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    candidates = [value]
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                candidates.append(cell.cell_contents)
            except ValueError:  # not assigned yet
                continue
    for candidate in candidates:
        if isinstance(candidate, functools._lru_cache_wrapper):
            yield candidate
