"""The pass manager verifies every pass, names what failed, and does not change the caller's model."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from mpcompile.data.images import Data
from mpcompile.errors import MaskError, PassError, UsageError, on_layer
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.pipeline.pass_record import Effect
from mpcompile.testing import tiny_vit

FC1 = "blocks.0.mlp.fc1"


@dataclass(frozen=True)
class Scale:
    """Multiplies one layer's weights."""

    name: ClassVar[str] = "scale"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()
    by: float = 2.0

    def __call__(self, model: Model, data: Data) -> Model:
        with torch.no_grad(), on_layer(FC1):
            model.layer(FC1).weight.mul_(self.by)
        return model


@dataclass(frozen=True)
class SaysExact(Scale):
    """Declares itself exact, and is not."""

    name: ClassVar[str] = "says-exact"
    effect: ClassVar[Effect] = Effect.EXACT


@dataclass(frozen=True)
class SaysAnalysis(Scale):
    """Declares itself an analysis, and changes the outputs slightly."""

    name: ClassVar[str] = "says-analysis"
    effect: ClassVar[Effect] = Effect.ANALYSIS
    by: float = 1.0001


@dataclass(frozen=True)
class Nothing(Scale):
    """Does nothing, exactly."""

    name: ClassVar[str] = "nothing"
    effect: ClassVar[Effect] = Effect.ANALYSIS
    by: float = 1.0


@dataclass(frozen=True)
class Fill(Scale):
    """Makes masked weights nonzero."""

    name: ClassVar[str] = "fill"

    def __call__(self, model: Model, data: Data) -> Model:
        with torch.no_grad():
            model.layer(FC1).weight.add_(0.01)
        return model


@dataclass(frozen=True)
class Widen(Scale):
    """Changes the shape of the outputs."""

    name: ClassVar[str] = "widen"

    def __call__(self, model: Model, data: Data) -> Model:
        model.graph.set_submodule("head", torch.nn.Linear(32, 11))
        return model


@dataclass(frozen=True)
class Explode(Scale):
    """Makes the outputs infinite."""

    name: ClassVar[str] = "explode"
    by: float = float("inf")


@dataclass(frozen=True)
class Broken(Scale):
    """Fails on a layer."""

    name: ClassVar[str] = "broken"

    def __call__(self, model: Model, data: Data) -> Model:
        with on_layer(FC1):
            raise ValueError("singular matrix")


@dataclass(frozen=True)
class Unfinished(Scale):
    """Returns None instead of a Model."""

    name: ClassVar[str] = "unfinished"

    def __call__(self, model: Model, data: Data) -> Model:
        return None  # type: ignore[return-value]


@dataclass(frozen=True)
class AfterMask(Nothing):
    """Requires nm-mask before it."""

    name: ClassVar[str] = "after-mask"
    requires: ClassVar[tuple[str, ...]] = ("nm-mask",)


def test_the_callers_model_is_not_changed() -> None:
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.graph.state_dict().items()}
    result, _ = PassManager([NMMask(), Scale()]).run(model, Data())
    assert all(torch.equal(value, before[name]) for name, value in model.graph.state_dict().items())
    assert not model.plan
    assert result.plan[FC1].mask is not None


def test_records_have_effect_changed_layers_notes_and_drift() -> None:
    _, [mask, scale, nothing] = PassManager([NMMask(), Scale(), Nothing()]).run(tiny_vit(), Data())
    assert (mask.name, mask.effect) == ("nm-mask", Effect.LOSSY)
    assert FC1 in mask.layers_changed
    assert "mask: 8 layers" in mask.notes
    assert scale.layers_changed == ()
    assert scale.drift > 0
    assert nothing.drift == 0


def test_the_observer_is_called_with_each_pass() -> None:
    names: list[str] = []
    PassManager([NMMask(), Nothing()]).run(tiny_vit(), Data(), names.append)
    assert names == ["nm-mask", "nothing"]


def test_one_manager_serves_many_models() -> None:
    manager = PassManager([NMMask(NM(1, 4))])
    first, _ = manager.run(tiny_vit(), Data())
    second, _ = manager.run(tiny_vit(), Data())
    assert torch.equal(first.layer(FC1).weight, second.layer(FC1).weight)
    assert first.layer(FC1) is not second.layer(FC1)


