"""A whole run that lost confidence: the factor is in the weights, in the ONNX file and in the report."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from mpcompile import Recipe, compile
from mpcompile.data.images import Data
from mpcompile.driver.artifact import Artifact
from mpcompile.ir.model import Model
from mpcompile.passes import Certify, Confidence
from mpcompile.pipeline.pass_manager import Pass
from mpcompile.pipeline.pass_record import Effect
from mpcompile.testing import TinyMLP, tiny_data, tiny_mlp


@dataclass(frozen=True)
class Fade:
    """Divides the logits by 2.5."""

    name: ClassVar[str] = "fade"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: Model, data: Data) -> Model:
        with torch.no_grad():
            for value in model.layer("head").parameters():
                value.div_(2.5)
        return model


@pytest.fixture(scope="module")
def faded(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    module = TinyMLP().eval()
    module.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # type: ignore[assignment]
    with torch.no_grad():
        module.head.weight.mul_(30)
    steps: list[Pass] = [Fade(), Confidence(), Certify()]
    recipe = Recipe.checked({"bench": {"seconds": 0.01}, "gates": {"max_kl": 0.001}})
    return compile(
        module, recipe, passes=steps, data=tiny_data(tiny_mlp()), output=tmp_path_factory.mktemp("run") / "out"
    )


def test_the_report_has_the_factor_and_the_gate_holds(faded: Artifact) -> None:
    report = faded.report
    assert report.logit_factor == pytest.approx(2.5, rel=1e-3)
    assert "is in the last layers" in " ".join(report.verdict)
    assert [gate.holds for gate in report.gates] == [True]
    assert report.comparison is not None
    assert report.comparison.agreement == 1
    assert report.comparison.confidence is not None
    assert report.comparison.confidence.best_factor == pytest.approx(1, abs=1e-3)
    assert report.certificate is not None
    assert report.certificate.proven == report.certificate.images


def test_the_weights_and_the_file_have_it(faded: Artifact) -> None:
    module = TinyMLP().eval()
    loaded = faded.load("torch", model=module)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        from_weights = loaded(x)
    torch.testing.assert_close(torch.from_numpy(faded.load("onnx")(x.numpy())), from_weights, rtol=1e-4, atol=1e-4)
