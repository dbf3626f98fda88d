"""Checkpoints of finished passes in a folder, from which a stopped run resumes.

A checkpoint is a safetensors file. It holds the tensors of the model that the pass changed and, as JSON, the rest of
the pass's result: the layers' plans, certificate, epochs and the manager's record. Each checkpoint builds on the one
before it, and the first on the captured model, which every run captures identically. A checkpoint lists hashes of what
its result depends on (versions, model, images, the passes up to it) and is used only if none of them has changed. The
hash of the model that it restores must then equal the recorded one.

A pass that changes the graph itself (nodes, modules, tied weights) cannot be restored from tensors. It is run again on
resume, and the checkpoints after it are used only if it gives the same model again.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mpcompile.errors import PassError, UsageError
from mpcompile.ir.model import Model
from mpcompile.ir.structure import tensors_of
from mpcompile.pipeline.checkpoint_file import KEY, Entry, State, link, read_entry, rest_of, restored
from mpcompile.pipeline.fingerprint import changes
from mpcompile.pipeline.pass_manager import Pass
from mpcompile.pipeline.pass_record import PassRecord
from mpcompile.pipeline.run_folder import note_rewound, was_rewound
from mpcompile.system.safetensors_io import tensor_bytes
from mpcompile.system.tensor_hashing import sha256_of

log = logging.getLogger(__name__)


RUNS = "run-*"  # folders of partial results, see mpcompile/pipeline/partial_results.py


class Checkpoints:
    """The checkpoints of one run, which the pass manager loads and saves (`CheckpointStore` there).

    `facts` are, for each pass, hashes of what its result depends on. No checkpoint is written that would leave less
    than `reserve_bytes` of the disk free.
    """

    def __init__(
        self,
        folder: Path,
        passes: Sequence[Pass],
        facts: Sequence[Mapping[str, str]],
        reserve_bytes: int = 0,
    ) -> None:
        self._folder, self._passes, self._facts = folder, passes, facts
        self._reserve_bytes = reserve_bytes
        self._entries: list[Entry] = []  # of an earlier run, to load
        self._lasting: set[Path] = set()  # partial results of passes that are run again on each resume
        self._state: State | None = None  # after the last pass; None once checkpoints are no longer saved

    def resume(self, start: str | None = None, finished: Path | None = None) -> None:
        """Finds the checkpoints to resume from: all valid ones or, with `start`, those of the passes before it.

        The latter may also lie in the folder `finished`, of an output that was made with --keep-passes. Raises
        UsageError if `start` is not a pass of the recipe, or a checkpoint before it is missing or invalid.
        """
        if start is not None:
            self._rewind(start, finished)
        self._entries, reason = self._valid(self._folder)
        count = len(self._entries)
        self._drop(count)
        if reason and start is None:
            then = f"resuming after {self._passes[count - 1].name}" if count else "every pass is run again"
            log.warning("%s since the run that left %s; %s", reason, self._folder, then)
        elif count:
            log.warning("resuming after %s, from the checkpoints in %s", self._passes[count - 1].name, self._folder)

    def _rewind(self, start: str, finished: Path | None) -> None:
        """Keeps the checkpoints of the passes before `start` and removes all others. Raises UsageError."""
        names = [step.name for step in self._passes]
        if start not in names:
            raise UsageError(f"--from {start!r} is not a pass of the recipe; its passes are {', '.join(names)}")
        count = names.index(start)
        entries, reason = self._valid(self._folder)
        if len(entries) < count and finished is not None:
            finished_entries, finished_reason = self._valid(finished)
            if len(finished_entries) >= count:
                self._drop(0)
                for index in range(count):
                    link(finished / self._name(index), self._folder / self._name(index))
                for run in finished.glob(RUNS):
                    shutil.copytree(run, self._folder / run.name, dirs_exist_ok=True)
                entries = finished_entries
            reason = reason or finished_reason
        if len(entries) < count:
            before = names[count - 1]
            if reason:
                raise UsageError(f"--from {start} needs the checkpoint of {before}: {reason}; run without --from")
            folders = f"{self._folder} or {finished}" if finished else str(self._folder)
            raise UsageError(
                f"--from {start} needs the checkpoint of {before}, and there is none in {folders}; run without --from, "
                "and with --keep-passes if later runs are to start from a pass of the output"
            )
        if not was_rewound(self._folder, start):
            self._drop(count)
            note_rewound(self._folder, start)

    def begin(self, model: Model) -> None:
        """Takes the captured model, on which the first checkpoint builds."""
        self._state = State.of(model)

    def load(self, index: int, model: Model) -> tuple[Model, PassRecord] | None:
        """The model after pass `index` and its record, from a checkpoint, or None if the pass has to be run.

        `model` is the model before the pass; its weights are changed in place. Raises PassError if the checkpoint does
        not restore the model that it was saved from.
        """
        if index >= len(self._entries) or self._entries[index].rebuilt or self._state is None:
            return None
        entry, step = self._entries[index], self._passes[index]
        tensors = self._tensors(index)
        hashes = {name: value for name, value in self._state.tensors.items() if name not in entry.gone}
        state = State(self._state.structure, hashes | {name: sha256_of(value) for name, value in tensors.items()})
        if state.result(entry.rest) != entry.result:
            log.warning("the checkpoint of %s is damaged; this pass and all later ones are run again", step.name)
            self._drop(index)
            return None
        result = restored(model, entry.rest, tensors)
        if State.of(result) != state:
            raise PassError(
                f"the checkpoint of {step.name} does not restore the model that it was saved from; remove "
                f"{self._folder} and start again"
            )
        self._state = state
        return result, replace(entry.record, resumed=True)

    def save(self, index: int, model: Model, record: PassRecord) -> PassRecord:
        """Saves what pass `index`, which was run, has changed, and returns the record to report.

        That is `record`, or the stopped run's record if the pass was run again on resume and gave the same model.
        """
        if self._state is None:
            return record
        before, self._state = self._state, State.of(model)
        try:
            rest = rest_of(model)
            result = self._state.result(rest)
            if index < len(self._entries):
                entry = self._entries[index]
                if entry.result == result:
                    self._tidy(lasting=True)
                    notes = (*entry.record.notes, "run again on resume, with the same result")
                    return replace(entry.record, resumed=True, notes=notes)
                log.warning(
                    "%s gives a different model than in the stopped run; all later passes are run again", record.name
                )
            self._drop(index)
            gone = tuple(sorted(before.tensors.keys() - self._state.tensors.keys()))
            rebuilt = before.structure != self._state.structure
            tensors = {
                name: value
                for name, value in tensors_of(model).items()
                if not rebuilt and before.tensors.get(name) != self._state.tensors[name]
            }
            entry = Entry(
                facts=dict(self._facts[index]), record=record, result=result, rebuilt=rebuilt, rest=rest, gone=gone
            )
            self._write(index, entry, tensors)
        except (
            OSError,
            TypeError,
            ValueError,
        ) as error:  # a value that JSON or safetensors cannot hold must not end the run
            self._stop(record.name, getattr(error, "strerror", None) or str(error))
        else:
            if self._state is not None:
                self._tidy(lasting=rebuilt)
        return record

    def copy_to(self, folder: Path) -> None:
        """Creates `folder` and puts all checkpoints and lasting partial results into it, for `--from` of later runs."""
        folder.mkdir()
        for path in sorted(self._folder.glob("*.safetensors")):
            link(path, folder / path.name)
        for run in self._folder.glob(RUNS):
            shutil.copytree(run, folder / run.name)

    def _name(self, index: int) -> str:
        """The file name of a pass's checkpoint."""
        return f"{index:02d}-{re.sub(r'[^A-Za-z0-9._-]', '-', self._passes[index].name)}.safetensors"

    def _valid(self, folder: Path) -> tuple[list[Entry], str | None]:
        """The valid checkpoints in a folder, from the first pass on, and why the next one, if any, is invalid."""
        entries: list[Entry] = []
        paths = sorted(folder.glob("[0-9][0-9]-*.safetensors"))
        for index, path in enumerate(paths):
            entry = read_entry(path)
            if entry is None:
                return entries, f"{path.name} is damaged"
            if index >= len(self._passes) or path.name != self._name(index) or entry.facts != self._facts[index]:
                now = self._facts[min(index, len(self._facts) - 1)]
                changed = changes(entry.facts, now) or ["the order of passes"]
                return entries, f"{', '.join(changed)} changed"
            entries.append(entry)
        return entries, None

    def _tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors in a pass's checkpoint; none if the file cannot be read, which `load` finds by the hash."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(self._folder / self._name(index)))
        except (SafetensorError, OSError):
            return {}

    def _write(self, index: int, entry: Entry, tensors: Mapping[str, Tensor]) -> None:
        """Writes a whole checkpoint, or none if the disk has no room for it."""
        content = tensor_bytes(tensors, {KEY: json.dumps(entry.model_dump(mode="python"))})
        if shutil.disk_usage(self._folder).free - len(content) < self._reserve_bytes:
            self._stop(entry.record.name, "the disk would have no room left for the output")
            return
        path = self._folder / self._name(index)
        partial = path.with_suffix(".partial")
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _stop(self, name: str, reason: str) -> None:
        """Saves no more checkpoints, since each builds on all before it. The run itself continues."""
        log.warning("no checkpoints are saved from %s on (%s); a killed run repeats these passes", name, reason)
        self._state = None

    def _drop(self, count: int) -> None:
        """Removes all checkpoints after the first `count`."""
        self._entries = self._entries[:count]
        for path in sorted(self._folder.glob("[0-9][0-9]-*.safetensors"))[count:]:
            path.unlink()

    def _tidy(self, lasting: bool) -> None:
        """Removes the partial results of a finished pass; keeps them if `lasting`: the pass is run again on resume."""
        runs = set(self._folder.glob(RUNS))
        if lasting:
            self._lasting |= runs
        for run in runs - self._lasting:
            shutil.rmtree(run, ignore_errors=True)
