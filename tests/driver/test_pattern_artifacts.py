"""The output folder of a model with a vocabulary and with a density: written, verified, tampered with."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import mpcompile
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.weight_files import MASKS
from mpcompile.errors import MaskError
from mpcompile.ir.pattern import NM
from mpcompile.recipe.schema import Recipe
from mpcompile.system.safetensors_io import tensor_bytes

RECIPE = """
passes:
  - nm-mask: {pattern: 4:8v3, exclude: [blocks.1.*]}
  - nm-mask: {pattern: 50%, exclude: [blocks.0.*]}
target: eager
bench: {batches: [1], seconds: 0.05}
data: {calibration: 32, validation: 0, held_out: 32}
"""


def test_kinds_of_patterns_are_written_verified_and_recorded(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    model, images = tiny_files
    artifact = mpcompile.compile(model, Recipe.from_yaml(RECIPE), data=images, output=tmp_path / "out")
    by_layer = {row.name: row.pattern for row in artifact.report.layers if row.pattern}
    assert by_layer == {name: "4:8v3" if name.startswith("blocks.0") else "16:32" for name in by_layer}
    proven = Artifact.open(artifact.folder).verify()
    assert {row.layer: row.pattern for row in proven} == by_layer
    assert {row.nm for row in proven} == {NM(4, 8, vocabulary=3), NM(16, 32)}
    recorded = Recipe.from_yaml((artifact.folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert recorded == artifact.report.recipe
    assert [step.params["pattern"] for step in recorded.passes] == ["4:8v3", "16:32|8:16|4:8|2:4"]
    path = artifact.folder / MASKS
    masks = load_file(path)
    fewer = {name: text.replace("v3", "v2") for name, text in by_layer.items()}
    path.write_bytes(tensor_bytes(masks, {"patterns": json.dumps(fewer)}))
    with pytest.raises(MaskError, match=r"the mask itself is not 4:8v2: \d+ of \d+ blocks of 8 .* \(up to 3\)"):
        Artifact.open(artifact.folder).verify()
