"""Compiles in children of one process that has imported everything, kills them in the middle, and lets others end.

    python -m tests.killed_runs '{"model": …, "data": …, "recipe": …, "folder": …, "kills": 3, "surely": [], "seed": 0}'

An undisturbed run tells what moments there are. Each is a step of a stage and a while after it, so that a busy machine
shifts none of them to another step. A killed run is followed by one that goes on, which is killed in its turn a little
later; after a few, one may end. Prints what was killed where, and what ended.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

import mpcompile
from mpcompile.driver.compile import stages
from mpcompile.frontend.capture import capture
from mpcompile.pipeline.run_folder import work_folder
from mpcompile.recipe.schema import Recipe
from mpcompile.system.progress import Progress

CHAIN = 3  # kills, each of the run that went on after the one before, until one may end


@dataclass(frozen=True)
class Step:
    """Where a run is: the stage by number, and how much of it is done; and when it came there."""

    stage: int
    done: int
    seconds: float


def child(given: dict[str, Any], output: str, pipe: int) -> None:
    """One run in a process of its own, which tells each step as it begins."""
    recipe = Recipe.from_yaml(given["recipe"])

    def began(where: Progress) -> None:
        os.write(pipe, f"{where.number - 1} {where.done}\n".encode())

    tqdm.set_lock(threading.RLock())
    code = 1
    try:
        mpcompile.compile(
            given["model"], recipe, data=given["data"], output=Path(given["folder"]) / output, observe=began
        )
        code = 0
    finally:
        os._exit(code)


def run(given: dict[str, Any], output: str, kill: Step | None) -> list[Step] | None:
    """The steps of a run that ended, or None: it was killed so long after it had come to that step."""
    reading, writing = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        child(given, output, writing)
    os.close(writing)
    steps: list[Step] = []
    with os.fdopen(reading, encoding="ascii") as lines:
        for line in lines:
            stage, done = map(int, line.split())
            steps.append(Step(stage, done, time.monotonic() - started))
            if kill is not None and (stage, done) >= (kill.stage, kill.done):
                time.sleep(kill.seconds)
                os.kill(pid, signal.SIGKILL)
                break
    _, status = os.waitpid(pid, 0)
    steps.append(Step(len(steps), 0, time.monotonic() - started))
    if os.WIFSIGNALED(status):
        whole = Path(given["folder"]) / output
        return steps if whole.exists() and not work_folder(whole).exists() else None
    if os.WEXITSTATUS(status):
        raise SystemExit(f"a run of {output} failed")
    return steps


def drawn(steps: list[Step], count: int, surely: list[int], rng: np.random.Generator) -> list[Step]:
    """Moments to kill at, each a step and the seconds after it: the first ones in the stages `surely`.

    Of the rest every second one is drawn evenly over the time of the run. The others are drawn over its stages, and
    within one over its steps, since a stage that is short is no less worth a kill.
    """
    lasts = [after.seconds - step.seconds for step, after in pairwise(steps)]
    stages_seen = sorted({step.stage for step in steps[:-1]})
    found = []
    for number in range(count):
        if number >= len(surely) and number % 2:
            moment = rng.uniform() * steps[-1].seconds
            place = max((i for i, step in enumerate(steps[:-1]) if step.seconds <= moment), default=0)
        else:
            stage = surely[number] if number < len(surely) else rng.choice(stages_seen)
            place = int(rng.choice([i for i, step in enumerate(steps[:-1]) if step.stage == stage]))
        found.append(Step(steps[place].stage, steps[place].done, rng.uniform() * lasts[place]))
    return found


def main() -> None:
    """Runs it all."""
    given, began = json.loads(sys.argv[1]), time.monotonic()
    rng = np.random.default_rng(given["seed"])
    # tqdm, which exporters and hubs draw with, locks all processes of a family: a child killed with that lock takes it
    # along. So each has its own.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    loaded = mpcompile.load(mpcompile.Request(str(given["model"])))
    capture(loaded.module, loaded.source)  # imports what a run imports
    names = stages(Recipe.from_yaml(given["recipe"]))
    steps = run(given, "undisturbed", None)
    assert steps is not None
    whole = steps[-1].seconds
    moments = drawn(steps, given["kills"], [names.index(stage) for stage in given["surely"]], rng)
    killed, ended = [], []
    for first in range(0, len(moments), CHAIN):
        output, came = f"killed-{first}", None
        for kill in sorted(moments[first : first + CHAIN], key=lambda step: (step.stage, step.done, step.seconds)):
            came = came or run(given, output, kill)  # it may have ended before it could be killed
            killed.append(f"{names[kill.stage]} {kill.done} + {kill.seconds:.2f} s{', had ended' if came else ''}")
            print(f"{time.monotonic() - began:.0f} s: {killed[-1]}", file=sys.stderr)
        came = came or run(given, output, None)
        ended.append(output)
        print(f"{time.monotonic() - began:.0f} s: {output} ended", file=sys.stderr)
    print(json.dumps({"killed": killed, "ended": ended, "seconds": whole}))


if __name__ == "__main__":
    main()
