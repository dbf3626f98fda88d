"""Calls a function in a process of its own, with a limit on time and memory.

The processes are forked from a server that has imported PRELOADED once, so that each starts in milliseconds and
inherits neither threads nor what an earlier call left.
"""

import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = ("lib.preload",)
MEMORY_LIMIT = 12 * 1024**3  # bytes


def isolated(function: Callable[[Any], Any], argument: object, limit_s: float) -> Any:
    """The function's result; {"reason": …} if its process dies or takes longer than `limit_s` seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    # The server has the path of the environment, not this process's. One thread: it must have none when it forks.
    here = str(Path(__file__).parents[1])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *(path for path in paths if path and path != here)])
    os.environ["OMP_NUM_THREADS"] = "1"
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(function, argument, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return {"reason": f"took longer than {limit_s:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"reason": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _call(function: Callable[[Any], Any], argument: object, sender: Connection) -> None:
    """Runs in the new process."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    sender.send(function(argument))
