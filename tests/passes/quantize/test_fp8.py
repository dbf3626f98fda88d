"""The pass `quantize` in FP8: weights lie on the E4M3 grid of their row, and the file holds them."""

from pathlib import Path

import onnx
import torch

from mpcompile.export.onnx_export import lower
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask, Quantize
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.testing import tiny_data, tiny_vit


def test_weights_are_e4m3_values_times_the_scale_of_their_row(tmp_path: Path) -> None:
    model = tiny_vit()
    passes: list[Pass] = [NMMask(NM(2, 4), criterion="magnitude", refit="none"), Quantize(activations="fp8")]
    result, _ = PassManager(passes).run(model, tiny_data(model, 32))
    scales = result.scales()
    assert scales
    for name, scale in scales.items():
        weight = result.layer(name).weight.detach().double()
        steps = weight / scale.double()[:, None]
        stored = steps.to(torch.float8_e4m3fn).double()
        assert float((steps - stored).abs().max()) < 1e-4
        assert float(stored.abs().max()) <= 448
    file = lower(result, tmp_path / "model.onnx", precision="fp8").onnx
    types = {tensor.data_type for tensor in onnx.load(file).graph.initializer if len(tensor.dims) == 2}
    assert onnx.TensorProto.FLOAT8E4M3FN in types
