"""mpcompile as a library: its public names, its errors, its progress, and several threads."""

import inspect
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import mpcompile
from mpcompile import errors
from mpcompile.data.images import Data
from mpcompile.driver.analyze import STAGES, analyze
from mpcompile.driver.artifact import Artifact
from mpcompile.errors import MpcompileError, PassError
from mpcompile.frontend.capture import capture
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.recipe.schema import Recipe
from mpcompile.system.progress import Progress, listening, stage_progress, tracked
from mpcompile.testing import TinyMLP, tiny_data, tiny_source, tiny_vit

PUBLIC = """
Artifact Data Effect LayerPlan Loaded Lowered Model MpcompileError NM Pass PassManager PassRecord Progress Recipe Report
Request Source Spectrum Step capture compile load load_data lower read_recipe tracked
"""
ERRORS = {
    "AccuracyError": 6, "BuildError": 7, "CaptureError": 3, "ConditionError": 6, "LoadError": 3, "MaskError": 5,
    "MpcompileError": 1, "ParityError": 5, "PassError": 4, "ResourceError": 1, "RuntimeMissing": 7, "UsageError": 2,
}  # fmt: skip
QUICK = Recipe.checked({"target": "eager", "bench": {"batches": [1], "seconds": 0.05}})


class Net(TinyMLP):
    """A tiny module that says what its images are."""

    pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012


def test_the_public_names_are_these() -> None:
    """A name that comes or goes is a decision: it is changed here too, and told in the changelog."""
    assert sorted(mpcompile.__all__) == sorted(PUBLIC.split())
    for name in mpcompile.__all__:
        assert inspect.getdoc(getattr(mpcompile, name)), f"{name} has no docstring"


