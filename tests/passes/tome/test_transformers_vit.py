"""Token merging on ViT and DeiT of transformers equals that on timm's with the same weights."""

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mpcompile.analysis.block_macs import merges
from mpcompile.data.images import Data
from mpcompile.frontend.capture import capture, noise
from mpcompile.ir.model import Model
from mpcompile.ir.source import Source
from mpcompile.passes import ToMe
from mpcompile.pipeline.pass_manager import PassManager

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'mpcompile[hf]'")

SHAPE = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 192}
TIMM = {"img_size": 64, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm.": "norm.",
    "layers.": "blocks.",
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
    "classifier": "head",
}
ROUNDING = 1e-5  # one product for query, key and value, or three: sums of 48 terms in float32 in another order


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' ViT or DeiT under timm's names; query, key and value in one matrix."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.partition(".")[2] if name.startswith(("vit.", "deit.")) else name
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    for name in [name for name in renamed if ".attention.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        renamed[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return renamed


def merged(module: torch.nn.Module, schedule: Any) -> tuple[Model, Model]:
    model = capture(module, Source(name="vit", sha256="", arch="vit", size=(3, 64, 64)))
    result, _ = PassManager([ToMe(r=schedule)]).run(model, Data())
    return model, result


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
@pytest.mark.parametrize("schedule", [4, (6, 3, 0)])
def test_merging_equals_that_of_timm(kind: str, schedule: Any) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SHAPE, image_size=64, patch_size=8, num_labels=10, layer_norm_eps=1e-6
    )
    name = {"ViT": "ViTForImageClassification", "DeiT": "DeiTForImageClassificationWithTeacher"}[kind]
    theirs = getattr(transformers, name)(config).eval()
    with torch.no_grad():  # class, position and distillation embeddings begin as zeros
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    arch = {"ViT": "vit_tiny_patch16_224", "DeiT": "deit_tiny_distilled_patch16_224"}[kind]
    ours = timm.create_model(arch, **TIMM).eval()
    ours.load_state_dict(timm_names(theirs.state_dict()))

    (dense, hugging_face), (_, reference) = merged(theirs, schedule), merged(ours, schedule)
    expected = merges(reference.graph, reference.example_inputs)
    assert any(expected)
    assert merges(hugging_face.graph, hugging_face.example_inputs) == expected
    images = noise((3, 64, 64), batch=5, seed=3)
    wanted = reference(images)
    size = wanted.abs().max()
    assert (hugging_face(images) - wanted).abs().max() <= ROUNDING * size
    assert (dense(images) - wanted).abs().max() > 1e-3 * size  # merging does change the outputs
