"""benchmarks/gpu.py: refused in one line without a GPU; every step but TensorRT's own runs on the CPU."""

import json
from pathlib import Path

import pytest

from mpcompile.runtimes import TensorRT

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_without_a_gpu_it_says_so() -> None:
    import gpu

    missing = TensorRT().missing()
    if missing is None:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="target trt: "):
        gpu.main([])


def test_a_model_is_measured_and_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import common
    import gpu

    for module in (common, gpu):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    words = "--target ort --models resnet10t --precisions fp32 --batches 1 2 --seconds 0.1"
    path = gpu.main(words.split())
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md", ".svg"]
    [row] = json.loads(path.read_text())["rows"]
    assert [batch["batch"] for batch in row["batches"]] == [1, 2]
    assert all(batch["comparisons"]["compressed/dense"]["count"] >= 15 for batch in row["batches"])
    assert row["published"] == "no figure of the paper"
    assert "| resnet10t | fp32 | 2 |" in path.with_suffix(".md").read_text()


def test_every_headline_of_the_paper_has_its_line() -> None:
    import gpu

    assert {case.model for case in gpu.CASES} == {
        "vit_base_patch16_224", "vit_large_patch16_224", "convnextv2_base", "resnet50", "resnet152d",
    }  # fmt: skip
    said = " ".join(case.published for case in gpu.CASES if case.dense_merged or not case.merged)
    assert all(figure in said for figure in ("1.388", "1.394", "1.295", "1.70", "1.62"))


def test_what_fails_is_a_line_and_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import common
    import gpu

    for module in (common, gpu):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    words = "--target ort --models resnet10t no_such_model --precisions fp32 --batches 1 --seconds 0.1"
    path = gpu.main(words.split())
    first, second = json.loads(path.read_text())["rows"]
    assert first["model"] == "resnet10t"
    assert "no_such_model" in second["failed"]
    assert "no_such_model in fp32 failed" in path.with_suffix(".md").read_text()
