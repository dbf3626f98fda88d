"""Parts of models (--submodule): what is compressed, what is written, and what comes back."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import mpcompile as mpcompile_command
from commandline import refused
from part_models import Classifier, Detector, Fusing
from safetensors.torch import load_file
from torch import nn

import mpcompile
from mpcompile.data.images import Data, Split
from mpcompile.driver.analyze import analyze
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.compile import preview
from mpcompile.driver.part import OpenPart, captured_run
from mpcompile.frontend.load_model import Loaded, Request
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.output_tree import flattened
from mpcompile.recipe.schema import DataChoice, Recipe

QUICK = {"bench": {"batches": [1], "seconds": 0.05}, "data": {"calibration": 6, "validation": 2}}
PASSES = ["mp-budget", "permute", {"nm-mask": {"pattern": "2:4"}}, "batch-norm"]


def recipe(submodule: str | None, **more: Any) -> Recipe:
    return Recipe.checked({"submodule": submodule, "passes": PASSES, **QUICK, **more})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz file of 12 × 12 and one of 8 × 8 pixels, by the side in the name."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for side in (12, 8):
        arrays: dict[str, Any] = {}
        for split, count in (("calibration", 8), ("heldout", 5)):
            arrays[f"{split}_images"] = rng.integers(0, 255, (count, side, side, 3), dtype=np.uint8)
            arrays[f"{split}_labels"] = rng.integers(0, 10, count)
        np.savez(folder / f"{side}.npz", **arrays)
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Artifact:
    """The artifact of a detector whose backbone was compressed."""
    output = tmp_path_factory.mktemp("detector") / "out"
    return mpcompile.compile(Detector(), recipe("backbone"), data=images / "12.npz", output=output)


def opened(module: nn.Module, submodule: str) -> tuple[Model, OpenPart]:
    """The captured part of a module, without images."""
    loaded = Loaded(module, source_of(module, name="a", arch="a", sha256=""))
    dense, _, part = captured_run(loaded, Request("a"), None, DataChoice(), "auto", submodule)
    assert part is not None
    return dense, part


def require_equal(one: Any, two: Any) -> None:
    (_, ours), (_, theirs) = flattened(one), flattened(two)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- the output folder


def test_only_the_part_is_masked_under_the_names_of_the_whole_model(detector: Artifact) -> None:
    masks = load_file(detector.folder / "masks.safetensors")
    assert set(masks) == {"backbone.one", "backbone.two"}  # the stem reads the image, and the head follows
    weights = load_file(detector.folder / "model.safetensors")
    original = Detector().state_dict()
    assert set(weights) == set(original)
    assert torch.equal(weights["head.weight"], original["head.weight"])
    assert (weights["backbone.one.weight"] == 0).float().mean() == pytest.approx(0.5)
    assert {proof.layer for proof in detector.verify()} == set(masks)


def test_the_model_is_loaded_whole_and_equals_one_assembled_by_hand(detector: Artifact) -> None:
    whole = detector.load("torch", model=Detector())
    by_hand = Detector().eval()
    by_hand.load_state_dict(load_file(detector.folder / "model.safetensors"))
    pictures = list(torch.randn(3, 3, 12, 12))
    with torch.no_grad():
        require_equal(whole(pictures), by_hand(pictures))
        features = by_hand.backbone(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    engine = detector.load("onnx")
    found = engine(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).numpy())
    np.testing.assert_allclose(found, features["fine"].numpy(), rtol=1e-4, atol=1e-5)


def test_the_report_tells_the_part_and_compares_the_whole_models(detector: Artifact) -> None:
    part = detector.report.part
    assert part is not None
    assert (part.name, part.kind, part.outputs) == ("backbone", "Body", ("fine", "coarse"))
    assert part.inputs[0].shape == (3, 16, 16)
    assert detector.report.model.size == (3, 12, 12)
    assert part.images_as_list
    own, whole = (sum(p.numel() for p in module.parameters()) for module in (Detector().backbone, Detector()))
    assert (part.parameters, part.whole_parameters) == (own, whole)
    macs = 64 * 16 * 27 + 64 * 16 * 144 + 16 * 16 * 144
    assert (part.macs, part.whole_macs) == (macs, macs + 16 * 5 * 16)
    assert 0 < part.time_share < 1
    assert part.whole is not None
    assert (part.whole.images, part.whole.agreement) == (5, None)
    assert {row.name for row in part.whole.outputs} == {"0.boxes", "0.scores"}
    assert "Only the part backbone (Body) is compressed" in detector.report.verdict[0]
    assert any(f"{own / whole:.1%} of the parameters" in note for note in detector.report.data.notes)


def test_the_comparison_is_that_of_the_loaded_model(detector: Artifact, images: Path) -> None:
    """The relative error in the report is that of the two whole models on the held-out images."""
    dense, whole = Detector().eval(), detector.load("torch", model=Detector())
    pixels = torch.from_numpy(np.load(images / "12.npz")["heldout_images"]).permute(0, 3, 1, 2).float() / 255
    source = detector.report.model
    pixels = (pixels - torch.tensor(source.mean)[:, None, None]) / torch.tensor(source.std)[:, None, None]
    with torch.no_grad():
        pairs = [(dense([one])[0]["scores"], whole([one])[0]["scores"]) for one in pixels]
    moved = sum(float((a - b).double().square().sum()) for a, b in pairs)
    size = sum(float(a.double().square().sum()) for a, _ in pairs)
    part = detector.report.part
    assert part is not None
    assert part.whole is not None
    [row] = [row for row in part.whole.outputs if row.name == "0.scores"]
    assert row.relative_error == pytest.approx((moved / size) ** 0.5, rel=1e-3)
    assert row.relative_error > 1e-3


def test_a_part_of_a_classifier_is_judged_by_the_whole_models_answers(tmp_path: Path, images: Path) -> None:
    found = mpcompile.compile(Classifier(), recipe("stage2"), data=images / "8.npz", output=tmp_path / "out").report
    assert {row.name for row in found.layers if row.pattern} == {"stage2.a", "stage2.b"}  # neither is stem or output
    assert found.part is not None
    assert [row.name for row in found.part.inputs] == ["images"]  # the shift is a constant
    whole = found.part.whole
    assert whole is not None
    assert whole.agreement is not None
    assert whole.dense is not None
    model = Classifier().eval()
    arrays = np.load(images / "8.npz")
    pixels = torch.from_numpy(arrays["heldout_images"]).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(found.model.mean)[:, None, None]) / torch.tensor(found.model.std)[:, None, None]
    with torch.no_grad():
        right = model(pixels).argmax(1).numpy() == arrays["heldout_labels"]
    assert whole.dense.top1 == pytest.approx(right.mean())
    assert found.comparison is None or found.comparison.dense is None  # features have no accuracy


def test_a_part_with_two_inputs_is_compiled_and_loaded(tmp_path: Path) -> None:
    artifact = mpcompile.compile(Fusing(), recipe("fuse", target="eager"), output=tmp_path / "out")
    part = artifact.report.part
    assert part is not None
    assert {row.name: row.shape for row in part.inputs} == {"coarse": (16, 4, 4), "fine": (16, 8, 8)}
    whole, engine = artifact.load("torch", model=Fusing()), artifact.load("engine", model=Fusing())
    features = [torch.randn(2, *row.shape, generator=torch.Generator().manual_seed(0)) for row in part.inputs]
    with torch.no_grad():
        expected = whole.fuse(coarse=features[0], fine=features[1])  # type: ignore[operator]
    for form in (engine, artifact.load("onnx")):
        np.testing.assert_allclose(form(*(one.numpy() for one in features)), expected.numpy(), rtol=1e-4, atol=1e-5)
    assert any("the whole model was not compared" in sentence for sentence in artifact.report.verdict)


# ---- analyze and --dry-run


def test_analyze_and_preview_take_a_part(images: Path) -> None:
    found = analyze(Classifier(), submodule="stage2", data=images / "8.npz", choice=DataChoice(calibration=4))
    assert {row.name for row in found.layers} == {"stage2.a", "stage2.b"}
    assert any("only the part stage2 (Stage) is compressed" in note for note in found.notes)
    planned = preview(Detector(), recipe("back*"))
    assert [row["layer"] for row in planned["layers"]] == ["backbone.stem", "backbone.one", "backbone.two"]


def test_the_command_line_takes_a_part(images: Path) -> None:
    options = ("--submodule", "backbone", "--pattern", "2:4", "--data", images / "12.npz", "--json")
    words = ("part_models:Detector", *options)
    planned = json.loads(mpcompile_command("compile", *words, "--dry-run").stdout)
    assert planned["recipe"]["submodule"] == "backbone"
    names = [next(iter(step)) for step in planned["recipe"]["passes"]]
    assert "batch-norm" in names
    assert "certify" not in names  # the outputs of a part are no answers
    assert [row["pattern"] for row in planned["layers"]] == [None, "2:4", "2:4"]
    found = json.loads(mpcompile_command("analyze", *words).stdout)
    assert [row["name"] for row in found["layers"]] == ["backbone.stem", "backbone.one", "backbone.two"]
    done = mpcompile_command("compile", "part_models:Detector", "--submodule", "bakbone", *options[2:4], "--dry-run")
    refused(done, 2, "give one of its parts: backbone (98.4% of the parameters)")


# ---- the model around the part


def test_the_dense_part_put_back_gives_the_models_outputs() -> None:
    for module, name in ((Detector(), "backbone"), (Classifier(), "stage2"), (Classifier(), "stages.1")):
        dense, part = opened(module, name)
        pixels = torch.randn(3, *module.pretrained_cfg["input_size"])
        require_equal(part.whole.run_with(dense, pixels), part.whole.run(pixels))
        changed = replace(dense, graph=copy.deepcopy(dense.graph))
        with torch.no_grad():
            next(changed.graph.parameters()).zero_()
        with pytest.raises(AssertionError):
            require_equal(part.whole.run_with(changed, pixels), part.whole.run(pixels))


def test_the_given_module_is_not_changed() -> None:
    module = Detector()
    before, attributes = copy.deepcopy(module.state_dict()), set(vars(module.backbone))
    opened(module, "backbone")
    assert module.training
    assert set(vars(module.backbone)) == attributes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_samples_in_memory_go_through_the_model() -> None:
    loaded = Loaded(Classifier(), source_of(Classifier(), name="a", arch="a", sha256=""))
    samples = [(torch.randn(3, 8, 8), 1) for _ in range(6)]
    _, data, part = captured_run(loaded, Request("a"), samples, DataChoice(calibration=3), "auto", "stage2")
    assert part is not None
    [(inputs, _)] = data.calibration.inputs(3)
    [(images, _)] = Split(data.calibration.images.images, data.calibration.order, False).batches(3)  # type: ignore[attr-defined]
    torch.testing.assert_close(inputs[0], part.whole.part_inputs(images)[0])


def test_images_in_memory_keep_their_notes() -> None:
    loaded = Loaded(Classifier(), source_of(Classifier(), name="a", arch="a", sha256=""))
    _, data, part = captured_run(loaded, Request("a"), Data(notes=("mine",)), DataChoice(), "auto", "stage2")
    assert part is not None
    assert data.notes == ("mine", part.row.description)


def test_a_metric_gets_what_the_whole_model_returns(tmp_path: Path) -> None:
    """Its outputs are lists of dicts, one batch of one image each; targets are dicts."""
    rng = torch.Generator().manual_seed(0)
    samples = [(torch.rand(3, 12, 12, generator=rng), {"count": 8 + index % 2}) for index in range(12)]
    seen: list[int] = []

    def boxes(outputs: Any, targets: Any) -> list[float]:
        seen.append(len(outputs))
        assert set(outputs[0]) == {"boxes", "scores"}
        return [float(len(one["boxes"]) == goal["count"]) for one, goal in zip(outputs, targets, strict=True)]

    artifact = mpcompile.compile(
        Detector(), recipe("backbone"), data={"train": samples[:8], "test": samples[8:]}, metric=boxes,
        output=tmp_path / "out",
    )  # fmt: skip
    assert artifact.report.part is not None
    assert artifact.report.part.whole is not None
    found = artifact.report.part.whole.metric
    assert found is not None
    assert (found.name, found.count) == ("boxes", 4)
    assert set(seen) == {1}
    assert 0 <= found.dense <= 1
    assert any("boxes of the whole model is" in sentence for sentence in artifact.report.verdict)
