"""`--precision int8` on the command line: the preview of each layer, the tables of a run, and refusals before work."""

import json
from pathlib import Path

import pytest
from commandline import mpcompile, refused

from mpcompile.cli.tables import report_table, versions_table
from mpcompile.driver.artifact import Artifact
from mpcompile.recipe.schema import read_recipe

INT8 = ("--precision", "int8", "--dry-run")


def test_the_preview_says_which_layers_are_int8_and_why_others_are_not(tiny_files: tuple[Path, Path]) -> None:
    model, images = tiny_files
    done = mpcompile(model, "--pattern", "2:4", *INT8, "--data", images, "--exclude", "blocks.0.mlp.fc2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "blocks.0.attn.qkv: 2:4; int8" in lines
    [excluded] = [line for line in lines if line.startswith("blocks.0.mlp.fc2: ")]
    assert excluded.count("excluded") == 2
    assert "; floating point, " in excluded
    assert "7 of 10 layers would be masked and 7 quantised to int8; no model was written" in done.stdout
    assert "activations: u8" in done.stdout  # what the target decided


def test_the_preview_without_a_pattern(tiny_files: tuple[Path, Path]) -> None:
    model, images = tiny_files
    done = mpcompile(model, *INT8, "--data", images, "--json")
    plan = json.loads(done.stdout)
    names = ["drop-unread-tokens", "scale-migration", "quantize", "certify"]
    assert [next(iter(step)) for step in plan["recipe"]["passes"]] == names
    rows = {row["layer"]: row for row in plan["layers"]}
    assert (rows["blocks.0.attn.qkv"]["precision"], rows["blocks.0.attn.qkv"]["unquantized"]) == ("int8", None)
    assert (rows["head"]["precision"], bool(rows["head"]["unquantized"])) == (None, True)
    assert {row["pattern"] for row in rows.values()} == {None}
    assert "quantize dense" not in plan["stages"]


def test_the_saved_recipe_has_what_the_target_decides(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    """It is the recipe that runs, also on a processor on which the target would decide otherwise."""
    model, images = tiny_files
    saved = tmp_path / "recipe.yaml"
    done = mpcompile(model, "--pattern", "2:4", *INT8, "--data", images, "--save-config", saved, "--json")
    assert done.returncode == 0, done.stderr
    ran = json.loads(done.stdout)["recipe"]
    assert read_recipe(saved).model_dump(mode="json") == ran
    quantize = read_recipe(saved).step("quantize")
    assert quantize is not None
    assert {"activations", "outputs", "lanes"} <= set(quantize.params)
    again = mpcompile(model, "--config", saved, "--dry-run", "--data", images, "--json")
    assert json.loads(again.stdout)["recipe"] == ran


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (INT8, "precision int8 needs images, on which the ranges of activations are measured; give --data"),
        (("--precision", "fp8", "--dry-run"), "target ort: it has no FP8 kernels on a CPU; use int8"),
        ((*INT8, "--target", "eager"), "target eager: it runs the float32 graph and not the file"),
        ((*INT8, "--opset", "20", "--data", "images.npz"), "opset 20 is too early for int8"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(words: tuple[str, ...], text: str) -> None:
    refused(mpcompile("no-such-model.safetensors", *words), 2, text)


def test_the_tables_of_the_command_show_dense_fp32_and_dense_int8(int8_masked: Artifact) -> None:
    summary, versions = report_table(int8_masked.report), versions_table(int8_masked.report)
    assert [column.header for column in summary.columns] == ["", "dense, fp32", "compressed", "difference"]
    assert sum(str(cell).startswith("beside dense int8, ") for cell in summary.columns[0].cells) == 2
    assert list(versions.columns[0].cells) == [
        "dense, fp32",
        "masks alone, fp32",
        "dense int8, mpcompile",
        "dense int8, dynamic",
        "dense int8, static",
        "compressed, int8",
    ]
