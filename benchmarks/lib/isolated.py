"""Calls a function in a process of its own, with a limit on time and memory.

The processes are forked from a server that has imported the libraries once and run nothing, so that each starts in
milliseconds and inherits neither threads nor what an earlier call left.
"""

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torch.export",
    "torch.onnx",
    "torch._dynamo",
    "torch.onnx._internal.exporter._core",
)
MEMORY_LIMIT = 12 * 1024**3  # bytes


def isolated(function: Callable[[str], dict[str, Any]], argument: str, limit_s: float) -> dict[str, Any]:
    """The function's result; {"reason": …} if its process dies or takes longer than `limit_s` seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(function, argument, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return {"reason": f"took longer than {limit_s:.0f} s"}
        result: dict[str, Any] = receiver.recv()
        return result
    except EOFError:
        process.join()
        return {"reason": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _call(function: Callable[[str], dict[str, Any]], argument: str, sender: Connection) -> None:
    """Runs in the new process."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    sender.send(function(argument))
