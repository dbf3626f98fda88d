"""Runs with the pass quantize that stop and resume from checkpoints give the model of an unbroken run."""

from pathlib import Path

import pytest
import torch
from checkpoint_runs import MASKS, Count, assert_same
from checkpoint_runs import run as run_with_checkpoints
from quantize_runs import PLAIN

from mpcompile.errors import PassError
from mpcompile.ir.quantization import quantizers
from mpcompile.passes import Quantize
from mpcompile.pipeline.pass_manager import Pass
from mpcompile.testing import tiny_cnn, tiny_vit


@pytest.mark.parametrize("step", [PLAIN, Quantize(), Quantize("fp8", "all")], ids=["min-max", "best", "fp8"])
def test_a_resumed_run_gives_the_same_model(tmp_path: Path, step: Quantize) -> None:
    def passes(fails: bool) -> list[Pass]:
        return [MASKS, step, Count(fails=fails)]

    whole, _ = run_with_checkpoints(tmp_path / "whole", tiny_cnn(), passes(fails=False))
    with pytest.raises(PassError, match="stopped here"):
        run_with_checkpoints(tmp_path / "run", tiny_cnn(), passes(fails=True))
    resumed, records = run_with_checkpoints(tmp_path / "run", tiny_cnn(), passes(fails=False))
    assert [record.resumed for record in records] == [True, True, False]
    # Nodes cannot be restored from tensors, so the pass runs again.
    assert records[1].notes[-1] == "run again on resume, with the same result"
    assert_same(whole, resumed)
    for name, module in quantizers(whole.graph).items():
        other = quantizers(resumed.graph)[name]
        assert (module.kind, module.calibrated) == (other.kind, other.calibrated) == (step.activations, True)
        assert torch.equal(module.scale, other.scale)
        assert torch.equal(module.zero_point.float(), other.zero_point.float())


def test_a_later_pass_is_loaded_after_quantize(tmp_path: Path) -> None:
    first, last = Count("first"), Count("last", fails=True)
    with pytest.raises(PassError, match="stopped here"):
        run_with_checkpoints(tmp_path / "run", tiny_vit(), [PLAIN, first, last])
    again = Count("first")
    whole, records = run_with_checkpoints(tmp_path / "run", tiny_vit(), [PLAIN, again, Count("last")])
    assert [record.resumed for record in records] == [True, True, False]
    assert again.calls == []
    assert whole.scales()
