"""Mistakes on the command line: an exit code and one line for each, and nothing is written."""

import subprocess
import sys
from pathlib import Path

import pytest
from commandline import mpcompile, refused


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
            "--mean 'a,b' is not one number per channel",
        ),
        (["timm:resnet18", "--pattern", "2:4", "-o", "out", "--arch-arg", "x"], 2, "--arch-arg 'x' is not KEY=VALUE"),
        (["timm:resnet18", "--pattern", "2:4", "-o", "out", "--config", "no.yaml"], 2, "recipe no.yaml cannot be read"),
        (["timm:resnet18", "--pattern", "2:4", "-o", "out", "--exclude", "zz"], 2, "no layer name matches 'zz'"),
        (["timm:resnet18", "--pattern", "2/4", "-o", "out"], 2, "did you mean 2:4?"),
        (["timm:resnet18", "--pattern", "2:4", "-o", "out", "--target", "ortt"], 2, "did you mean 'ort'?"),
        (["timm:resnet18", "--pattern", "2:4", "-o", "out", "--criterion", "magntude"], 2, "did you mean 'magnitude'?"),
        (["timm:resnt18", "--pattern", "2:4", "-o", "out"], 2, "did you mean 'resnet18'?"),
        (["anlyze", "timm:resnet18"], 2, "'anlyze' is neither a command nor a file; did you mean 'analyze'?"),
        (["timm:resnet18", "--pattern", "2:4", "-o", "x" * 300], 2, "File name too long"),
        (["x" * 300, "--pattern", "2:4", "-o", "out"], 3, "File name too long"),
        (["timm:resnet18", "--pattern", "2:4", "-o", "out", "--data", "x" * 300], 3, "File name too long"),
        (["timm:resnet18", "--pattern", "2:4", "-o", "out", "--config", "x" * 300], 2, "File name too long"),
        (["analyze", "timm:resnet18", "--plots", "x" * 300], 2, "File name too long"),
        (["bench", "x" * 300], 3, "File name too long"),
        (["verify", "x" * 300], 3, "File name too long"),
        (["verify", "nowhere"], 3, "nowhere is not an output folder of mpcompile"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, words: list[str], code: int, text: str) -> None:
    done = mpcompile(*words, cwd=tmp_path)
    refused(done if "WARNING" not in done.stderr else without_warning(done), code, text)
    assert list(tmp_path.iterdir()) == []


def without_warning(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The result without the warning that timm:NAME has random weights."""
    done.stderr = "\n".join(line for line in done.stderr.splitlines() if "has random weights" not in line)
    return done


def test_unknown_options_are_refused() -> None:
    done = mpcompile("model.pt", "--patern", "2:4")
    assert done.returncode == 2
    assert "No such option: --patern" in done.stderr
    assert "Traceback" not in done.stderr


def test_images_that_cannot_be_read_are_refused(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
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
    # The results of finished passes stay beside the output, for a run with repaired images.
    assert {path.name for path in tmp_path.iterdir()} <= {"images", ".out.work"}


def test_output_folders_that_are_in_use_are_refused(example: Path, tmp_path: Path) -> None:
    model, taken = example / "model.safetensors", tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("x")
    refused(mpcompile(model, "--pattern", "2:4", "-o", taken), 2, "is not empty")
    refused(mpcompile(model, "--pattern", "2:4", "-o", taken, "--force"), 2, "holds files that mpcompile did not write")
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]
    refused(mpcompile(model, "--pattern", "2:4", "-o", "/proc/out"), 2, "cannot be written to")


def test_an_unexpected_error_is_one_line(example: Path, tmp_path: Path) -> None:
    # No check expects this: a part of the program itself is broken.
    words = ["mpcompile", str(example / "model.safetensors"), "--pattern", "2:4", "-o", str(tmp_path / "out")]
    code = (
        "import sys, mpcompile.cli.entry_point as cli, mpcompile.driver.compile\n"
        "sys.modules['mpcompile.driver.inputs'].capture = None\n"
        f"sys.argv = {words!r}\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mpcompile: unexpected TypeError: ")
    assert "Traceback" not in done.stderr
