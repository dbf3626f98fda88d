"""What each finished pass changed, kept in a folder, so that a run that was stopped goes on after it.

A checkpoint is a safetensors file: the tensors of the model that the pass changed, and as JSON the rest of what it left
(the layers' plans, certificate, epochs, the manager's record). Checkpoints stand on each other, the first on the model
as it was captured, which captures the same every time. Each names the facts that it followed from (versions, model,
images, the passes up to it), and is taken up only where all of them still hold. Before it is, the hash of the
model that it leads to is compared with the one that was recorded.

A pass that changes the graph itself (nodes, modules, which weights are one) cannot be put back so. It is run again when
a run goes on, and the passes after it are taken up only if it gives the same model as it did.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mpcompile.errors import PassError, UsageError
from mpcompile.ir.model import Model
from mpcompile.pipeline.checkpoint_file import KEY, Entry, State, link, read_entry, rest_of, restored
from mpcompile.pipeline.fingerprint import changes, tensors_of
from mpcompile.pipeline.pass_manager import Pass, PassRecord
from mpcompile.pipeline.run_folder import note_rewound, was_rewound
from mpcompile.system.hashing import sha256_of
from mpcompile.system.safetensors_io import tensor_bytes

log = logging.getLogger(__name__)


RUNS = "run-*"  # what a long pass has finished: see mpcompile/pipeline/partial_results.py


class Checkpoints:
    """The checkpoints of one run; the pass manager asks for them and adds to them.

    `facts` are, for each pass, what its result follows from. None is written that would leave less than `reserve_bytes`
    of the disk. `on_taken` is told of each pass that is not run.
    """

    def __init__(
        self,
        folder: Path,
        passes: Sequence[Pass],
        facts: Sequence[Mapping[str, str]],
        reserve_bytes: int = 0,
        on_taken: Callable[[Pass], None] = lambda step: None,
    ) -> None:
        self._folder, self._passes, self._facts = folder, passes, facts
        self._reserve_bytes, self._on_taken = reserve_bytes, on_taken
        self._entries: list[Entry] = []  # of an earlier run, to be taken up
        self._lasting: set[Path] = set()  # work of passes that will have to be run again
        self._state: State | None = None  # after the last pass; None where checkpoints are no longer kept

    def go_on(self, start: str | None = None, finished: Path | None = None) -> None:
        """Looks for checkpoints to go on from: all that hold, or those of the passes before `start`.

        These may also stand in the folder `finished`. Raises UsageError where they are needed and do not.
        """
        if start is not None:
            self._rewind(start, finished)
        self._entries, why = self._found(self._folder)
        count = len(self._entries)
        self._drop(count)
        if why and start is None:
            then = f"the run goes on after {self._passes[count - 1].name}" if count else "every pass is run anew"
            log.warning("%s since the run whose work is in %s; %s", why, self._folder, then)
        elif count:
            log.warning("the run goes on after %s, with what %s holds", self._passes[count - 1].name, self._folder)

    def _rewind(self, start: str, finished: Path | None) -> None:
        """Keeps the checkpoints of the passes before one, and no others."""
        names = [step.name for step in self._passes]
        if start not in names:
            raise UsageError(f"--from {start!r} is no pass of the recipe; its passes are {', '.join(names)}")
        count = names.index(start)
        entries, why = self._found(self._folder)
        if len(entries) < count and finished is not None:
            others, other_why = self._found(finished)
            if len(others) >= count:
                self._drop(0)
                for index in range(count):
                    link(finished / self._name(index), self._folder / self._name(index))
                for run in finished.glob(RUNS):
                    shutil.copytree(run, self._folder / run.name, dirs_exist_ok=True)
                entries = others
            why = why or other_why
        if len(entries) < count:
            before = names[count - 1]
            if why:
                raise UsageError(f"--from {start} needs the checkpoint of {before}: {why}; leave --from out")
            places = f"{self._folder} or {finished}" if finished else str(self._folder)
            raise UsageError(
                f"--from {start} needs the checkpoint of {before}, and there is none in {places}; leave --from out, "
                "and give --keep-passes where you will want to go on from a pass of a finished run"
            )
        if not was_rewound(self._folder, start):
            self._drop(count)
            note_rewound(self._folder, start)

    def begin(self, model: Model) -> None:
        """Takes the captured model, on which the first checkpoint stands."""
        self._state = State.of(model)

    def taken(self, index: int, model: Model) -> tuple[Model, PassRecord] | None:
        """The model after a pass and the record of it, as an earlier run left them, or None: it has to be run.

        The model given is that before the pass; its weights are changed in place.
        """
        if index >= len(self._entries) or self._entries[index].rebuilt or self._state is None:
            return None
        entry, step = self._entries[index], self._passes[index]
        tensors = self._tensors(index)
        hashes = {name: value for name, value in self._state.tensors.items() if name not in entry.gone}
        state = State(self._state.structure, hashes | {name: sha256_of(value) for name, value in tensors.items()})
        if state.result(entry.rest) != entry.result:
            log.warning("the checkpoint of %s is damaged; it and what comes after it is run anew", step.name)
            self._drop(index)
            return None
        result = restored(model, entry.rest, tensors)
        if State.of(result) != state:
            raise PassError(f"the checkpoint of {step.name} cannot be put back; remove {self._folder} and start again")
        self._state = state
        self._on_taken(step)
        return result, replace(entry.record, resumed=True)

    def kept(self, index: int, model: Model, record: PassRecord) -> PassRecord:
        """Keeps what a pass that was run has changed; the record, or the earlier one of a pass that was run again."""
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
                    notes = (*entry.record.notes, "run again when the run went on, with the same result")
                    return replace(entry.record, resumed=True, notes=notes)
                log.warning("%s gives another model than it did; what comes after it is run anew", record.name)
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
        ) as error:  # what JSON or safetensors cannot hold is no failure of the run
            self._stop(record.name, getattr(error, "strerror", None) or str(error))
        else:
            if self._state is not None:
                self._tidy(lasting=rebuilt)
        return record

    def keep_in(self, folder: Path) -> None:
        """Puts the checkpoints into a folder of their own, for `--from` of later runs."""
        folder.mkdir()
        for path in sorted(self._folder.glob("*.safetensors")):
            link(path, folder / path.name)
        for run in self._folder.glob(RUNS):
            shutil.copytree(run, folder / run.name)

    def _name(self, index: int) -> str:
        return f"{index:02d}-{re.sub(r'[^A-Za-z0-9._-]', '-', self._passes[index].name)}.safetensors"

    def _found(self, folder: Path) -> tuple[list[Entry], str | None]:
        """The checkpoints that hold, from the first pass on, and why the next one does not, where there is one."""
        entries: list[Entry] = []
        here = sorted(folder.glob("[0-9][0-9]-*.safetensors"))
        for index, path in enumerate(here):
            entry = read_entry(path)
            if entry is None:
                return entries, f"{path.name} is damaged"
            if index >= len(self._passes) or path.name != self._name(index) or entry.facts != self._facts[index]:
                now = self._facts[min(index, len(self._facts) - 1)]
                told = changes(entry.facts, now) or ["the order of passes"]
                return entries, f"{', '.join(told)} changed"
            entries.append(entry)
        return entries, None

    def _tensors(self, index: int) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(self._folder / self._name(index)))
        except (SafetensorError, OSError):
            return {}

    def _write(self, index: int, entry: Entry, tensors: Mapping[str, Tensor]) -> None:
        """Writes a checkpoint: the whole of it or, where the disk has no room for it, none."""
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

    def _stop(self, name: str, why: str) -> None:
        """Keeps no more, since a checkpoint stands on all before it. The run itself goes on."""
        log.warning("no checkpoint is kept of %s and what follows (%s): after a kill it is run again", name, why)
        self._state = None

    def _drop(self, count: int) -> None:
        """Forgets the checkpoints from that number on."""
        self._entries = self._entries[:count]
        for path in sorted(self._folder.glob("[0-9][0-9]-*.safetensors"))[count:]:
            path.unlink()

    def _tidy(self, lasting: bool) -> None:
        """Removes what a finished pass kept of its work, or lets it stay where the pass will have to be run again."""
        runs = set(self._folder.glob(RUNS))
        if lasting:
            self._lasting |= runs
        for run in runs - self._lasting:
            shutil.rmtree(run, ignore_errors=True)
