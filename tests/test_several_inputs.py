"""The whole way of models with several inputs or outputs: passes, file, engines, report, the original's outputs."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile import Recipe, compile
from mpcompile.data.images import Data, Split
from mpcompile.driver.artifact import Artifact
from mpcompile.errors import CaptureError, UsageError
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.call_inputs import InputSpec
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request
from mpcompile.ir.pattern import NM
from mpcompile.passes import Certify, NMMask, Permute
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.testing import tiny_source

LARGEST_ROUNDING = 1e-5  # of outputs of order one, in float32


class TwoInputs(nn.Module):
    """Images of 1×8×8 and 4 numbers beside each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.beside = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(4, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor, meta: Tensor) -> Tensor:
        y: Tensor = self.head(F.gelu(self.body(F.gelu(self.stem(x.flatten(1)) + self.beside(meta)))))
        return y


class Several(nn.Module):
    """Returns a dict with boxes first, logits, and a list of features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(64, 32), nn.Linear(32, 32)
        self.box, self.head = nn.Linear(32, 4), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> "OrderedDict[str, Any]":
        first = F.gelu(self.stem(x.flatten(1)))
        second = F.gelu(self.body(first))
        return OrderedDict(boxes=self.box(second), logits=self.head(second), features=[first, second], loss=None)


class Pairs:
    """Items with both inputs and a class."""

    classes = 10

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], int]:
        rng = torch.Generator().manual_seed(index)
        return (torch.randn(1, 8, 8, generator=rng), torch.randn(4, generator=rng)), index % 10


def both() -> Data:
    pairs = Pairs()
    return Data(
        Split(pairs, tuple(range(16)), True), Split(pairs, tuple(range(16, 32)), True),
        validation=Split(pairs, tuple(range(32, 48)), True),
    )  # fmt: skip


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def test_a_second_input_goes_through_passes_file_and_engine(tmp_path: Path) -> None:
    module = seeded(TwoInputs)
    inputs = {"meta": torch.randn(2, 4)}
    model = capture(module, tiny_source(), inputs=inputs)
    assert model.input_names == ("images", "meta")
    passes: list[Pass] = [Permute(), NMMask(NM(2, 4)), Certify()]
    result, records = PassManager(passes).run(model, both())
    assert result.masks()
    assert result.certificate is not None
    assert records[0].drift < LARGEST_ROUNDING
    file = lower(result, tmp_path / "model.onnx").onnx
    session = onnxruntime.InferenceSession(file)
    images, meta = torch.randn(5, 1, 8, 8), torch.randn(5, 4)
    [found] = session.run(None, {"images": images.numpy(), "meta": meta.numpy()})
    assert np.abs(found - result((images, meta)).numpy()).max() < LARGEST_ROUNDING


@pytest.mark.parametrize("batch", [3, None])
def test_two_inputs_compile(tmp_path: Path, batch: int | None) -> None:
    bench = {"batches": [batch or 4], "seconds": 0.05, "threads": 1}
    steps = [{"nm-mask": {"pattern": "2:4"}}, {"certify": {}}]
    recipe = Recipe.checked({"passes": steps, "bench": bench, "batch": batch, "precision": "fp16"})
    request = Request("test_several_inputs:TwoInputs", input_size=(1, 8, 8), mean=(0.5,), std=(0.5,))
    with pytest.raises(CaptureError, match=r"also needs meta; give the shape .* --input meta=4"):
        compile(request, recipe, output=tmp_path / "out", data=both())
    report = compile(replace(request, inputs={"meta": InputSpec((4,))}), recipe, output=tmp_path / "out", data=both())
    found = report.report
    assert found.captured is not None
    assert [(row.name, row.shape) for row in found.captured.inputs] == [("images", (1, 8, 8)), ("meta", (4,))]
    assert found.comparison is not None
    assert found.comparison.count == 16
    assert found.latency[0].speedup.ratio > 0
    assert "the N:M kernels are selected for models with one input" in found.notes[0]


def test_outputs_keep_their_names_and_structure(tmp_path: Path) -> None:
    module = seeded(Several)
    model = capture(module, tiny_source())
    assert model.output_names == ("logits", "boxes", "features.0", "features.1")
    assert model.notes
    assert "--output-name" in model.notes[0]
    images = torch.randn(3, 1, 8, 8)
    found, wanted = model.as_returned(images), module(images)
    assert type(found) is OrderedDict
    assert list(found) == list(wanted)
    assert found["loss"] is None
    assert torch.equal(found["features"][1], wanted["features"][1])
    assert torch.equal(model(images), wanted["logits"])
    lowered = lower(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(lowered.onnx)
    assert [output.name for output in session.get_outputs()] == list(model.output_names)
    for name, value in zip(model.output_names, session.run(None, {"images": images.numpy()}), strict=True):
        expected = model.outputs(images)[model.output_names.index(name)].numpy()
        assert np.abs(value - expected).max() < LARGEST_ROUNDING


def test_the_primary_output_can_be_chosen() -> None:
    model = capture(seeded(Several), tiny_source(), primary="boxes")
    assert model.output_names[0] == "boxes"
    assert model(model.example).shape == (2, 4)
    assert model.as_returned(model.example)["boxes"].shape == (2, 4)
    with pytest.raises(CaptureError, match="has no output 'logit'; its outputs are boxes, logits"):
        capture(seeded(Several), tiny_source(), primary="logit")


def test_several_outputs_are_reported(tmp_path: Path) -> None:
    bench = {"batches": [1], "seconds": 0.05, "threads": 1}
    recipe = Recipe.checked({"passes": [{"nm-mask": {"pattern": "2:4"}}], "bench": bench})
    module = seeded(Several)
    module.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # type: ignore[assignment]
    artifact = compile(module, recipe, output=tmp_path / "out")
    captured = Artifact.open(tmp_path / "out").report.captured
    assert captured is not None
    assert captured.by == "recorder"
    rows = {row.name: row for row in captured.outputs}
    assert rows["features.0"].relative_error == 0  # before the only masked layer
    assert rows["boxes"].relative_error is not None
    assert 0 < rows["boxes"].relative_error < 1
    assert "| boxes | 4 |" in (artifact.folder / "report.md").read_text(encoding="utf-8")
    loaded = artifact.load("torch", model=seeded(Several))
    assert set(loaded(torch.randn(2, 1, 8, 8))) == {"boxes", "logits", "features", "loss"}


def test_data_that_give_one_input_of_two_are_refused(tmp_path: Path) -> None:
    from mpcompile.driver.preflight import require_inputs_of_target
    from mpcompile.driver.run_plan import plan_of
    from mpcompile.testing import tiny_data

    model = capture(seeded(TwoInputs), tiny_source(), inputs={"meta": torch.randn(2, 4)})
    plan = plan_of(Recipe.checked({"passes": [{"nm-mask": {"pattern": "2:4"}}]}))
    with pytest.raises(UsageError, match="the model takes images, meta, and the data give 1 of them"):
        require_inputs_of_target(plan, model, tiny_data(model, 4))
    require_inputs_of_target(plan, model, both())
    offline = plan_of(Recipe.checked({"passes": [{"nm-mask": {"pattern": "2:4"}}], "target": "trt"}))
    with pytest.raises(UsageError, match="target trt runs models with one input; use ort"):
        require_inputs_of_target(offline, model, both())
