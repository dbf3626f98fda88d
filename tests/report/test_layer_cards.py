"""The picture of a layer's spectrum: histogram and fitted law on one scale."""

import re
from dataclasses import replace

import numpy as np
import pytest
from small_reports import dense_layer

from mpcompile.analysis.spectrum import BINS_TO_EDGE, analyse
from mpcompile.report.layer_cards import AXIS_END, HEIGHT, WIDTH, law
from mpcompile.report.table import Cell


def areas(bars: str, curve: str) -> tuple[float, float]:
    """The areas under the histogram and under the curve, in pixels."""
    x, total = 0.0, 0.0
    for height, end in re.findall(r"V([\d.-]+)H([\d.]+)", bars):
        total += (HEIGHT - float(height)) * (float(end) - x)
        x = float(end)
    points = np.array([[float(value) for value in pair.split(",")] for pair in curve.split()])
    return total, float(np.trapezoid(HEIGHT - points[:, 1], points[:, 0]))


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256), (512, 512)])
def test_for_noise_the_histogram_and_the_law_have_the_same_area(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape) * 0.02
    layer = dense_layer("layer", "", spectrum=analyse(weight, null=False).summary).model_copy(update={"shape": shape})
    picture = law(layer, Cell("edge"), Cell("0"))
    assert picture is not None
    counted, expected = areas(picture.bars, picture.curve)
    # 25 points of the curve, and whole pixels of a picture 110 high.
    assert counted == pytest.approx(expected, rel=0.05)
    assert picture.edge == round(WIDTH / AXIS_END)
    ends = [int(end) for end in re.findall(r"H(\d+)", picture.bars)]  # neighbouring bars of one height are one
    assert ends[-1] == WIDTH
    bins = round(AXIS_END * BINS_TO_EDGE)
    assert set(ends) <= {round((n + 1) * WIDTH / bins) for n in range(bins)}
    assert ends == sorted(set(ends))


def test_a_report_without_a_histogram_has_the_law_alone() -> None:
    weight = np.random.default_rng(0).standard_normal((128, 256))
    spectrum = replace(analyse(weight, null=False).summary, histogram=())
    layer = dense_layer("layer", "", spectrum=spectrum).model_copy(update={"shape": (128, 256)})
    picture = law(layer, Cell("edge"), Cell("0"))
    assert picture is not None
    assert picture.bars == ""
    assert picture.curve
