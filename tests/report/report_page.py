"""Reads the tables of report.html and report.md back, and makes a report that has every section."""

import html
import re
from html.parser import HTMLParser
from typing import Any

from mpcompile.ir.results import Epoch
from mpcompile.measure.timing import Speedup
from mpcompile.report.schema import Report
from mpcompile.report.search_schema import Point, Tuning

UNITS = {"%": 1e-2, "ms": 1.0, "s": 1.0, "G": 1e9, "M": 1e6, "MB": 1e6, "×": 1.0, "points": 1.0}


class PageTables(HTMLParser):
    """The tables of an HTML page: id -> rows of cells, each cell a pair of its text and its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, dict[str, str | None]]]]] = {}
        self.scripts = 0
        self.table, self.in_cell, self.in_remark = "", False, False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if tag == "table":
            self.table = str(dict(attrs)["id"])
            self.tables[self.table] = []
        elif tag == "tr":
            self.tables[self.table].append([])
        elif tag in ("td", "th"):
            self.tables[self.table][-1].append(("", dict(attrs)))
            self.in_cell = True
        elif tag == "small":
            self.in_remark = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False
        elif tag == "small":
            self.in_remark = False

    def handle_data(self, data: str) -> None:
        if self.in_cell and not self.in_remark:
            text, attrs = self.tables[self.table][-1][-1]
            self.tables[self.table][-1][-1] = (text + data, attrs)

    def texts(self, table: str) -> list[list[str]]:
        """The rows of a table as texts, header first."""
        return [[text.strip() for text, _ in row] for row in self.tables[table]]


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text as rows of texts, header first."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        [
            [html.unescape(cell.replace("\\|", "|")).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.splitlines()
            if not line.startswith("|---")
        ]
        for block in blocks
    ]


def jq(report: Any, expression: str) -> float:
    """Evaluates a jq expression of sums, products and paths."""

    def value(match: re.Match[str]) -> str:
        node = report
        for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", match[0]):
            node = node[name] if name else node[int(index)]
        return repr(float(node))

    return float(eval(re.sub(r"\.[a-z_]\w*(?:\.[a-z_]\w*|\[\d+\])*", value, expression), {"__builtins__": {}}))


def read_number(text: str) -> tuple[float, float]:
    """The first number of a text, scaled by its unit, and half a unit of its last digit."""
    match = re.search(
        r"([-+]?\d+)(?:\.(\d+))?(?:e([-+]\d+))?\s?(%|ms\b|GB?\b|MB?\b|s\b|×|points)?", text.replace(",", "")
    )
    assert match, text
    whole, decimals, exponent, unit = match.groups()
    scale = UNITS.get(unit or "", 1.0) * 10.0 ** int(exponent or 0)
    return float(f"{whole}.{decimals or 0}") * scale, 0.5 * 10.0 ** -len(decimals or "") * scale


def with_training_and_tuning(report: Report) -> Report:
    """The report with two epochs of training and a search added."""
    epochs = (Epoch(10, 1.5, 1.0, 0.5, 1e-4, 0.61, 300), Epoch(10, 0.9, None, 0.4, 1e-5, None, None))
    fast = Speedup(1.31, (1.28, 1.35), 40, "dense")
    tuning = Tuning(
        limit=1.0,
        allowed=8,
        images=64,
        batches=(1, 8),
        points=(
            Point("2:4", 0.531, 0.42, 0.11, (fast, fast), True),
            Point("1:4", failed="no layer of it can be masked"),
        ),
        chosen="2:4",
        references=(Point("int8", None, 0.05, 0.02, (fast, fast), True),),
    )
    return report.model_copy(update={"epochs": epochs, "tuning": tuning})
