"""Which architectures can be traced, and how many of their layers can be masked -> results/capture.{json,md}.

    python benchmarks/capture.py [NAME …]

Weights are random, since tracing does not depend on them. Each model is captured twice from the same instance. A model
counts as captured if both graphs give the model's outputs on two batches of different sizes, and if capturing leaves
the model's state and attributes unchanged.
"""

import gc
import sys
import time
import warnings
from typing import Any

import timm
import torch
import torchvision
from lib.common import RESULTS, markdown, write
from torch import nn

from mpcompile.analysis.eligibility import eligible
from mpcompile.errors import MpcompileError
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Source
from mpcompile.ir.pattern import NM
from mpcompile.system.hashing import state_sha256

SCRIPT = "benchmarks/capture.py"
TIMM = """
vit_tiny_patch16_224 vit_base_patch16_224 vit_base_patch16_clip_224 vit_base_patch16_siglip_224
vit_relpos_small_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 flexivit_small beit_base_patch16_224
beitv2_base_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224 convit_tiny crossvit_tiny_240
xcit_nano_12_p16_224 volo_d1_224 tnt_s_legacy_patch16_224 visformer_tiny swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 hiera_tiny_224 pvt_v2_b0 twins_pcpvt_small davit_tiny focalnet_tiny_srf
maxvit_nano_rw_256 coatnet_0_rw_224 levit_128s efficientvit_b0 efficientvit_m0 mobilevit_xxs fastvit_t8
edgenext_xx_small poolformer_s12 mixer_s32_224 gmlp_s16_224 resmlp_12_224 convnext_atto convnextv2_atto
inception_next_atto resnet18 resnet50 resnet50d resnetv2_50 nfnet_f0 regnetx_002 regnety_002 efficientnet_b0
tf_efficientnet_lite0 tf_efficientnetv2_b0 mobilenetv3_small_100 mobilenetv4_conv_small ghostnet_100
rexnet_100 repvgg_a0 densenet121 inception_v3 vgg11 hrnet_w18_small tresnet_m nest_tiny sequencer2d_s
mvitv2_tiny gcvit_xxtiny repvit_m0_9 tiny_vit_5m_224 samvit_base_patch16 naflexvit_base_patch16_gap
"""
TORCHVISION = """
vit_b_16 swin_t swin_v2_t maxvit_t convnext_tiny resnet18 regnet_y_400mf efficientnet_b0 mobilenet_v3_small
mnasnet0_5 shufflenet_v2_x0_5 squeezenet1_0 googlenet densenet121
segmentation.lraspp_mobilenet_v3_large detection.ssdlite320_mobilenet_v3_large
"""


def build(name: str) -> tuple[nn.Module, Source]:
    """Returns a model with random weights, and its Source; `name` is LIBRARY/ARCHITECTURE."""
    library, _, arch = name.partition("/")
    if library == "timm":
        # Smaller images than the default of these models: the trace does not depend on their size.
        args = {"img_size": 112} if "dinov2" in arch else {"img_size": 256} if "samvit" in arch else {}
        module: nn.Module = timm.create_model(arch, **args)
        return module, source_of(module, name=name, arch=arch, sha256="", arch_args=args)
    family, _, arch = arch.rpartition(".")
    if family:  # segmentation and detection models would download weights for their backbone
        module = getattr(getattr(torchvision.models, family), arch)(weights=None, weights_backbone=None)
    else:
        module = getattr(torchvision.models, arch)(weights=None)
    return module, Source(name=name, sha256="", arch=arch)


def attempt(name: str) -> dict[str, Any]:
    """Captures one architecture and returns its row; `reason` is the error if it cannot be captured."""
    torch.manual_seed(0)
    started = time.perf_counter()
    row: dict[str, Any] = {"name": name, "captured": False, "reason": None}
    try:
        module, source = build(name)
        before, attributes = state_sha256(module), {n: sorted(vars(m)) for n, m in module.named_modules()}
        capture(module, source)
        model = capture(module, source)
    except (MpcompileError, RuntimeError) as error:
        return row | {"reason": " ".join(str(error).split())}
    unchanged = state_sha256(module) == before and {n: sorted(vars(m)) for n, m in module.named_modules()} == attributes
    verdicts = eligible(model, NM(2, 4))
    weights = {layer: model.layer(layer).weight.numel() for layer, _ in model.layers()}
    masked = sum(weights[layer] for layer, reason in verdicts.items() if reason is None)
    return row | {
        "captured": unchanged,
        "reason": None if unchanged else "capturing changed the model",
        "parameters": sum(p.numel() for p in module.parameters()),
        "layers": len(verdicts),
        "eligible_2_4": sum(reason is None for reason in verdicts.values()),
        "eligible_share_of_parameters": round(masked / sum(p.numel() for p in module.parameters()), 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Writes both results files; with names as arguments, only prints the rows of these architectures."""
    warnings.simplefilter("ignore")  # timm's and torchvision's deprecations
    names = sys.argv[1:] or [*(f"timm/{n}" for n in TIMM.split()), *(f"torchvision/{n}" for n in TORCHVISION.split())]
    rows = []
    for name in names:
        rows.append(attempt(name))
        print(rows[-1], flush=True)
        gc.collect()
    if sys.argv[1:]:
        return
    question = "Which architectures can be traced, and how many of their layers can be masked at 2:4?"
    write("capture", question, "cpu", ("torch", "torchvision", "timm"), rows)
    captured = sum(row["captured"] for row in rows)
    table = markdown(
        ("architecture", "captured", "layers", "eligible for 2:4", "their share of all parameters", "reason"),
        [
            (
                row["name"],
                "yes" if row["captured"] else "**no**",
                str(row.get("layers", "")),
                str(row.get("eligible_2_4", "")),
                f"{row['eligible_share_of_parameters']:.1%}" if row["captured"] else "",
                (row["reason"] or "").replace("|", "\\|"),
            )
            for row in rows
        ],
    )
    text = f"# Capture\n\n{captured} of {len(rows)} architectures can be traced. Source: `{SCRIPT}`.\n\n{table}"
    (RESULTS / "capture.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
