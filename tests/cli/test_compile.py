"""`mpcompile compile`: the folder, the recipe and the report that it writes, what it prints, and its exit codes."""

import json
from pathlib import Path

import pytest
import yaml
from commandline import QUICK, in_a_process, mpcompile, refused, stages_in
from sparse_vit import write_sparse_vit


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    path = tmp_path / "quick.yaml"
    path.write_text(QUICK)
    return path


@pytest.fixture(scope="module")
def right_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small ViT and images that it classifies by a wide margin, so that a lost prediction comes from compression."""
    return write_sparse_vit(tmp_path_factory.mktemp("right"), depth=2)


def test_compile_writes_a_folder_and_its_recipe_reproduces_it(
    tiny_files: tuple[Path, Path], quick: Path, tmp_path: Path
) -> None:
    model, images = tiny_files
    before = model.read_bytes()
    output, saved = tmp_path / "out", tmp_path / "resolved.yaml"
    done = in_a_process(
        model, "--pattern", "2:4", "--data", images, "-o", output, "--config", quick, "--save-config", saved,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert model.read_bytes() == before
    names = {
        "recipe.yaml",
        "model.safetensors",
        "masks.safetensors",
        "model.onnx",
        "dense.onnx",
        "report.json",
        "report.md",
        "report.html",
        "report.sha256",
    }
    assert {path.name for path in output.iterdir()} - {"model.native.onnx"} == names
    for word in ("top-1, 64 held-out images", "logit shift", "ONNX file", "median latency, batch 1"):
        assert word in done.stdout
    assert stages_in(done.stderr) == [
        "load", "capture", "export dense", "mp-budget", "drop-unread-tokens", "permute", "nm-mask", "batch-norm",
        "confidence", "certify", "export compressed", "build", "evaluate", "time", "write",
    ]  # fmt: skip
    assert saved.read_text() == (output / "recipe.yaml").read_text()
    assert yaml.safe_load(saved.read_text())["data"] == {
        "calibration": 256, "validation": 256, "held_out": 64, "examples": 8, "seed": 0,
        "classes": None, "exif": "apply", "alpha": "drop", "skip_broken": False,
    }  # fmt: skip

    # The recipe it wrote gives the same weights again, and --json prints the report and nothing else.
    again = mpcompile(
        "compile", model, "--config", output / "recipe.yaml", "--data", images, "-o", tmp_path / "again", "--json",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    report = json.loads(again.stdout)
    first = json.loads((output / "report.json").read_text())
    # Each run measures which layers are faster on the CPU's kernel, and kernels round differently: 1e-6 of the logits.
    for key in ("logit_shift_mean", "logit_shift_p99", "logit_shift_max"):
        assert report["comparison"][key] == pytest.approx(first["comparison"][key], rel=1e-3)
    assert report["comparison"]["compressed"] == first["comparison"]["compressed"]
    for name in ("model.safetensors", "masks.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()
    assert report["recipe_sha256"] == first["recipe_sha256"]
    # The report has the command that made it, word by word.
    words = ["compile", model, "--config", output / "recipe.yaml", "--data", images, "-o", tmp_path / "again", "--json"]
    assert report["command_line"] == ["mpcompile", *map(str, words)]


def test_without_images_nothing_is_claimed_of_accuracy(
    tiny_files: tuple[Path, Path], quick: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ["--pattern", "2:4", "-o", output, "--config", quick, "--batch", 2]
    done = mpcompile(tiny_files[0], *words)
    assert done.returncode == 0, done.stderr
    assert "No images were given (--data), so accuracy was not measured." in done.stdout
    assert "top-1" not in done.stdout
    assert json.loads((output / "report.json").read_text())["comparison"] is None


def test_max_drop_restores_layers_and_is_checked_on_held_out_images(
    right_files: tuple[Path, Path], quick: Path, tmp_path: Path
) -> None:
    (model, images), output = right_files, tmp_path / "out"
    # Six of eight layers are restored. With two masked layers the drop is 22 points; with three it was above 40.
    done = mpcompile(
        model, "--pattern", "1:4", "--data", images, "-o", output, "--config", quick, "--max-drop", 40,
        "--refit", "none", "-v",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "multiply-accumulates an image are left" in done.stderr
    report = json.loads((output / "report.json").read_text())
    assert [step["name"] for step in report["passes"]][-4:] == ["batch-norm", "restore", "confidence", "certify"]
    reasons = [row["reason"] for row in report["layers"] if row["reason"]]
    assert any("restored: masked, its share of the outputs' shift was" in reason for reason in reasons)
    assert report["certificate"]["images"] == 64
    text = (output / "report.md").read_text()
    assert "predictions are proven unchanged" in text
    assert "first-order" in text


def test_an_unknown_refit_or_start_is_refused(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    done = mpcompile(tiny_files[0], "--pattern", "2:4", "--refit", "much", "-o", tmp_path / "out")
    refused(done, 2, "pass nm-mask: refit: Input should be 'none', 'layer' or 'model' (found 'much')")
    done = mpcompile(tiny_files[0], "--pattern", "2:4", "--refit", "model", "-o", tmp_path / "out")
    refused(done, 4, "the refit to the model needs calibration images; give --data")
    assert "export dense" not in done.stderr  # refused before any work
    assert not list(tmp_path.iterdir())
    done = mpcompile(tiny_files[0], "--pattern", "2:4", "--from", "mask", "-o", tmp_path / "out")
    refused(done, 2, "--from 'mask' is not a pass of the recipe; its passes are mp-budget, drop-unread-tokens, permute")


def test_an_accuracy_gate_fails_with_a_written_folder(
    right_files: tuple[Path, Path], example: Path, tmp_path: Path
) -> None:
    (model, images), output, config = right_files, tmp_path / "out", tmp_path / "recipe.yaml"
    config.write_text(QUICK + "passes: [{nm-mask: {pattern: 1:16, criterion: magnitude, refit: none}}]\n")
    done = mpcompile(model, "--data", images, "-o", output, "--config", config, "--max-drop", 1, "-q")
    refused(done, 6, "is written, and fails its gate: top-1 drop in points is")
    [gate] = json.loads((output / "report.json").read_text())["gates"]
    assert not gate["holds"]
    assert gate["found"] > 1
    done = mpcompile(example / "model.safetensors", "--pattern", "2:4", "-o", tmp_path / "b", "--max-drop", 1)
    refused(done, 2, "a gate on accuracy (--max-drop) needs labelled images (--data)")


def test_dry_run_writes_nothing(example: Path, tmp_path: Path) -> None:
    done = mpcompile(example / "model.safetensors", "--pattern", "2:4", "--dry-run", "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "head: dense, output layer" in done.stdout
    assert "24 of 26 layers would be masked; no model was written" in done.stdout
    assert list(tmp_path.iterdir()) == []
    rows = json.loads(mpcompile(example / "model.safetensors", "--pattern", "2:4", "--dry-run", "--json").stdout)[
        "layers"
    ]
    assert len(rows) == 26
