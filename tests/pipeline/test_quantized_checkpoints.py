"""Checkpoints around the pass `quantize`, which changes the graph: a stopped run ends with the same quantizers."""

from pathlib import Path

import pytest
import torch
from checkpoint_runs import MASKS, Count, assert_same, run

from mpcompile.errors import PassError
from mpcompile.ir.quantization import quantizers
from mpcompile.passes import Certify, Quantize
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_cnn, tiny_data, tiny_vit

STEP = Quantize(observer="min-max")
RUN_AGAIN = "run again on resume, with the same result"


@pytest.mark.parametrize("make", [tiny_vit, tiny_cnn])
def test_a_run_that_stopped_behind_quantize_ends_with_the_same_model(make: object, tmp_path: Path) -> None:
    model = make()  # type: ignore[operator]
    whole, records = PassManager([MASKS, STEP, Count(), Certify()]).run(model, tiny_data(model, 32))
    with pytest.raises(PassError, match="stopped here"):
        run(tmp_path / "work", model, [MASKS, STEP, Count(fails=True), Certify()])
    resumed, again = run(tmp_path / "work", model, [MASKS, STEP, Count(), Certify()])
    assert_same(whole, resumed)
    assert [record.resumed for record in again] == [True, True, False, False]
    expected = [record.notes for record in records]
    expected[1] += (RUN_AGAIN,)
    assert [record.notes for record in again] == expected
    before, after = quantizers(whole.graph), quantizers(resumed.graph)
    assert list(before) == list(after)
    for name, quantizer in after.items():
        assert quantizer.calibrated
        assert quantizer.kind == "u8"
        assert torch.equal(quantizer.scale, before[name].scale)
        assert torch.equal(quantizer.zero_point, before[name].zero_point)
    assert resumed.masks().keys() == whole.masks().keys()
    assert resumed.certificate is not None


def test_a_finished_run_is_resumed_with_its_scales_and_certificate(tmp_path: Path) -> None:
    model = tiny_vit()
    first, _ = run(tmp_path / "work", model, [MASKS, STEP, Certify()])
    second, records = run(tmp_path / "work", model, [MASKS, STEP, Certify()])
    assert_same(first, second)
    assert [record.resumed for record in records] == [True, True, True]
    assert RUN_AGAIN in records[1].notes
    for name, scale in first.scales().items():
        assert torch.equal(scale, second.scales()[name])
