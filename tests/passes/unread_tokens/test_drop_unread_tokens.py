"""The pass drop-unread-tokens: which models it narrows, what it says, and how it goes with the other passes."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from quantized_models import LANES
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mpcompile.analysis.block_macs import charged
from mpcompile.analysis.macs import cost
from mpcompile.data.images import Data
from mpcompile.errors import UsageError
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import DropUnreadTokens, NMMask, Permute, Quantize, ScaleMigration, ToMe
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.pipeline.pass_record import PassRecord
from mpcompile.testing import assert_same_function, tiny_cnn, tiny_data, tiny_source, tiny_vit

# float32: the same operators on fewer rows, whose kernels may add in another order. One product's rounding is below
# 1e-6 of the outputs; a wrong token moves them by more than 1e-2.
ROUNDING = 1e-5
SIZES = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(kind: type[nn.Module] = VisionTransformer, **options: object) -> Model:
    torch.manual_seed(0)
    module = kind(**SIZES, **options).eval()
    for parameter in module.parameters():  # class and distillation tokens start at zero
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.5)
    return capture(module, tiny_source())


def run(model: Model, *steps: Pass, data: Data | None = None) -> tuple[Model, tuple[PassRecord, ...]]:
    return PassManager(steps).run(model, data or Data())


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("model", "read"),
    [
        (vit(), "1 of 17 tokens are read after the last attention: 4 layers and products compute only these"),
        (vit(VisionTransformerDistilled), "2 of 18 tokens are read"),
        (vit(reg_tokens=4), "1 of 21 tokens are read"),
        (vit(qk_norm=True, init_values=0.5), "1 of 17 tokens are read"),
    ],
    ids=["class token", "distilled", "registers", "qk norm and layer scale"],
)
def test_a_class_token_is_computed_alone(model: Model, read: str) -> None:
    dropped, [record] = run(model, DropUnreadTokens())
    assert_same_function(model.graph, dropped.graph, images(), ROUNDING)  # another batch size than the example's
    [note] = record.notes
    assert note.startswith(read)
    before, after = cost(model), cost(dropped)
    assert note.endswith(f", which saves {100 * (1 - after.macs / before.macs):.1f} % of the MACs")
    tokens = int(read.split()[2])
    count = int(read.split()[0])
    for layer in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        assert after.layers[f"blocks.1.{layer}"] == before.layers[f"blocks.1.{layer}"] * count / tokens
        assert after.layers[f"blocks.0.{layer}"] == before.layers[f"blocks.0.{layer}"]
    assert after.layers["blocks.1.attn.qkv"] == before.layers["blocks.1.attn.qkv"]  # keys and values need all tokens


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (vit(global_pool="avg"), r"getitem_\d+ reads 16 of the 17 tokens after blocks.1.attn"),
        (vit(global_pool="avg", class_token=False), "mean reads all 16 tokens after blocks.1.attn"),
        (vit(global_pool="map", class_token=False), "attn_pool is the last operator on all tokens"),
        (tiny_cnn(), "no attention was found in the graph"),
    ],
    ids=["average without class token", "average", "attention pooling", "convolutions"],
)
def test_where_all_tokens_are_read_nothing_changes_and_the_note_says_why(model: Model, reason: str) -> None:
    code = model.graph.code
    dropped, [record] = run(model, DropUnreadTokens())
    assert dropped.graph.code == code
    assert record.drift == 0.0
    [note] = record.notes
    assert re.fullmatch(f"no tokens dropped: {reason}", note)


def test_a_second_run_finds_nothing_more() -> None:
    once, _ = run(tiny_vit(), DropUnreadTokens())
    code = once.graph.code
    twice, [record] = run(once, DropUnreadTokens())
    assert twice.graph.code == code
    assert record.notes == ("no tokens dropped: blocks.1.attn is the last operator on all tokens",)


@pytest.mark.parametrize("kind", [VisionTransformer, VisionTransformerDistilled])
@pytest.mark.parametrize("r", [2, (2, 3), (0, 4)])
def test_token_merging_gives_the_same_logits_with_it(kind: type[nn.Module], r: int | tuple[int, ...]) -> None:
    """A merge after the last attention moves no token that is read, so it is left out."""
    model = vit(kind)
    merged, _ = run(model, ToMe(r=r))
    both, _ = run(model, DropUnreadTokens(), ToMe(r=r))
    assert_same_function(merged.graph, both.graph, images(), ROUNDING)
    costs = charged(model, merged), charged(model, both)
    assert costs[1].compressed < costs[0].compressed
    assert costs[1].merged == (costs[0].merged[0], 0)


def test_a_searched_schedule_merges_nothing_after_the_last_attention() -> None:
    model = tiny_vit()
    both, _ = run(model, DropUnreadTokens(), ToMe(r="auto", macs=0.8, images=16), data=tiny_data(model))
    merged = charged(model, both).merged
    assert merged[0] > 0
    assert merged[1] == 0


def test_masks_and_permutation_are_those_without_it() -> None:
    """Without calibration images, a mask depends on weights alone; the token count must not matter to channels."""
    model, steps = tiny_vit(), (Permute(pattern=NM(2, 4)), NMMask(NM(2, 4)))
    (alone, _), (with_it, _) = run(model, *steps), run(model, DropUnreadTokens(), *steps)
    assert alone.masks().keys() == with_it.masks().keys()
    assert all(torch.equal(mask, with_it.masks()[name]) for name, mask in alone.masks().items())
    assert_same_function(alone.graph, with_it.graph, images(), ROUNDING)


def test_the_file_computes_only_the_read_token(tmp_path: Path) -> None:
    model = tiny_vit()
    dropped, _ = run(model, DropUnreadTokens())
    exported = lower(dropped, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(exported.onnx))
    x = images()
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-4)  # ONNX Runtime's GELU and softmax round differently
    assert rows_of_last_mlp(exported.onnx) == 1
    assert rows_of_last_mlp(lower(model, tmp_path / "whole.onnx").onnx) == 17


def rows_of_last_mlp(path: Path) -> int:
    """The tokens in the last tensor of an ONNX file that has the MLP's 128 channels."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = [[size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.value_info]
    [*_, rows] = [int(shape[1]) for shape in shapes if len(shape) == 3 and shape[-1] == 128]
    return rows


def test_quantized_layers_see_the_tokens_that_are_read(tmp_path: Path) -> None:
    model = tiny_vit()
    data = tiny_data(model)
    quantized, _ = run(model, DropUnreadTokens(), ScaleMigration(), Quantize(lanes=LANES), data=data)
    assert cost(quantized).layers["blocks.1.mlp.fc1"] == cost(model).layers["blocks.1.mlp.fc1"] / 17
    exported = lower(quantized, tmp_path / "model.onnx", precision="int8")
    session = ort.InferenceSession(str(exported.onnx))
    x = images()
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # Several activations lie at the border of two 8-bit values and are rounded the other way in another kernel.
    assert np.abs(found - quantized(x).numpy()).max() < 0.05 * np.abs(found).max()


def test_after_a_lossy_pass_it_is_refused() -> None:
    with pytest.raises(UsageError, match="drop-unread-tokens comes after a lossy pass; put it before"):
        run(tiny_vit(), NMMask(), DropUnreadTokens())
