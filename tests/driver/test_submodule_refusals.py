"""What --submodule refuses: names, calls and inputs that a part cannot have, and options that need a whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from part_models import Classifier, Detector
from torch import nn

import mpcompile
from mpcompile.driver.part import captured_run
from mpcompile.errors import CaptureError, UsageError
from mpcompile.frontend.call_inputs import InputSpec
from mpcompile.frontend.load_model import Loaded, Request
from mpcompile.frontend.preprocessing import source_of
from mpcompile.recipe.schema import DataChoice, Recipe


def opened(module: nn.Module, submodule: str) -> None:
    """Captures the part of a module, without images."""
    loaded = Loaded(module, source_of(module, name="a", arch="a", sha256=""))
    captured_run(loaded, Request("a"), None, DataChoice(), "auto", submodule)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("bakbone", r"matches no module of Classifier.*give one of its parts: stage2 \(\d+\.\d% of the parameters\)"),
        (
            "stage?",
            r"matches 3 modules of Classifier side by side: stage1 \(.*\), stage2 \(.*\), stages",
        ),
        ("stages", r"stages is never called in a run of Classifier; give a part that is called once: stage2"),
    ],
)
def test_a_pattern_names_one_part_that_is_called(pattern: str, text: str) -> None:
    with pytest.raises((UsageError, CaptureError), match=text):
        opened(Classifier(), pattern)


def test_a_part_that_is_called_twice_is_refused() -> None:
    module = Classifier()
    module.stages = nn.ModuleList([module.stages[0], module.stages[0]])
    with pytest.raises((UsageError, CaptureError), match=r"its weight stages\.0\.weight is also stages\.1\.weight"):
        opened(module, "stages.0")

    class Twice(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.stage1(x))
            return self.fc(self.stages[0](self.stages[0](x)).mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match=r"stages\.0 is called 2 times in a run of Twice"):
        opened(Twice(), "stages.0")


def test_inputs_without_a_row_for_each_image_are_refused() -> None:
    class Windows(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.stage1(x))
            x = self.stage2(torch.cat([x, x]), shift=self.shift)[: len(x)]
            return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match=r"its input x has shape \(4, 16, 8, 8\) for 2 images and \(6, 16, 8, 8\)"):
        opened(Windows(), "stage2")


def test_a_part_that_is_used_beside_its_call_is_refused() -> None:
    """Modules inside the part are not called when the captured graph runs in its place."""

    class Remembering(Detector):
        def forward(self, images: Any, targets: Any = None) -> Any:
            seen: list[torch.Tensor] = []
            handle = self.backbone.one.register_forward_hook(lambda module, args, output: seen.append(output))
            scores = self.head(self.backbone(images)["coarse"])
            handle.remove()
            return scores, seen[0]

    with pytest.raises(CaptureError, match="Remembering does not run with the captured part in its place: .* give"):
        opened(Remembering(), "backbone")


def test_options_that_do_not_go_with_a_part_are_refused() -> None:
    loaded = Loaded(Classifier(), source_of(Classifier(), name="a", arch="a", sha256=""))
    request = Request("a", inputs={"mask": InputSpec.parse("4")})
    with pytest.raises(UsageError, match="--input does not go with --submodule"):
        captured_run(loaded, request, None, DataChoice(), "auto", "stage2")


def test_values_that_change_and_are_no_tensors_are_refused() -> None:
    class Counted(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stage2(torch.relu(self.stage1(x)), self.shift, float(x.mean()))
            return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match="called with values that change from image to image and are no tensors"):
        opened(Counted(), "stage2")


def test_a_limit_on_accuracy_is_refused(tmp_path: Path) -> None:
    limited = Recipe.checked({"submodule": "stage2", "passes": ["nm-mask"], "gates": {"max_drop": 1.0}})
    with pytest.raises(UsageError, match=r"a part \(--submodule\) are no answers"):
        mpcompile.compile(Classifier(), limited, data=tmp_path / "8.npz", output=tmp_path / "out")
