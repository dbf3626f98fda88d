"""The picture of a search in a terminal: the same dots and labels as in the report, on a grid of characters."""

import pytest
from searches import search_of, tried

from mpcompile.cli.chart_text import DOTS, LEAST_COLUMNS, drawn
from mpcompile.report.chart import Dot
from mpcompile.report.search_chart import tuning
from mpcompile.report.search_schema import Tuning

SEARCH = search_of(
    tried("strong", 6.0, 2.3), tried("middle", 0.7, 1.4), tried("mild", 0.3, 1.2),
    chosen="middle", references=(tried("int8, static", 0.1, 1.7),),
)  # fmt: skip


def lines_of(search: Tuning, columns: int, utf8: bool = True) -> list[str]:
    return drawn(tuning(search), columns, utf8).plain.splitlines()


@pytest.mark.parametrize("columns", [40, 80, 100, 237])
def test_each_recipe_is_a_dot_where_the_chart_has_it(columns: int) -> None:
    chart = tuning(SEARCH)
    title, *rows = lines_of(SEARCH, columns)
    assert title == chart.title
    assert {len(row) for row in rows} == {columns}
    drawn_at = [
        (row, column, mark)
        for row, line in enumerate(rows)
        for column, mark in enumerate(line)
        if mark in {character for character, _ in DOTS.values()}
    ]
    dots = [mark for mark in chart.marks if isinstance(mark, Dot)]
    assert len(drawn_at) == len(dots) == 5
    for dot in dots:  # a cell is 1/rows high and 1/columns wide: a dot is at most one cell off
        assert any(
            mark == DOTS[dot.style][0]
            and abs(row - dot.y / chart.height * len(rows)) <= 1
            and abs(column - dot.x / chart.width * columns) <= 1
            for row, column, mark in drawn_at
        )


def test_labels_do_not_cover_dots_or_each_other() -> None:
    crowded = search_of(*(tried(f"recipe {n}", 0.5, 1.4) for n in range(3)), chosen="recipe 1")
    text = "\n".join(lines_of(crowded, 100))
    assert "recipe 1" in text
    assert "dense" in text


def test_without_utf8_the_picture_is_ascii() -> None:
    assert all(line.isascii() for line in lines_of(SEARCH, 60, utf8=False))


def test_a_narrow_terminal_gets_the_least_width() -> None:
    assert {len(row) for row in lines_of(SEARCH, 10)[1:]} == {LEAST_COLUMNS}
