"""The command line: what it prints, where, and the exit code and the one line for each mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from commandline import in_a_process, mpcompile
from dying_run import exporting
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from sparse_vit import write_sparse_vit

from mpcompile.driver.artifact import Artifact
from mpcompile.pipeline.partial_results import PartialResults

QUICK = "bench: {batches: [1], seconds: 0.05, threads: 1}\ndata: {held_out: 64}\n"


def refused(done: subprocess.CompletedProcess[str], code: int, text: str) -> None:
    """One line on standard error that holds the text, the exit code, nothing on standard output, no traceback."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]  # stages that had begun
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mpcompile: ")
    assert text in lines[0]


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    path = tmp_path / "quick.yaml"
    path.write_text(QUICK)
    return path


@pytest.fixture(scope="module")
def right_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small ViT, and images that it classifies by a wide margin: whatever it loses by compression is an error."""
    return write_sparse_vit(tmp_path_factory.mktemp("right"), depth=2)


def dying(moment: dict[str, object], *words: object) -> subprocess.CompletedProcess[str]:
    """`mpcompile` in a process of its own, which sends itself a signal."""
    command = [sys.executable, "-m", "tests.dying_run", json.dumps(moment), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


# ---- the whole way


def test_the_whole_way(tiny_files: tuple[Path, Path], quick: Path, tmp_path: Path) -> None:
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
    }
    assert {path.name for path in output.iterdir()} - {"model.native.onnx"} == names
    for word in ("top-1, 64 held-out images", "logit shift", "ONNX file", "median latency, batch 1"):
        assert word in done.stdout
    assert [line.split("] ")[1] for line in done.stderr.splitlines()] == [
        "load", "capture", "export dense", "mp-budget", "permute", "nm-mask", "batch-norm", "certify",
        "export compressed", "build", "evaluate", "time", "write",
    ]  # fmt: skip
    assert saved.read_text() == (output / "recipe.yaml").read_text()
    assert yaml.safe_load(saved.read_text())["data"] == {
        "calibration": 256, "validation": 256, "held_out": 64, "seed": 0,
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


def test_max_drop_takes_layers_back_and_is_asked_of_held_out_images(
    right_files: tuple[Path, Path], quick: Path, tmp_path: Path
) -> None:
    (model, images), output = right_files, tmp_path / "out"
    # Six of eight layers go back; with the other two the drop is 22 points, and was above 40 before the sixth went.
    done = mpcompile(
        model, "--pattern", "1:4", "--data", images, "-o", output, "--config", quick, "--max-drop", 40,
        "--refit", "none", "-v",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "multiply-accumulates an image are left" in done.stderr
    report = json.loads((output / "report.json").read_text())
    assert [step["name"] for step in report["passes"]][-3:] == ["batch-norm", "restore", "certify"]
    reasons = [row["reason"] for row in report["layers"] if row["reason"]]
    assert any("restored: masked, its share of the logits' shift was" in reason for reason in reasons)
    assert report["certificate"]["images"] == 64
    text = (output / "report.md").read_text()
    assert "predictions are proven unchanged" in text
    assert "first-order" in text


def test_a_kill_loses_no_finished_layer(
    tiny_files: tuple[Path, Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, images), output = tiny_files, tmp_path / "out"
    words = [model, "--pattern", "2:4", "--data", images, "-o", output, "--config", quick]
    died = dying({"signal": signal.SIGKILL, "after": "part", "count": 3}, *words)
    assert died.returncode == -signal.SIGKILL, died.stderr
    kept = {path.stem for path in (tmp_path / ".out.work").glob("run-*/*.safetensors")}
    assert len(kept) == 3
    computed: list[str] = []
    put = PartialResults.put

    def remember(self: PartialResults, name: str, tensors: dict[str, torch.Tensor]) -> None:
        computed.append(name)
        put(self, name, tensors)

    monkeypatch.setattr(PartialResults, "put", remember)
    done = mpcompile(*words)
    assert done.returncode == 0, done.stderr
    assert len(computed) == 8 - 3  # of 8 layers
    assert not kept & set(computed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "quick.yaml"]
    passes = json.loads((output / "report.json").read_text())["passes"]
    assert [row["resumed"] for row in passes] == [True, True, False, False, False]


def test_a_refit_of_that_name_is_refused(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    done = mpcompile(tiny_files[0], "--pattern", "2:4", "--refit", "much", "-o", tmp_path / "out")
    refused(done, 2, "pass nm-mask: refit: Input should be 'none', 'layer' or 'model' (found 'much')")
    done = mpcompile(tiny_files[0], "--pattern", "2:4", "--refit", "model", "-o", tmp_path / "out")
    refused(done, 4, "the refit to the model needs calibration images; give --data")
    assert "; finished work is kept in " in done.stderr
    done = mpcompile(tiny_files[0], "--pattern", "2:4", "--from", "mask", "-o", tmp_path / "out")
    refused(done, 2, "--from 'mask' is not a pass of the recipe; its passes are mp-budget, permute, nm-mask")


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


# ---- verify


@pytest.fixture
def copy(artifact: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact.folder, tmp_path / "copy"))


def test_verify_accepts_what_was_written(artifact: Artifact) -> None:
    done = mpcompile("verify", artifact.folder)
    assert done.returncode == 0, done.stderr
    assert "24 masks hold" in done.stdout
    assert len(json.loads(mpcompile("verify", artifact.folder, "--json").stdout)) == 24


def test_verify_rejects_one_weight_filled_into_the_onnx_file(copy: Path) -> None:
    file = onnx.load(copy / "model.onnx")
    sparsity = json.loads(next(p.value for p in file.metadata_props if p.key == "mpcompile.sparsity"))
    name = next(initializer for initializer, row in sparsity.items() if row["layers"] == ["blocks.3.mlp.fc2"])
    tensor = next(t for t in file.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values[tuple(np.argwhere(values == 0)[0])] = 1e-3
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(file, copy / "model.onnx")
    refused(mpcompile("verify", copy), 5, "blocks.3.mlp.fc2: 1 weights that the mask zeroes are not zero in")


def test_verify_rejects_one_weight_filled_into_the_state_dict(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["blocks.0.attn.proj.weight"][weights["blocks.0.attn.proj.weight"] == 0] = 1e-3
    save_file(weights, copy / "model.safetensors")
    refused(
        mpcompile("verify", copy),
        5,
        "blocks.0.attn.proj: 8192 weights that the mask zeroes are not zero in model.safet",
    )


def test_verify_rejects_other_changes(copy: Path) -> None:
    file = onnx.load(copy / "model.onnx")
    next(t for t in file.graph.initializer if t.name == "head.bias").raw_data = b"\0" * 40
    onnx.save(file, copy / "model.onnx")
    refused(mpcompile("verify", copy), 3, "model.onnx was changed: its SHA-256 differs")
    (copy / "model.onnx").write_bytes(b"\xff" * 100)
    refused(mpcompile("verify", copy), 3, "cannot be read as an ONNX file")
    (copy / "model.onnx").unlink()
    refused(mpcompile("verify", copy), 3, "is not an output folder of mpcompile: model.onnx missing")


# ---- the other verbs


def test_help_and_version_and_no_words() -> None:
    done = mpcompile("--help")
    assert done.returncode == 0
    for word in ("compile", "verify", "doctor", "passes", "schema", "Exit codes: 0 done; 2 wrong usage"):
        assert word in done.stdout
    assert mpcompile("--version").stdout.strip().count(".") == 2
    assert "Usage" in mpcompile().stdout + mpcompile().stderr
    assert "--allow-pickle" in mpcompile("compile", "--help").stdout


def test_doctor_passes_and_schema() -> None:
    done = mpcompile("doctor")
    assert done.returncode == 0
    assert "target ort" in done.stdout
    found = {row["what"]: row for row in json.loads(mpcompile("doctor", "--json").stdout)}
    assert found["torch"]["found"] == torch.__version__.split("+")[0]
    assert all(row["works"] or row["remedy"] for row in found.values())
    assert "nm-mask (lossy): Masks every layer for which a pattern is planned" in mpcompile("passes").stdout
    assert json.loads(mpcompile("passes", "--json").stdout)[0]["parameters"]["patterns"] == "[2:4]"
    assert json.loads(mpcompile("schema").stdout)["title"] == "Recipe"


# ---- bad days


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["nowhere.pt", "--pattern", "2:4", "-o", "out"], 3, "nowhere.pt does not exist"),
        (["timm:resnet18", "--pattern", "2/4", "-o", "out"], 2, "pattern '2/4' is not N:M"),
        (["timm:resnet18", "-o", "out"], 2, "give --pattern, such as --pattern 2:4"),
        (["timm:resnet18", "--pattern", "2:4"], 2, "--output is missing"),
        (["timm:resnet18", "--pattern", "2:4", "-o", "out", "--target", "trrt"], 2, "target 'trrt' is unknown"),
        (
            ["timm:resnet18", "--pattern", "2:4", "-o", "out", "--batch", "x"],
            2,
            "--batch 'x' is not a list of batch sizes",
        ),
        (
            ["timm:resnet18", "--pattern", "2:4", "-o", "out", "--input-size", "224"],
            2,
            "--input-size '224' is not CxHxW",
        ),
        (
            ["timm:resnet18", "--pattern", "2:4", "-o", "out", "--mean", "a,b"],
            2,
            "--mean 'a,b' is not a number a channel",
        ),
        (["timm:resnet18", "--pattern", "2:4", "-o", "out", "--arch-arg", "x"], 2, "--arch-arg 'x' is not KEY=VALUE"),
        (["timm:resnet18", "--pattern", "2:4", "-o", "out", "--config", "no.yaml"], 2, "recipe no.yaml cannot be read"),
        (["timm:resnet18", "--pattern", "2:4", "-o", "out", "--exclude", "zz"], 2, "no layer is called 'zz'"),
        (["verify", "nowhere"], 3, "nowhere is not an output folder of mpcompile"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, words: list[str], code: int, text: str) -> None:
    done = mpcompile(*words, cwd=tmp_path)
    refused(done if "WARNING" not in done.stderr else without_warning(done), code, text)
    assert list(tmp_path.iterdir()) == []


def without_warning(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The same without the warning that timm:NAME has random weights, which is due there."""
    done.stderr = "\n".join(line for line in done.stderr.splitlines() if "has random weights" not in line)
    return done


