"""Progress within a stage, from deep inside a pass to whoever shows it, without an argument through every call.

A pass writes `for name in tracked(names): ...`; the command line listens. The listener belongs to the context of the
caller (`contextvars`), so that two runs in one process do not hear each other; where nobody listens, nothing happens.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int], None]  # what is being worked on, how many are done, of how many

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, `listener` is told of every step that `tracked` makes."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tracked(items: Collection[T], label: Callable[[T], str] = str) -> Iterator[T]:
    """The items, each announced before it is handed out."""
    listener = _listener.get()
    for done, item in enumerate(items):
        if listener is not None:
            listener(label(item), done, len(items))
        yield item