def test_the_errors_are_in_one_place_each_with_its_exit_code() -> None:
    found = {
        name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    kinds = {name: kind for name, kind in found.items() if issubclass(kind, MpcompileError)}
    assert {name: kind.exit_code for name, kind in kinds.items()} == ERRORS
    assert set(errors.__all__) == {*ERRORS, "on_layer"}
    assert all(inspect.getdoc(kind) for kind in kinds.values())


# ---- progress


def test_progress_is_a_value_that_reads_as_a_line() -> None:
    assert str(Progress("nm-mask", 3, 9)) == "[3/9] nm-mask"
    assert str(Progress("nm-mask", 3, 9, "blocks.0", 4, 24)) == "[3/9] nm-mask: blocks.0 (5 of 24)"


def test_stages_are_numbered_in_their_order_though_one_is_there_twice_and_one_left_out() -> None:
    heard: list[Progress] = []
    with stage_progress(heard.append, ("a", "b", "a", "c", "d")) as begin:
        for stage in ("a", "b", "a"):
            begin(stage)
        assert list(tracked([7, 8])) == [7, 8]
        begin("found later")
        begin("d")
    assert [(at.stage, at.number, at.step, at.done, at.total) for at in heard] == [
        ("a", 1, None, 0, 0),
        ("b", 2, None, 0, 0),
        ("a", 3, None, 0, 0),
        ("a", 3, "7", 0, 2),
        ("a", 3, "8", 1, 2),
        ("found later", 3, None, 0, 0),
        ("d", 5, None, 0, 0),
    ]
    assert list(tracked([9])) == [9]
    assert len(heard) == 7  # nobody listens any more


def test_steps_count_what_they_hold_and_know_the_step_they_are_in() -> None:
    heard: list[Progress] = []
    with stage_progress(heard.append, ("a",)) as begin:
        begin("a")
        for layer in tracked(["x", "y"], unit="layers"):
            batches = tracked(range(0, 5, 2), "image {}".format, "images", lambda start: min(2, 5 - start))
            if layer == "x":
                next(batches)  # and is left
            else:
                list(batches)
            del batches
        list(tracked([0]))
    assert [(at.step, at.done, at.total, at.unit, at.depth) for at in heard[1:]] == [
        ("x", 0, 2, "layers", 0),
        ("image 0", 0, 5, "images", 1),
        ("y", 1, 2, "layers", 0),
        ("image 0", 0, 5, "images", 1),
        ("image 2", 2, 5, "images", 1),
        ("image 4", 4, 5, "images", 1),
        ("0", 0, 1, "steps", 0),
    ]


def test_without_an_observer_whoever_listens_goes_on_listening() -> None:
    heard: list[str] = []
    with listening(lambda what, done, total: heard.append(what)), stage_progress(None, ()) as begin:
        begin("a")
        list(tracked(["x"]))
    assert heard == ["x"]


def test_an_analysis_tells_its_stages_and_layers() -> None:
    heard: list[Progress] = []
    analyze(Net(), observe=heard.append)
    assert [(at.number, at.stage) for at in heard if at.step is None] == list(enumerate(STAGES, 1))
    assert {at.step for at in heard if at.stage == "spectra"} >= {None, "hidden"}


class StopError(Exception):
    """What a program raises to end a run."""


@pytest.mark.parametrize("within", [False, True])
def test_an_observer_can_end_a_run_and_nothing_is_left(tmp_path: Path, within: bool) -> None:
    def stop(at: Progress) -> None:
        if at.stage == "nm-mask" and (at.step is not None) == within:
            raise StopError(at.stage)

    data = tiny_data(capture(Net(), tiny_source())) if within else Data()  # with images it goes layer by layer
    with pytest.raises(PassError if within else StopError) as error:
        mpcompile.compile(Net(), QUICK, passes=[NMMask()], data=data, output=tmp_path / "out", observe=stop)
    assert isinstance(error.value.__cause__ if within else error.value, StopError)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_printed_and_all_that_is_logged_is_ours(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="mpcompile"):
        mpcompile.compile(Net(), QUICK, passes=[NMMask()], output=tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    ours = [record for record in caplog.records if "/mpcompile/" in record.pathname]
    assert all(record.name.startswith("mpcompile.") for record in ours)
    assert not logging.getLogger("mpcompile").handlers


# ---- threads


def contents(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Weights, masks and the initializers of the ONNX file: all that does not depend on clocks."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for name in ("model", "masks"):
        found |= {f"{name} {key}": value for key, value in load_file(artifact.folder / f"{name}.safetensors").items()}
    for tensor in onnx.load(artifact.onnx).graph.initializer:
        found[f"onnx {tensor.name}"] = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    return found


def test_two_threads_compile_what_they_would_one_after_the_other(tmp_path: Path) -> None:
    nets = {"first": Net(), "second": Net()}
    patterns = {"first": NM(2, 4), "second": NM(1, 4)}
    heard: dict[str, list[Progress]] = {"first": [], "second": []}

    def run(name: str, folder: Path, observe: Callable[[Progress], None] | None = None) -> dict[str, torch.Tensor]:
        made = mpcompile.compile(
            nets[name], QUICK, passes=[NMMask(patterns[name])], output=folder / name, observe=observe
        )
        return contents(made)

    alone = {name: run(name, tmp_path / "alone") for name in nets}
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(run, name, tmp_path / "both", heard[name].append) for name in nets}
        both = {name: future.result() for name, future in futures.items()}
    for name in nets:
        assert alone[name].keys() == both[name].keys()
        assert all(torch.equal(value, both[name][key]) for key, value in alone[name].items())
        stages = [at.number for at in heard[name] if at.step is None]
        assert stages == list(range(1, 10))  # each hears its own run, and no other
    assert not torch.equal(both["first"]["masks hidden"], both["second"]["masks hidden"])


def test_passes_run_in_two_threads_at_once() -> None:
    model = tiny_vit()
    expected = PassManager([NMMask()]).run(model, Data())[0].graph.state_dict()
    with ThreadPoolExecutor(2) as pool:
        for result, _ in pool.map(lambda _: PassManager([NMMask()]).run(model, Data()), range(4)):
            assert all(torch.equal(value, expected[name]) for name, value in result.graph.state_dict().items())


def test_other_threads_run_modules_while_one_captures() -> None:
    """A server goes on answering, and its modules do not become part of the graph."""
    served, images = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 8)
    with torch.no_grad():
        expected = served(images)
    recording, answered = threading.Event(), threading.Event()

    class Waits(Net):
        """While it is recorded, and then alone, it waits for an answer of the other thread."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch._C._len_torch_function_stack():  # the recorder is such a mode
                recording.set()
                assert answered.wait(30)
            return super().forward(x)  # type: ignore[no-any-return]

    def serve() -> torch.Tensor:
        assert recording.wait(30)
        try:
            with torch.no_grad():
                return served(images)  # type: ignore[no-any-return]
        finally:
            answered.set()

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(serve)
        model = capture(Waits().eval(), tiny_source())
        assert torch.equal(answer.result(), expected)
    assert {name for name, _ in model.layers()} == {name for name, _ in capture(Net().eval(), tiny_source()).layers()}