def test_unknown_options_are_refused() -> None:
    done = mpcompile("model.pt", "--patern", "2:4")
    assert done.returncode == 2
    assert "No such option: --patern" in done.stderr
    assert "Traceback" not in done.stderr


def test_images_that_do_not_do(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    model, output = tiny_files[0], tmp_path / "out"
    refused(
        mpcompile(model, "--pattern", "2:4", "-o", output, "--data", tmp_path / "no"),
        3,
        "no does not exist; --data takes",
    )
    folder = tmp_path / "images"
    folder.mkdir()
    from PIL import Image

    for i in range(8):
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    (folder / "5.png").write_bytes(b"not an image")
    done = mpcompile(model, "--pattern", "2:4", "-o", output, "--data", folder, "--calibration", 2)
    refused(done, 3, "5.png is not an image that can be read")
    # What passes had finished stays beside the output, for when the images are mended.
    assert {path.name for path in tmp_path.iterdir()} <= {"images", ".out.work"}


def test_output_folders_that_do_not_do(example: Path, tmp_path: Path) -> None:
    model, taken = example / "model.safetensors", tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("x")
    refused(mpcompile(model, "--pattern", "2:4", "-o", taken), 2, "is not empty")
    refused(mpcompile(model, "--pattern", "2:4", "-o", taken, "--force"), 2, "holds what mpcompile did not write")
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]
    refused(mpcompile(model, "--pattern", "2:4", "-o", "/proc/out"), 2, "cannot be written to")


