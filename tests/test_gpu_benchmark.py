"""benchmarks/gpu.py: refused in one line without a GPU; every step but TensorRT's own runs on the CPU."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpcompile.runtimes import TensorRT

ROOT = Path(__file__).parents[1]
MODEL = "test_resnet"  # timm's own for tests: four blocks


@pytest.fixture(scope="module", autouse=True)
def _folder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "benchmarks"))
        yield
    for name in ("gpu", "common"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def written(_folder: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON file of a run over a model that is there and one that is not."""
    import gpu
    import lib.common as common

    folder = tmp_path_factory.mktemp("results")
    words = f"--target ort --models {MODEL} no_such_model --precisions fp32 --batches 1 2 --seconds 0.1"
    with pytest.MonkeyPatch.context() as patched:
        for module in (common, gpu):
            patched.setattr(module, "RESULTS", folder)
        return gpu.main(words.split())


def test_without_a_gpu_it_says_so() -> None:
    import gpu

    missing = TensorRT().missing()
    if missing is None:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="target trt: "):
        gpu.main([])


def test_a_model_is_measured_and_written(written: Path) -> None:
    assert sorted(file.suffix for file in written.parent.iterdir()) == [".json", ".md", ".svg"]
    row = json.loads(written.read_text())["rows"][0]
    assert row["model"] == MODEL
    assert [batch["batch"] for batch in row["batches"]] == [1, 2]
    assert all(batch["comparisons"]["compressed/dense"]["count"] >= 15 for batch in row["batches"])
    assert row["published"] == "no figure of the paper"
    assert f"| {MODEL} | fp32 | 2 |" in written.with_suffix(".md").read_text()


def test_every_headline_of_the_paper_has_its_line() -> None:
    import gpu

    assert {case.model for case in gpu.CASES} == {
        "vit_base_patch16_224", "vit_large_patch16_224", "convnextv2_base", "resnet50", "resnet152d",
    }  # fmt: skip
    said = " ".join(case.published for case in gpu.CASES if case.dense_merged or not case.merged)
    assert all(figure in said for figure in ("1.388", "1.394", "1.295", "1.70", "1.62"))


def test_what_fails_is_a_line_and_the_rest_is_kept(written: Path) -> None:
    first, second = json.loads(written.read_text())["rows"]
    assert first["model"] == MODEL
    assert "no_such_model" in second["failed"]
    assert "no_such_model in fp32 failed" in written.with_suffix(".md").read_text()
