"""The picture of the captured graph: rows, arcs and colours follow the operations and their numbers."""

import re

import pytest
from small_reports import small_report

from mpcompile.ir.graph_node import GraphNode
from mpcompile.report.graph_picture import DOTS, LEVELS, ROW, GraphPicture, graph_picture
from mpcompile.report.layer_values import losses
from mpcompile.report.schema import Report

FC1, FC2 = "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"


@pytest.fixture
def report() -> Report:
    graph = (
        GraphNode("images", "input", "input", ()),
        GraphNode(FC1, "Linear", "blocks.0", (0,), True, FC1),
        GraphNode("gelu", "gelu", "blocks.0", (1,)),
        GraphNode(FC2, "Linear", "blocks.0", (2,), True, FC2),
        GraphNode("add", "add", "blocks.0", (0, 3)),
        GraphNode("add_1", "add", "blocks.0", (1, 4)),
        GraphNode("head", "Linear", "head", (5,), True, "head"),
        GraphNode("output", "output", "head", (6,)),
    )
    return small_report().model_copy(update={"graph": graph})


def picture(report: Report) -> GraphPicture:
    found = graph_picture(report)
    assert found is not None
    return found


def test_modules_have_their_operations_and_name_what_they_read(report: Report) -> None:
    groups = picture(report).groups
    assert [(group.name, group.reads) for group in groups] == [
        ("input", ()), ("blocks.0", ("input",)), ("head", ("blocks.0",))
    ]  # fmt: skip
    assert [row.text for row in groups[1].operations] == [
        "mlp.fc1 · Linear", "gelu", "mlp.fc2 · Linear", "add", "add"
    ]  # fmt: skip
    assert [row.y for row in groups[1].operations] == [ROW * n + ROW // 2 for n in range(5)]
    names = [row.name for row in report.layers]
    assert [row.layer for row in groups[1].operations if row.layer is not None] == [
        names.index(name) for name in (FC1, FC2) if name in names
    ]


def test_each_input_within_a_module_is_a_line_and_those_from_outside_come_from_the_top(report: Report) -> None:
    arcs = picture(report).groups[1].arcs
    ends = [tuple(map(int, re.findall(r"-?\d+", arc))) for arc in arcs]
    rows = {(numbers[1] // ROW, numbers[-1] // ROW) for numbers in ends}
    assert rows == {(0, 1), (1, 2), (2, 3), (0, 3), (3, 4), (0, 4)}
    assert sum(numbers[1] == 0 for numbers in ends) == 1  # add reads the images, which are above the module
    assert all(0 <= numbers[0] <= DOTS for numbers in ends)
    curved = [numbers for arc, numbers in zip(arcs, ends, strict=True) if "C" in arc]
    assert all(0 < numbers[2] < DOTS for numbers in curved)


def test_the_layer_that_loses_most_has_the_strongest_colour(report: Report) -> None:
    found = losses(report)
    assert found is not None
    rows = [row for group in picture(report).groups for row in group.operations]
    levels = {report.layers[row.layer].name: row.loss for row in rows if row.layer is not None}
    shown = {name: value for name, value in found.values.items() if name in levels}
    assert shown
    most = max(found.values.values())
    for name, level in levels.items():
        assert level == (1 + min(int(LEVELS * shown[name] / most), LEVELS - 1) if name in shown else 0)


def test_reports_without_a_graph_or_numbers_have_no_picture_or_no_colours(report: Report) -> None:
    assert graph_picture(report.model_copy(update={"graph": ()})) is None
    bare = report.model_copy(
        update={
            "certificate": None,
            "verdicts": (),
            "quantized": None,
            "layers": tuple(
                row.model_copy(update={"missed": None, "rounding_error": None, "macs_left": None})
                for row in report.layers
            ),
        }
    )
    found = picture(bare)
    assert (found.loss, found.time) == (None, None)
    assert {row.loss + row.time for group in found.groups for row in group.operations} == {0}
