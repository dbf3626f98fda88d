"""Permute: the exported graph does not grow, each score keeps more, and a layer that is not moved has its reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import onnx
import pytest
import torch
from torch import Tensor, nn

from mpcompile.analysis.activation_stats import conditional_scales, input_scales
from mpcompile.analysis.eligibility import eligible_patterns
from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import grouped
from mpcompile.passes import NMMask, Permute
from mpcompile.passes.permute.ordering_problem import scores_by_axis, total_kept
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.testing import assert_same_function, tiny_cnn, tiny_source, tiny_vit


@pytest.mark.parametrize("build", [tiny_vit, tiny_cnn])
def test_the_onnx_file_has_the_same_nodes_with_and_without(build: Callable[[], Model], tmp_path: Path) -> None:
    pipelines: dict[str, list[Pass]] = {"with": [Permute(), NMMask()], "without": [NMMask()]}
    for name, passes in pipelines.items():
        model, _ = PassManager(passes).run(build(), Data())
        lower(model, tmp_path / f"{name}.onnx", batch=2)
    nodes = {name: [n.op_type for n in onnx.load(tmp_path / f"{name}.onnx").graph.node] for name in ("with", "without")}
    assert nodes["with"] == nodes["without"]


def test_the_search_uses_the_planned_pattern() -> None:
    model = tiny_vit().with_plan({"blocks.0.mlp.fc2": LayerPlan(pattern=NM(4, 16))})
    result, _ = PassManager([Permute()]).run(model, Data())
    layers = [model.layer("blocks.0.mlp.fc2"), result.layer("blocks.0.mlp.fc2")]
    before, after = (grouped(w.weight.detach().abs(), 16).topk(4, dim=-1).values.sum() for w in layers)
    assert after > before
    assert result.plan_of("blocks.1.mlp.fc2").permutation is None  # stays dense, so it is not scored


def test_a_row_shared_pattern_keeps_more() -> None:
    pattern = NM(2, 4, rows=4)
    masks = {}
    pipelines: dict[str, list[Pass]] = {"with": [Permute(pattern), NMMask(pattern)], "without": [NMMask(pattern)]}
    for name, passes in pipelines.items():
        result, _ = PassManager(passes).run(tiny_vit(), Data())
        layer = result.layer("blocks.0.mlp.fc2")
        masks[name] = float(layer.weight.detach().abs().sum())
    assert masks["with"] > masks["without"]


def test_the_score_activation_needs_images() -> None:
    with pytest.raises(
        PassError, match="the score activation needs calibration images; give --data, or the score magnitude"
    ):
        PassManager([Permute(score="activation")]).run(tiny_vit(), Data())


class Pictures:
    classes = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index)), -1


@pytest.mark.parametrize("build", [tiny_vit, tiny_cnn])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(2, 4, rows=2)])
def test_the_score_activation_keeps_more_of_weight_times_input(build: Callable[[], Model], pattern: NM) -> None:
    data = Data(Split(Pictures(), tuple(range(24)), labelled=False))

    def products(model: Model) -> float:
        scales = input_scales(model, data.calibration)
        eligible = eligible_patterns(model, pattern)
        patterns = {name: choice for name, choice in eligible.items() if isinstance(choice, NM)}
        return total_kept(scores_by_axis(model, patterns, scales))

    model = build()
    result, _ = PassManager([Permute(pattern, score="activation")]).run(model, data)
    assert products(result) > products(model)


def test_the_default_score_is_refit_with_images_and_magnitude_without() -> None:
    model, data = tiny_vit(), Data(Split(Pictures(), tuple(range(24)), labelled=False))

    def orders(step: Permute, given: Data) -> dict[str, list[int]]:
        result, _ = PassManager([step]).run(model, given)
        moved = {name: plan.permutation for name, plan in result.plan.items() if plan.permutation is not None}
        return {name: order.tolist() for name, order in moved.items()}

    assert orders(Permute(), data) == orders(Permute(score="refit"), data)
    assert orders(Permute(), data) != orders(Permute(score="magnitude"), data)
    assert orders(Permute(), Data()) == orders(Permute(score="magnitude"), data)
    with pytest.raises(PassError, match="the score refit needs calibration images"):
        PassManager([Permute(score="refit")]).run(model, Data())


def test_the_score_refit_prunes_duplicated_channels_first() -> None:
    class Copies(nn.Module):
        """A hidden layer with eight channels, a copy of each, and eight more."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last, self.head = nn.Linear(64, 24), nn.Linear(24, 16), nn.Linear(16, 3)
            with torch.no_grad():
                self.stem.weight[8:16], self.stem.bias[8:16] = self.stem.weight[:8], self.stem.bias[:8]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.last(self.stem(x.flatten(1)).relu()).relu())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, data = capture(Copies().eval(), tiny_source()), Data(Split(Pictures(), tuple(range(24)), labelled=False))
    scales = conditional_scales(model, data.calibration)["last"]
    assert float(scales[:16].max()) < float(scales[16:].min())

    def lost(score: Literal["magnitude", "refit"]) -> float:
        masks = NMMask(NM(1, 4), refit="layer", include=("last",))  # plain least squares, which the score is about
        result, _ = PassManager([Permute(NM(1, 4), score=score), masks]).run(model, data)
        return result.plan_of("last").relative_error or 0.0

    assert lost("refit") < lost("magnitude")


def test_a_model_whose_tracing_fails_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: Model) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("mpcompile.passes.permute.permute.couple", fails)
    model = tiny_vit()
    result, _ = PassManager([Permute(), NMMask()]).run(model, Data())
    plan = result.plan["blocks.0.mlp.fc2"]
    assert plan.unpermuted == "channels cannot be traced through the graph: RuntimeError: no such operator"
    assert plan.mask is not None
    with pytest.raises(PassError, match="cannot be moved: channels cannot be traced through the graph"):
        PassManager([Permute(strict=True)]).run(model, Data())


# ---- layers that keep their order


class Unmovable(nn.Module):
    """A hidden layer before an operation without a rule, and a layer whose input has the same channels twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = nn.Linear(64, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        x = self.b(self.a(x).cumsum(1))
        return self.head(self.c(torch.cat([x[:, :8], x[:, :8]], 1)))  # type: ignore[no-any-return]


def test_channels_that_cannot_be_moved_have_a_reason() -> None:
    model = capture(Unmovable(), tiny_source())
    result, _ = PassManager([Permute(), NMMask()]).run(model, Data())
    assert_same_function(model.graph, PassManager([Permute()]).run(model, Data())[0].graph, model.example, 1e-5)
    assert str(result.plan["b"].unpermuted) == "channel tracing has no rule for cumsum (cumsum)"
    assert str(result.plan["c"].unpermuted) == "it appears more than once along c.weight"
    assert result.plan["a"].permutation is not None
    assert all(result.plan[name].mask is not None for name in "abc")
    with pytest.raises(PassError, match=r"the input channels of [bc] cannot be moved: .*; leave --strict out to go on"):
        PassManager([Permute(strict=True)]).run(model, Data())


def test_invalid_uses_are_refused() -> None:
    with pytest.raises(UsageError, match="sweeps is 0"):
        Permute(sweeps=0)
    with pytest.raises(PassError, match="some layers are masked already"):
        PassManager([NMMask(), Permute()]).run(tiny_vit(), Data())
