"""Small int8 ONNX files, quantised by hand, with and without masks, for tests of several folders."""

from pathlib import Path

from quantized_models import quantised_by_hand

from mpcompile.data.images import Data
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_vit

VIT = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def int8_vit(folder: Path, pattern: str | None = "2:4", batch: int | None = None) -> Lowered:
    """The tiny ViT in int8, with 8 quantised products and 2 attentions; dense without a pattern."""
    return in_int8(tiny_vit(), VIT, folder, pattern, batch)


def in_int8(
    model: Model, layers: list[str], folder: Path, pattern: str | None = "2:4", batch: int | None = None
) -> Lowered:
    """A model with these layers in int8, masked if there is a pattern."""
    if pattern:
        model, _ = PassManager([NMMask(NM.parse(pattern))]).run(model, Data())
    quantised = quantised_by_hand(model, layers, largest=127)  # saturates in 16 bits
    return lower(quantised, folder / "model.onnx", precision="int8", batch=batch)
