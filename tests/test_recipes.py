"""The recipes of examples/recipes on the architectures that they are for, with random weights."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch

import mpcompile
from mpcompile.analysis.block_macs import charged
from mpcompile.analysis.charged import Charged
from mpcompile.data.images import Data, Split
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.run_plan import plan_of
from mpcompile.export.mask_check import METADATA_KEY
from mpcompile.frontend.capture import noise
from mpcompile.frontend.load_model import Request
from mpcompile.frontend.preprocessing import source_of
from mpcompile.frontend.recorder import record
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.measure.timing import ROUNDS
from mpcompile.passes import NMMask, Permute, ToMe
from mpcompile.recipe.schema import Recipe, Step, read_recipe
from mpcompile.runtimes import native
from mpcompile.testing import Noise

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


@dataclass(frozen=True)
class Row:
    """A headline row of arXiv 2606.02608, and what its recipe comes to.

    `masked` of `layers` layers have the pattern. `dense` and `left` are multiply-accumulates in G, `saved` is the share
    that is saved, `published` the same as the paper counts. `args` and `small` are arguments of the architecture, the
    second for a model of all the kinds of layers, few of each and narrow, on images of SIDE pixels.
    """

    pattern: str
    masked: int
    layers: int
    dense: float
    left: float
    saved: float
    published: float
    args: dict[str, Any]
    small: dict[str, Any]

    @property
    def has_kernel(self) -> bool:
        """Sparse tensor cores know one pattern."""
        return self.pattern == "2:4"


SIDE = 96
# With the norms that timm starts at zero, a convolution would be all zeros in the file, and its mask prove nothing.
NOT_ZERO: dict[str, Any] = {"zero_init_last": False}
VIT: dict[str, Any] = {"img_size": SIDE, "embed_dim": 192, "num_heads": 3, "num_classes": 10}
# Every layer has two groups of 16 input channels or more, so that permute has something to exchange.
RESNET: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [32, 32, 64, 64], "num_classes": 10}
CONVNEXT: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [32, 32, 64, 64], "num_classes": 10}
ROWS = {
    "vit_b16_2x4_tome": Row("2:4", 48, 50, 17.5638, 6.8329, 0.6110, 0.5981, {}, {"depth": 2, **VIT}),
    "vit_b16_6x12": Row("6:12", 48, 50, 17.5638, 9.1978, 0.4763, 0.4763, {}, {"depth": 1, **VIT}),
    "vit_l16_8x16": Row("8:16", 96, 98, 61.5547, 31.8087, 0.4832, 0.4832, {}, {"depth": 1, **VIT}),
    "convnextv2_b_12x16": Row("12:16", 72, 113, 15.3547, 11.6554, 0.2409, 0.2409, {}, CONVNEXT),
    "resnet50_8x16": Row("8:16", 52, 54, 4.0892, 2.1046, 0.4853, 0.4853, NOT_ZERO, RESNET),
    "resnet152d_2x4": Row("2:4", 156, 158, 15.3506, 7.6834, 0.4995, 0.4995, NOT_ZERO, RESNET),
}
# Small, their layers and passes are those of another row: ViT-B at 6:12, and ResNet152d but for its stem.
COVERED = ("vit_l16_8x16", "resnet50_8x16")
ROUNDED = 5e-5  # shares are given in hundredths of a per cent, G in four digits behind the point


def path_of(name: str) -> Path:
    return RECIPES / f"{name}.yaml"


def runnable(recipe: Recipe, without: tuple[str, ...] = ()) -> Recipe:
    """The recipe for ONNX Runtime in float32, without some of its passes, its search for orders and its timing short.

    The target trt needs a GPU to run what it builds; float16 on a CPU takes many times as long as float32.
    """
    steps = [step for step in recipe.passes if step.name not in without]
    quick = [
        Step(name=step.name, params={**step.params, "sweeps": 1}) if step.name == "permute" else step for step in steps
    ]
    changes = {"passes": [step.model_dump() for step in quick], "target": "ort", "precision": "fp32"}
    return Recipe.checked({**recipe.model_dump(mode="json"), **changes, "bench": {"batches": [1], "seconds": 0.05}})


def model_of(name: str) -> str:
    """The model in the command that the recipe begins with."""
    [command] = re.findall(r"^#   mpcompile (timm:\S+)", path_of(name).read_text(encoding="utf-8"), re.MULTILINE)
    return str(command)


def request(name: str, **args: Any) -> Request:
    """The model of a recipe, with random weights."""
    return Request(model_of(name), arch_args={**ROWS[name].args, **args})


def traced(name: str, device: str) -> Model:
    """The model of a recipe at full size; on the device `meta` its tensors have shapes and no values."""
    arch = model_of(name).removeprefix("timm:")
    with torch.device(device):
        module = timm.create_model(arch, **ROWS[name].args).eval()
    source = source_of(module, name=arch, arch=arch, sha256="")
    images = noise(source.size, 1).to(device)
    recorder, outputs = record(module, {"images": images}, lambda: module(images))
    return Model(recorder.finished([outputs]), images, source)


def counted(name: str) -> tuple[Model, Model]:
    """The dense model and the one after the recipe's masks and merges, both at full size.

    Counts follow from shapes, so there are values only where tokens are merged, which tries the model on images.
    Reordering channels, left out here, changes no count.
    """
    steps = plan_of(runnable(read_recipe(path_of(name)))).passes
    [mask] = [step for step in steps if isinstance(step, NMMask)]
    result = mask(traced(name, "meta"), Data())
    for step in steps:
        if isinstance(step, ToMe):
            result = step(traced(name, "cpu"), Data()).with_plan(result.plan)
    return traced(name, "meta"), result


def some_images(count: int) -> Data:
    """Noise without labels, to compare models on."""
    return Data(held_out=Split(Noise((3, SIDE, SIDE), count), tuple(range(count)), labelled=False))


def test_there_is_one_for_each_headline_row() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_each_is_read_and_resolved(name: str) -> None:
    recipe = read_recipe(path_of(name))
    assert (recipe.target, recipe.precision) == ("trt", "fp16")
    passes = plan_of(runnable(recipe)).passes
    [mask] = [step for step in passes if isinstance(step, NMMask)]
    assert str(mask.pattern) == ROWS[name].pattern
    assert all(step.pattern == mask.pattern for step in passes if isinstance(step, Permute))
    assert [step.r for step in passes if isinstance(step, ToMe)] == ([8] if name.endswith("tome") else [])


@pytest.mark.parametrize("name", ROWS)
def test_passes_that_need_images_can_be_put_in(name: str) -> None:
    text = path_of(name).read_text(encoding="utf-8")
    whole = Recipe.from_yaml(text.replace("  # - ", "  - "))
    added = {step.name for step in whole.passes} - {step.name for step in Recipe.from_yaml(text).passes}
    assert added == ({"batch-norm", "distill"} if name.startswith("resnet") else {"distill"})
    assert plan_of(runnable(whole)).passes


@pytest.mark.parametrize("name", ROWS)
def test_what_each_says_is_so(name: str) -> None:
    """The command names the recipe itself, the figures are those tested here, and no kernel is promised for none."""
    text, row = path_of(name).read_text(encoding="utf-8"), ROWS[name]
    said = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert f"--config examples/recipes/{name}.yaml -o out/{name}" in said
    assert f"{row.left:.2f} G" in said
    assert f"{row.dense:.2f} G" in said
    assert {f"{100 * row.saved:.2f} %", f"{100 * row.published:.2f} %"} <= set(re.findall(r"\d+\.\d+ %", said))
    assert ("Kernels: none." in said) is not row.has_kernel
    assert f"a GPU runs {row.pattern} as dense" in said or row.has_kernel
    [line] = re.findall(rf"^\| \[{name}\].*", (RECIPES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = (f"{100 * row.saved:.2f} %", f"{row.left:.2f} of {row.dense:.2f} G", f"{row.masked} of {row.layers}")
    assert [text for text in told if text not in line] == []
    assert line.endswith("| none |") is not row.has_kernel


def check_counts(name: str, found: Charged) -> None:
    """Multiply-accumulates are what the row says, by both conventions; 8 tokens merge after each of 12 attentions."""
    row = ROWS[name]
    assert found.merged == ((8,) * 12 if name.endswith("tome") else (0,) * len(found.merged))
    assert found.dense / 1e9 == pytest.approx(row.dense, abs=ROUNDED)
    assert found.compressed / 1e9 == pytest.approx(row.left, abs=ROUNDED)
    assert 1 - found.compressed / found.dense == pytest.approx(row.saved, abs=ROUNDED)
    assert 1 - found.as_published / found.dense == pytest.approx(row.published, abs=ROUNDED)
    assert found.merging < 0.001 * found.dense


def check_zeros(name: str, file: Path, layers: set[str]) -> None:
    """Each of these layers, and no other, was found in the ONNX file with as many zeros as its pattern has."""
    stored = onnx.load(file, load_external_data=False)
    [text] = [entry.value for entry in stored.metadata_props if entry.key == METADATA_KEY]
    proven, density = json.loads(text), NM.parse(ROWS[name].pattern).density
    assert {layer for weight in proven.values() for layer in weight["layers"]} == layers
    assert all(weight["zeros"] == weight["size"] * (1 - density) for weight in proven.values())


def check_files(name: str, artifact: Artifact) -> None:
    """The masks are in the file; the report has the recipe's pattern and orders, and says what masked layers run on."""
    report = artifact.report
    rows = [row for row in report.layers if row.pattern]
    check_zeros(name, artifact.folder / "model.onnx", {row.name for row in rows})
    assert {row.pattern for row in rows} == {ROWS[name].pattern}
    assert {row.permuted for row in rows} == {any(step.name == "permute" for step in report.recipe.passes)}
    assert ("run on them" in " ".join(report.verdict)) == (native.missing() is None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_each_compiles(name: str, tmp_path: Path) -> None:
    """The whole way at full size."""
    artifact = mpcompile.compile(request(name), runnable(read_recipe(path_of(name))), output=tmp_path / "out")
    check_files(name, artifact)
    check_counts(name, artifact.report.cost)
    layers = artifact.report.layers
    assert (sum(layer.pattern is not None for layer in layers), len(layers)) == (ROWS[name].masked, ROWS[name].layers)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in COVERED else name for name in ROWS]
)
def test_each_compiles_with_few_layers_of_each_kind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, one CNN with images to compare on. Speed is measured in the fewest and shortest rounds."""
    monkeypatch.setattr("mpcompile.measure.timing.ROUNDS", (ROUNDS[0], ROUNDS[0]))
    monkeypatch.setattr("mpcompile.runtimes.native.microbenchmark.BLOCK_MS", 0.01)
    images = some_images(4) if name == "resnet152d_2x4" else Data()
    model = replace(request(name, **ROWS[name].small), input_size=(3, SIDE, SIDE))
    artifact = mpcompile.compile(model, runnable(read_recipe(path_of(name))), data=images, output=tmp_path / "out")
    check_files(name, artifact)
    assert (artifact.report.certificate is not None) == bool(len(images.held_out))


@pytest.mark.parametrize("name", ROWS)
def test_the_whole_network_is_masked_and_counted(name: str) -> None:
    dense, model = counted(name)
    check_counts(name, charged(dense, model))
    assert len(model.masks()) == ROWS[name].masked
    assert len(list(model.layers())) == ROWS[name].layers
    assert set(model.patterns().values()) == {NM.parse(ROWS[name].pattern)}
