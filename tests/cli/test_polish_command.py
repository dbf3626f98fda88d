"""`--polish`: the pass in its place, what the report says, and what is refused."""

import json
from pathlib import Path

from commandline import QUICK, in_a_process, mpcompile, refused


def test_polish_trains_before_confidence_and_is_reported(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    (model, images), config, output = tiny_files, tmp_path / "quick.yaml", tmp_path / "out"
    config.write_text(QUICK.replace("{held_out: 64}", "{held_out: 64, calibration: 32, validation: 32}"))
    done = in_a_process(
        model, "--pattern", "2:4", "--criterion", "magnitude", "--refit", "none", "--data", images, "-o", output,
        "--config", config, "--polish", "0.05",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "report.json").read_text())
    names = [step["name"] for step in report["passes"]]
    assert names[-4:] == ["batch-norm", "polish", "confidence", "certify"]
    polished = report["polished"]
    assert polished["minutes"] == 0.05
    assert polished["steps"] > 0
    assert polished["after"]["divergence"] <= polished["before"]["divergence"]
    assert polished["after"]["agreement"] >= polished["before"]["agreement"]
    assert report["data"]["training"] == polished["training"]
    [sentence] = [text for text in report["verdict"] if "olish" in text]
    for page in ("report.md", "report.html"):
        assert sentence[:60] in (output / page).read_text()


def test_polish_without_images_or_minutes_is_refused(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    model, images = tiny_files
    done = mpcompile(model, "--pattern", "2:4", "--polish", "3", "-o", tmp_path / "out")
    refused(done, 2, "--polish needs images to train on; give --data")
    done = mpcompile(model, "--pattern", "2:4", "--polish", "0", "--data", images, "-o", tmp_path / "out")
    refused(done, 2, "polish: minutes is 0; it must be above 0 and at most 1440. Give for example 3")
    assert not list(tmp_path.iterdir())
