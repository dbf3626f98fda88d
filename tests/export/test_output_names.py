"""Outputs whose names stand elsewhere in an ONNX graph: other outputs, inputs, values within, weights."""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mpcompile.errors import BuildError
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.testing import tiny_source

Form = Callable[[Tensor, Tensor], dict[object, object]]


class Returns(nn.Module):
    """Returns what a function makes of the logits and the images."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 16), nn.Linear(16, 4)
        self.form = form

    def forward(self, x: Tensor) -> dict[object, object]:
        return self.form(self.head(self.body(x.flatten(1)).relu()), x)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda y, x: {"relu": y, "linear": y * 2, "mul": y.relu()}, ["relu", "linear", "mul"]),
        (lambda y, x: {"a.b": y, "a": {"b": y * 2}}, ["a.b", "a.b_1"]),
        (lambda y, x: {"logits": y, "images": x * 2}, ["logits", "images_1"]),
    ],
)
def test_every_output_has_a_name_of_its_own(tmp_path: Path, form: Form, names: list[str]) -> None:
    model = capture(Returns(form), tiny_source())
    lower(model, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [row.name for row in session.get_outputs()] == names == list(model.output_names)
    found = session.run(None, {"images": model.example.numpy()})
    for wanted, one in zip(model.outputs(model.example), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), wanted.detach())


def test_the_name_of_a_weight_is_refused(tmp_path: Path) -> None:
    model = capture(Returns(lambda y, x: {"logits": y, "head.weight": y * 2}), tiny_source())
    with pytest.raises(BuildError, match=r"the output head\.weight has the name of a weight.*another key"):
        lower(model, tmp_path / "model.onnx")
