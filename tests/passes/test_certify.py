"""Certificates: the margin test never fails, the bound is Clopper–Pearson's, output errors and shares are exact."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError
from mpcompile.frontend.capture import capture
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import Certify, NMMask
from mpcompile.passes.certify import certificate, lower_bound, outputs_and_errors, unchanged
from mpcompile.passes.dense_comparison import attribution, dense_layer, outputs_of
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import TinyMLP, tiny_cnn, tiny_data, tiny_mlp, tiny_source, tiny_vit

LOGITS = npst.arrays(np.float32, (6, 5), elements=st.floats(-100, 100, width=32))


@given(LOGITS, npst.arrays(np.float32, (6, 5), elements=st.floats(-10, 10, width=32)), st.floats(0, 1))
def test_no_proven_prediction_differs(logits: np.ndarray, change: np.ndarray, by: float) -> None:
    before = torch.from_numpy(logits)
    after = before + by * torch.from_numpy(change)
    proven = unchanged(before, after)
    assert torch.equal(before.argmax(1)[proven], after.argmax(1)[proven])
    found = certificate(before, after, 0.95)
    assert found.proven == int(proven.sum()) <= found.agreeing


@pytest.mark.parametrize("trials", [1, 7, 60])
def test_the_bound_is_the_rate_with_a_tail_of_five_per_cent(trials: int) -> None:
    for successes in range(trials + 1):
        p = lower_bound(successes, trials, 0.95)
        # P(Binomial(n, p) ≥ k), summed by hand, is 5 % at the bound.
        tail = sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(successes, trials + 1))
        assert tail == pytest.approx(0.05 if successes else 1.0, abs=1e-9)


def masked(model: Model) -> tuple[Model, Data]:
    data = tiny_data(model)
    return PassManager([NMMask(NM(2, 4))]).run(model, data)[0], data


@pytest.mark.parametrize("make", [tiny_mlp, tiny_cnn, tiny_vit])
def test_output_errors_are_those_of_the_dense_layer_on_the_pruned_inputs(make: object) -> None:
    result, data = masked(make())  # type: ignore[operator]
    assert result.dense is not None
    with torch.no_grad():
        outputs, errors = outputs_and_errors(result, data.held_out)
        assert torch.equal(outputs, outputs_of(result.graph, data.held_out))
        # Masked layers, and the dense layers that were refitted.
        assert set(errors) == {name for name, plan in result.plan.items() if plan.relative_error is not None}
        assert set(result.masks()) <= set(errors)
        for name, error in errors.items():
            found: dict[str, torch.Tensor] = {}
            layer = result.layer(name)
            handle = layer.register_forward_hook(lambda m, args, y, found=found: found.update(x=args[0], y=y))
            result.graph(data.held_out.first(len(data.held_out)))
            handle.remove()
            old = result.dense.get_submodule(name)
            wanted = (old(found["x"]) - found["y"]).abs().flatten(1).amax(1)
            torch.testing.assert_close(error, wanted, rtol=1e-3, atol=1e-5)


def test_shares_sum_to_one_for_a_small_change() -> None:
    result, data = masked(tiny_vit())
    assert result.dense is not None
    near = replace(result)
    with torch.no_grad():  # a hundredth of the way: there the logits are linear in the weights
        for (_, value), (_, old) in zip(near.graph.named_parameters(), result.dense.named_parameters(), strict=True):
            value.copy_(old + 0.01 * (value - old))
    shares = attribution(near, data.held_out)
    assert sum(shares.values()) == pytest.approx(1, abs=0.02)


def test_changed_batch_norm_statistics_have_a_share() -> None:
    """If only batch-norm statistics change, and only a little, the shares still sum to 1."""
    model = tiny_cnn()
    data = tiny_data(model)
    moved, _ = PassManager([NMMask(NM(2, 4))]).run(model, data)
    assert moved.dense is not None
    with torch.no_grad():
        for (_, value), (_, old) in zip(moved.graph.named_parameters(), moved.dense.named_parameters(), strict=True):
            value.copy_(old)
        moved.graph.get_buffer("norm.running_mean").add_(0.01)
        moved.graph.get_buffer("norm.running_var").mul_(1.01)
    shares = attribution(moved, data.held_out)
    assert list(shares) == ["norm"]
    assert shares["norm"] == pytest.approx(1, abs=0.02)


def test_the_only_changed_layer_has_the_whole_share() -> None:
    model = tiny_mlp()
    data = tiny_data(model)
    result, _ = PassManager([NMMask(NM(2, 4), include=("head",), exclude=("stem", "hidden"))]).run(model, data)
    # The head is last and linear: its share is exact.
    assert attribution(result, data.held_out) == pytest.approx({"head": 1.0}, abs=1e-4)


def test_there_is_a_certificate_only_if_no_lossy_pass_follows() -> None:
    model = tiny_mlp()
    data = tiny_data(model)
    result, _ = PassManager([NMMask(NM(2, 4)), Certify()]).run(model, data)
    assert result.certificate is not None
    assert result.certificate.images == len(data.held_out)
    early, _ = PassManager([NMMask(NM(2, 4)), Certify(), NMMask()]).run(model, data)
    assert early.certificate is None
    plain, _ = PassManager([Certify()]).run(model, data)
    assert plain.certificate is None  # no lossy pass came before it


def test_the_critical_amplification_is_the_largest_that_the_theorem_allows() -> None:
    model = tiny_mlp()
    data = tiny_data(model)
    result, _ = PassManager([NMMask(NM(2, 4), "magnitude", "none"), Certify(weight_decay=0.1, l1=0.01)]).run(
        model, data
    )
    assert result.certificate is not None
    assert result.dense is not None
    [row] = result.certificate.layers
    removed = (result.dense.get_parameter("hidden.weight") - result.layer("hidden").weight).detach()
    saved = 0.1 * removed.square().sum() + 0.01 * removed.abs().sum()  # the paper's form, for a mask without refit
    budget = 2 * row.reach  # with L = 1
    assert row.critical is not None
    assert row.critical * budget == pytest.approx(float(saved), rel=1e-4)


def test_one_logit_is_certified_at_its_threshold() -> None:
    model = capture(TinyMLP(outputs=1), tiny_source())
    result, _ = PassManager([NMMask(NM(1, 16)), Certify()]).run(model, data := tiny_data(model))
    assert result.dense is not None
    assert result.certificate is not None
    with torch.no_grad():
        before, after = (outputs_of(graph, data.held_out) for graph in (result.dense, result.graph))
    assert result.certificate.head == "sigmoid"
    assert result.certificate.agreeing == int(((before > 0) == (after > 0)).sum())
    assert result.certificate.proven == int((before.abs() > (before - after).abs()).sum())


def test_outputs_without_a_decision_for_each_image_have_a_note_and_no_certificate() -> None:
    class Maps(TinyMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).reshape(-1, 5, 2)  # type: ignore[no-any-return]

    model = capture(Maps(), tiny_source())
    for head, reason in ((None, "has no decision that could be proven"), (Head(), "not for positions")):
        headed = replace(model, head=head)
        result, records = PassManager([NMMask(NM(2, 4)), Certify()]).run(headed, tiny_data(model))
        assert result.certificate is None
        assert reason in records[-1].notes[-1]
    with pytest.raises(UsageError, match="confidence is 1.5"):
        Certify(confidence=1.5)


def test_outputs_of_all_images() -> None:
    model = tiny_mlp()
    data = tiny_data(model, 70)
    with torch.no_grad():
        found = outputs_of(model.graph, data.held_out)
    torch.testing.assert_close(found, model(data.held_out.first(70)), rtol=1e-5, atol=1e-6)


def test_a_layer_that_the_dense_model_lacks_is_refused() -> None:
    model = tiny_mlp()
    masked, _ = PassManager([NMMask(criterion="magnitude", refit="none")]).run(model, Data())
    masked.graph.add_module("later", torch.nn.Linear(3, 3))
    with pytest.raises(
        PassError, match="the dense model has no layer later with this weight shape, so a pass rebuilt the layer"
    ):
        dense_layer(masked, "later")
