"""The table of layers, the verdict, the verdicts of kernels and the MACs agree: each weight counts once."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from torch import Tensor, nn

from mpcompile.analysis.block_macs import charged_from_costs
from mpcompile.analysis.macs import cost
from mpcompile.data.images import Data
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.measure.layer_verdict import LayerVerdict, one_per_weight, tally
from mpcompile.passes import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.report.layer_counts import count_layers, weight_owners
from mpcompile.report.layer_rows import layer_rows
from mpcompile.report.schema import LayerRow
from mpcompile.report.sentences import verdict_on
from mpcompile.runtimes.tensorrt.rules import verdicts_of
from mpcompile.testing import tiny_source


class Tied(nn.Module):
    """One weight in two layers, and one layer called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 32, 4, 4), nn.Linear(32, 10)
        self.a, self.b, self.block = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.stem(x).flatten(2).mean(-1)).relu()).relu()
        for _ in range(3):
            x = x + self.block(x).relu()
        out: Tensor = self.head(x)
        return out


class Encoder(nn.Module):
    """torch's own transformer: its layers start as copies, so that their weights are equal and not shared."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.stem, self.head = nn.Conv2d(1, 16, 8, 8), nn.Linear(16, 10)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))
        return out


def masked(dense: Model) -> Model:
    model, _ = PassManager([NMMask(NM(2, 4), "magnitude", "none")]).run(dense, Data())
    return model


def require_agreement(dense: Model, model: Model, rows: tuple[LayerRow, ...]) -> None:
    """The counts of the table equal those of the distinct weights, and its MACs those of the whole model."""
    counts, owners = count_layers(rows), weight_owners(rows)
    kept = {id(layer.weight): layer.weight for _, layer in model.layers()}
    linear = [row for row in rows if row.kind in ("Linear", "Conv2d", "NonDynamicallyQuantizableLinear")]
    assert count_layers(linear).weights == sum(weight.numel() for weight in kept.values())
    masks = {id(model.layer(name).weight): mask for name, mask in model.masks().items()}
    assert counts.masked == len(masks) > 0
    assert counts.weights - counts.nonzero == sum(int((~mask).sum()) for mask in masks.values())
    assert counts.layers + counts.shared == len(rows)
    assert set(owners) == {row.name for row in rows}
    before, after = cost(dense), cost(model)
    total = charged_from_costs(before, after, model)
    saved = sum(row.macs - row.macs_left for row in rows if row.macs is not None and row.macs_left is not None)
    assert total.dense - total.compressed == pytest.approx(saved)
    assert sum(row.macs or 0 for row in rows) <= total.dense * (1 + 1e-9)
    [sentence] = [text for text in verdict_on(rows, "ort", True, total, None, ()) if "layers are masked" in text]
    assert sentence.startswith(f"{counts.masked} of {counts.layers} layers are masked ({counts.masked} at 2:4).")


@pytest.mark.parametrize(("kind", "layers", "of_them_masked"), [(Tied, 4, 2), (Encoder, 10, 8)])
def test_tied_repeated_and_equal_weights_count_once(
    kind: type[nn.Module], layers: int, of_them_masked: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    dense = capture(kind().eval(), tiny_source())
    model = masked(dense)
    lowered = lower(model, tmp_path / "model.onnx")
    rows = layer_rows(model, lowered, cost(dense), cost(model))
    require_agreement(dense, model, rows)
    counts = count_layers(rows)
    assert (counts.layers, counts.masked) == (layers, of_them_masked)
    verdicts = one_per_weight(verdicts_of(onnx.load(lowered.onnx), lowered.masks), weight_owners(rows))
    assert len(verdicts) == counts.masked
    assert f" of {counts.masked} masked layers" in tally(verdicts)


def test_attention_of_a_module_that_stays_whole_has_macs() -> None:
    """4 D² n for the projections and 2 n² D for the products of each attention, 2 · 32 D n for each MLP."""
    found = cost(capture(Encoder().eval(), tiny_source()))
    d, side = 16, tiny_source().size[1]
    n = (side // 8) ** 2
    assert found.macs == 2 * (4 * d * d * n + 2 * n * n * d + 2 * 32 * d * n) + n * 64 * d + 10 * d
    assert found.layers["encoder.layers.1.self_attn.out_proj"] == d * d * n


NARROW: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 64},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "img_size": 64},
    "beit_base_patch16_224": {"depth": 2, "img_size": 64, "embed_dim": 96, "num_heads": 4},
    "resnet18d": {"channels": (16, 32, 48, 64)},
    "convnextv2_atto": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    "mobilenetv3_small_050": {},
}


@pytest.mark.parametrize("name", NARROW)
def test_counts_agree_on_architectures(name: str) -> None:
    module = timm.create_model(name, **NARROW[name]).eval()
    source = source_of(module, name=name, arch=name, sha256="", arch_args=NARROW[name])
    dense = capture(module, source)
    model = masked(dense)
    unwritten = Lowered(
        onnx=Path("none"), arch=name, image_shape=source.size, precision="fp32", batch=None, model=model, opset=20
    )
    require_agreement(dense, model, layer_rows(model, unwritten, cost(dense), cost(model)))


def verdict(layer: str, chosen: bool | None, eligible: bool | None = True) -> LayerVerdict:
    return LayerVerdict(layer, f"{layer}.weight", "MatMul", "2:4", eligible, "rule", f"it is {chosen}", chosen)


def test_a_weight_runs_on_a_sparse_kernel_only_if_all_its_applications_do() -> None:
    rows = [verdict("a", True), verdict("b", False), verdict("c", True), verdict("c", True), verdict("d", None)]
    found = one_per_weight(rows, {"a": "a", "b": "a", "c": "c"})
    assert [(row.layer, row.chosen) for row in found] == [("a", False), ("c", True), ("d", None)]
    assert found[0].reason == "not all applications of the weight run on a sparse kernel: it is False"
    assert tally(found) == (
        "3 of 3 masked layers are eligible for sparse kernels by the rules; 1 run on them, 1 are unknown."
    )
