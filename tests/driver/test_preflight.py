"""What can be known before any work is refused before it, by `compile` and by `preview` (--dry-run) alike."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mpcompile.data.images import Data
from mpcompile.driver.compile import compile, preview
from mpcompile.errors import MpcompileError, PassError, ResourceError, UsageError
from mpcompile.passes.nm_mask.nm_mask import NMMask
from mpcompile.recipe.schema import Recipe
from mpcompile.testing import TinyMLP, tiny_data, tiny_mlp

MASK = {"nm-mask": {"pattern": "2:4", "criterion": "magnitude", "refit": "none"}}


def recipe(*passes: Any, **more: Any) -> Recipe:
    return Recipe.checked({"passes": [MASK, *passes], **more})


def module(kind: Callable[[], nn.Module]) -> Any:
    made: Any = kind()
    made.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.25,)}
    return made


def vit() -> Any:
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=10)


@pytest.mark.parametrize(
    ("kind", "given", "data", "error", "text"),
    [
        (
            TinyMLP,
            recipe({"distill": {"batch": 4096}}),
            True,
            PassError,
            r"distill cannot run: \d+ training images do not fill a batch of 4096",
        ),
        (TinyMLP, recipe("distill"), False, PassError, "distill cannot run: distillation needs training images"),
        (
            TinyMLP,
            recipe({"restore": {"max_shift": 0.1}}),
            False,
            PassError,
            "restore cannot run: max_drop and max_shift",
        ),
        (TinyMLP, recipe({"tome": {"r": 2}}), False, PassError, "tome cannot run: the graph has no self-attention"),
        (
            vit,
            recipe({"tome": {"r": [0, 0, 0, 0, 0]}}),
            False,
            UsageError,
            "tome cannot run: tome: r has 5 numbers",
        ),
        (
            TinyMLP,
            Recipe.checked({"passes": [{"mp-budget": {"macs": 0.2}}, "nm-mask"]}),
            False,
            PassError,
            "0.2 of the multiply-accumulates cannot be reached",
        ),
        (
            TinyMLP,
            Recipe.checked({"passes": [{"mp-budget": {"macs": 0.95, "signal": "owl"}}, "nm-mask"]}),
            False,
            PassError,
            "the signal owl needs calibration images",
        ),
        (
            TinyMLP,
            recipe("quantize"),
            True,
            UsageError,
            "precision fp32 cannot hold its 8-bit weights; give --",
        ),
        (TinyMLP, recipe(precision="int8"), True, UsageError, "has precision int8 and no pass quantize; add quantize"),
        (
            TinyMLP,
            recipe("quantize", precision="int8"),
            False,
            UsageError,
            "precision int8 needs images, .*; give --",
        ),
        (
            TinyMLP,
            recipe("quantize", precision="int8", opset=20),
            True,
            UsageError,
            "opset 20 is too early for int8, which needs opset 21",
        ),
        (
            TinyMLP,
            recipe({"quantize": {"activations": "fp8"}}, precision="int8"),
            True,
            UsageError,
            "activations is fp8, and the recipe has precision int8; leave activations out",
        ),
        (
            TinyMLP,
            recipe({"quantize": {"activations": "s8"}}, precision="int8"),
            True,
            UsageError,
            "activations is s8, and the int8 kernels of target ort take u8; set activations to u8",
        ),
        (
            TinyMLP,
            recipe("quantize", "restore", precision="int8"),
            True,
            UsageError,
            "restore comes after quantize and would change weights",
        ),
        (TinyMLP, recipe(gates={"max_drop": 1.0}), False, UsageError, "a gate on accuracy .* needs labelled images"),
        (TinyMLP, recipe(tune={"evaluations": 2}), True, UsageError, "tune needs a limit on the loss of accuracy"),
    ],
)
def test_refused_before_any_mask_is_made(
    kind: Callable[[], nn.Module],
    given: Recipe,
    data: bool,
    error: type[MpcompileError],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unexpected(*arguments: object) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setattr(NMMask, "__call__", unexpected)
    images: Data | None = tiny_data(tiny_mlp()) if data else None
    with pytest.raises(error, match=text):
        preview(module(kind), given, images)
    with pytest.raises(error, match=text):
        compile(module(kind), given, data=images, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_full_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcompile.driver.preflight.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match="the disk is too full: 1.0 kB are left .* takes at least 41.6 kB"):
        preview(module(TinyMLP), recipe(), output=tmp_path / "out")
    with pytest.raises(ResourceError, match="the disk is too full"):
        compile(module(TinyMLP), recipe(), output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_output_folder_is_checked_by_a_preview(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a folder; name another folder with --output"):
        preview(module(TinyMLP), recipe(), output=tmp_path / "file")
    with pytest.raises(UsageError, match=r"cannot be used \(File name too long\); name another with --output"):
        preview(module(TinyMLP), recipe(), output=tmp_path / ("x" * 300))
