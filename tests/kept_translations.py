"""Translations to ONNX kept between the tests of a process: most compile a tiny model of a structure met before.

Translating takes seconds, in all a fourth of the suite's time. A run keeps its own translation for all its files
(mpcompile/export/translation.py); here a later test takes it over too, on the same condition.
"""

from collections.abc import Sequence
from typing import Any

import pytest

from mpcompile.export import translation
from mpcompile.export.translation import Translation, key_of
from mpcompile.ir.model import Model

LARGEST_KEPT = 1_000_000  # parameters; a translation holds those of the model that it was made from
TRANSLATE = translation._translated  # for tests that are about the translation itself


def keep_translations(patched: pytest.MonkeyPatch) -> None:
    """A model gets the translation of an earlier one that differs in values of weights only."""
    made: dict[tuple[str, tuple[str, ...]], Any] = {}

    def kept(model: Model, batch: int | None, opset: int, output_names: Sequence[str]) -> Any:
        key = key_of(model, batch, opset), tuple(output_names)
        if key in made and Translation(key[0], made[key], key[1], batch).serves(model, batch, opset):
            return made[key]
        program = TRANSLATE(model, batch, opset, output_names)
        if sum(weight.numel() for weight in model.graph.parameters()) <= LARGEST_KEPT:
            made[key] = program
        return program

    patched.setattr(translation, "_translated", kept)