@pytest.mark.parametrize(
    ("step", "kind", "text"),
    [
        (
            SaysExact(),
            PassError,
            r"says-exact declares the effect exact, and moved the outputs by .* of the largest output; 1e-04 is",
        ),
        (
            SaysAnalysis(),
            PassError,
            r"says-analysis declares the effect analysis, and moved the outputs by .*0e\+00 is allowed",
        ),
        (Widen(), PassError, r"widen changed the output from \(2, 10\) to \(2, 11\)"),
        (Explode(), PassError, r"explode left a model whose outputs are not finite"),
        (Broken(), PassError, r"broken failed on blocks.0.mlp.fc1: ValueError: singular matrix"),
        (Unfinished(), PassError, r"unfinished failed: TypeError: it returned NoneType; a pass returns a Model"),
    ],
)
def test_a_pass_that_breaks_its_contract_is_an_error(step: Scale, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        PassManager([step]).run(tiny_vit(), Data())


def test_a_mask_is_checked_after_every_later_pass() -> None:
    with pytest.raises(
        MaskError, match=rf"fill \(after nm-mask, nothing\) broke the mask of {FC1}: \d+ weights"
    ) as error:
        PassManager([NMMask(), Nothing(), Fill()]).run(tiny_vit(), Data())
    assert error.value.exit_code == 5


def test_a_failure_names_the_passes_before_it_and_keeps_its_cause() -> None:
    with pytest.raises(PassError, match="broken failed on .* after nm-mask, scale: ValueError") as error:
        PassManager([NMMask(), Scale(), Broken()]).run(tiny_vit(), Data())
    assert isinstance(error.value.__cause__, ValueError)


def test_order_is_checked_before_anything_runs() -> None:
    PassManager([NMMask(), AfterMask()])
    with pytest.raises(UsageError, match="after-mask comes first, and needs nm-mask before it"):
        PassManager([AfterMask(), NMMask()])
    with pytest.raises(UsageError, match="after-mask comes after nothing, and needs nm-mask"):
        PassManager([Nothing(), AfterMask()])


def test_an_edit_of_a_mask_tensor_is_found_and_does_not_reach_the_caller() -> None:
    @dataclass(frozen=True)
    class Tamper(Nothing):
        name: ClassVar[str] = "tamper"

        def __call__(self, model: Model, data: Data) -> Model:
            mask = model.plan[FC1].mask
            assert mask is not None
            mask.fill_(True)
            return model

    model, _ = PassManager([NMMask()]).run(tiny_vit(), Data())
    with pytest.raises(MaskError, match=f"tamper broke the mask of {FC1}: the mask itself is not 2:4"):
        PassManager([Tamper()]).run(model, Data())
    mask = model.plan[FC1].mask
    assert mask is not None
    assert float(mask.float().mean()) == 0.5


def test_a_mask_is_removed_only_with_a_reason() -> None:
    @dataclass(frozen=True)
    class Free(Scale):
        name: ClassVar[str] = "free"
        reason: str | None = "its loss was the largest"

        def __call__(self, model: Model, data: Data) -> Model:
            with torch.no_grad():
                model.layer(FC1).weight.fill_(0.1)
            return model.with_plan({FC1: LayerPlan(skipped=self.reason)})

    _, [_, record] = PassManager([NMMask(), Free()]).run(tiny_vit(), Data())
    assert f"masks removed: {FC1}" in record.notes
    with pytest.raises(MaskError, match=f"removed the mask of {FC1} without a reason; set skipped in the layer's plan"):
        PassManager([NMMask(), Free(reason=None)]).run(tiny_vit(), Data())


def test_replacing_a_masked_layer_breaks_its_mask() -> None:
    @dataclass(frozen=True)
    class Replace(Nothing):
        name: ClassVar[str] = "replace"
        effect: ClassVar[Effect] = Effect.LOSSY

        def __call__(self, model: Model, data: Data) -> Model:
            model.graph.set_submodule("blocks.0.attn.proj", torch.nn.Identity())
            return model

    with pytest.raises(
        MaskError, match=r"replace \(after nm-mask\) broke the mask of blocks.0.attn.proj: the layer is gone"
    ):
        PassManager([NMMask(), Replace()]).run(tiny_vit(), Data())


def test_dropping_the_whole_plan_is_an_error() -> None:
    @dataclass(frozen=True)
    class Forget(Nothing):
        name: ClassVar[str] = "forget"

        def __call__(self, model: Model, data: Data) -> Model:
            return replace(model, plan={})

    with pytest.raises(MaskError, match="forget .*removed the mask of blocks.0.attn.qkv"):
        PassManager([NMMask(), Forget()]).run(tiny_vit(), Data())
