"""Fixtures that several files share: the tiny models, the example's files, and one finished output folder."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from kept_registry import keep_registry
from kept_translations import keep_translations
from kernel_trials import shorten_trials
from quantized_runs import MASK, compiled
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import mpcompile
from mpcompile.data.images import Data
from mpcompile.driver.artifact import Artifact
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_cnn, tiny_mlp, tiny_vit

EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion_vit"
# A deadline would measure the machine: what else runs on it, and what a first example imports. The same examples every
# time: a failure is one of the change, and `make fuzz` looks for new ones.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
settings.register_profile(
    "fuzz", deadline=None, max_examples=10_000, print_blob=True
)  # for tests/fuzz alone: make fuzz

LARGE = """
import torch
from mpcompile.testing import TinyMLP

def net():
    torch.manual_seed(0)
    return TinyMLP(pixels=784, width=1024)
"""

# These files run for the longest time, and start first. Two that need the same compiled example do not stand together.
LONG_FILES = (
    "test_build.py", "test_charts.py", "test_resume.py", "test_recipes.py", "test_examples.py", "test_devices.py",
    "test_contract.py", "test_distill_resume.py", "test_quantized_report.py",
)  # fmt: skip

TINY = {"mlp": tiny_mlp, "cnn": tiny_cnn, "vit": tiny_vit}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what takes minutes")


def pytest_configure(config: pytest.Config) -> None:
    """Lets pytest-xdist start the files in the order of the items, not those with the most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Of two processes none should be left alone with a long file at the end.
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(scope="session", autouse=True)
def _short_trials() -> Iterator[None]:
    """The kernel's trials run the fewest rounds: which layers it gets is asked in tests that hand the outcome in."""
    with pytest.MonkeyPatch.context() as patched:
        shorten_trials(patched)
        yield


@pytest.fixture(scope="session", autouse=True)
def _kept_exports() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        keep_registry(patched)
        keep_translations(patched)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """The tiny ViT with 2:4 masks as an ONNX file."""
    [model, _] = PassManager([NMMask(NM(2, 4))]).run(tiny_vit(), Data())
    return lower(model, tmp_path_factory.mktemp("lower") / "model.onnx", metadata={"mpcompile.version": "1"})


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a module `large` with a factory `net`: three layers, 7.4 MB of weights, 8 MB for 1024 × 1024."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "large.py").write_text(LARGE)
    return folder


@pytest.fixture(params=list(TINY))
def tiny(request: pytest.FixtureRequest) -> Model:
    return TINY[request.param]()


@pytest.fixture(scope="session")
def example() -> Path:
    """The folder of the trained example."""
    return EXAMPLE


def compiled_once(factory: pytest.TempPathFactory, name: str, recipe: mpcompile.Recipe) -> Artifact:
    """The trained example by a recipe, compiled by the first of pytest-xdist's processes that asks; each has a copy."""
    mine = factory.mktemp(name)
    shared = factory.getbasetemp() if "PYTEST_XDIST_WORKER" not in os.environ else factory.getbasetemp().parent
    output = shared / f"compiled-{name}"
    with FileLock(shared / f"{name}.lock"):
        if not output.exists():
            mpcompile.compile(EXAMPLE / "model.safetensors", recipe, data=EXAMPLE / "images.npz", output=output)
    return Artifact.open(shutil.copytree(output, mine / "out"))


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The trained example at 2:4, compiled once for every test that only reads it."""
    recipe = mpcompile.Recipe.checked(
        {
            "passes": [{"nm-mask": {"pattern": "2:4"}}],
            "data": {"calibration": 64, "validation": 0, "held_out": 256},
            "bench": {"batches": [1], "seconds": 0.05},
        }
    )
    return compiled_once(tmp_path_factory, "artifact", recipe)


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The trained example through everything that a report tells of but training, on few images."""
    recipe = mpcompile.Recipe.checked(
        {
            "passes": [
                {"mp-budget": {"patterns": ["2:4", "1:4"], "macs": 0.7, "exclude": ["blocks.0.attn.*"]}},
                "permute",
                {"nm-mask": {"criterion": "wanda", "refit": "layer"}},
                {"tome": {"r": 2}},
                "certify",
            ],
            "data": {"calibration": 32, "validation": 0, "held_out": 64},
            "bench": {"batches": [1, 2], "seconds": 0.05},
            "gates": {"max_drop": 50},
        }
    )
    return compiled_once(tmp_path_factory, "reported", recipe)


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ViT of 16 tokens as timm saves one, and images of noise."""
    folder = tmp_path_factory.mktemp("tiny")
    args = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    module = VisionTransformer(num_classes=10, **args)
    module.load_state_dict(tiny_vit().graph.state_dict())
    save_file(module.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": args}
    config["pretrained_cfg"] = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "num_classes": 10}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_{what}": rng.integers(0, high, (128, *shape)).astype(kind)
        for split in ("calibration", "heldout")
        for what, high, shape, kind in (("images", 256, (8, 8), np.uint8), ("labels", 10, (), np.int64))
    }
    np.savez(folder / "images.npz", **arrays)  # type: ignore[arg-type]  # its other keyword is none of these
    return folder / "model.safetensors", folder / "images.npz"


@pytest.fixture(scope="session")
def int8_masked(tiny_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny ViT at 2:4 in int8."""
    return compiled(tiny_files, tmp_path_factory.mktemp("int8-masked") / "out", MASK)


@pytest.fixture(scope="session")
def int8_dense(tiny_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny ViT in int8, without a mask."""
    return compiled(tiny_files, tmp_path_factory.mktemp("int8-dense") / "out")