EXPORTING = "passes: [{nm-mask: {pattern: 2:4, criterion: magnitude, refit: none}}]\n" + QUICK


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_no_output(
    tiny_files: tuple[Path, Path], tmp_path: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, images), quick = tiny_files, tmp_path / "quick.yaml"
    quick.write_text(EXPORTING)
    monkeypatch.setattr("mpcompile.driver.run_plan.lower", exporting(lambda: os.kill(os.getpid(), how)))
    # A suite started in the background ignores interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = mpcompile(model, "-o", tmp_path / "out", "--config", quick, "--data", images)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode != 0
    assert "export compressed" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"quick.yaml", ".out.work"}


def test_a_killed_run_leaves_no_output(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    (model, images), output, quick = tiny_files, tmp_path / "out", tmp_path / "quick.yaml"
    quick.write_text(EXPORTING)
    words = [model, "-o", output, "--config", quick, "--data", images]
    died = dying({"signal": signal.SIGKILL, "after": "model.onnx", "count": 1}, *words)
    assert died.returncode == -signal.SIGKILL
    assert not output.exists()
    # Nothing can be done at that moment; the next run for the same output does it.
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".out.partial-")]) == 1
    done = mpcompile(*words, "-q")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "quick.yaml"]


def test_the_unforeseen_is_one_line_too(example: Path, tmp_path: Path) -> None:
    # What no check of ours foresees: a part of the program itself is broken.
    words = ["mpcompile", str(example / "model.safetensors"), "--pattern", "2:4", "-o", str(tmp_path / "out")]
    code = (
        "import sys, mpcompile.cli.entry_point as cli\n"
        "sys.modules['mpcompile.driver.compile'].capture = None\n"
        f"sys.argv = {words!r}\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mpcompile: unforeseen TypeError: ")
    assert "Traceback" not in done.stderr
