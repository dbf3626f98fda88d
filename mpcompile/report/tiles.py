"""The four tiles at the top of a report: accuracy, speed, size, and the predictions that are proven unchanged.

A tile judges only what the run measured. Its parts are texts and cells; every number is a cell with its key, so that a
test compares it with report.json.
"""

from mpcompile.report.accuracy_tile import accuracy
from mpcompile.report.schema import NATIVE, Report
from mpcompile.report.speed_tile import speed
from mpcompile.report.table import Cell, number
from mpcompile.report.tile import Phrase, State, Tile

DENSE, COMPRESSED = "dense.onnx", "model.onnx"


def tiles(report: Report) -> tuple[Tile, ...]:
    """The four tiles of a report."""
    return accuracy(report), speed(report), size(report), proof(report)


def size(report: Report) -> Tile:
    """The file that is deployed beside the dense one, and the multiply-accumulates that remain.

    The file is model.native.onnx if the run wrote it: that file stores masked weights packed.
    """
    name = NATIVE if report.onnx_bytes(NATIVE) else COMPRESSED
    before, after = bytes_of(report, DENSE), bytes_of(report, name)
    ratio = (after.value or 0) / (before.value or 1)
    figure = Cell(f"{ratio:.2f}×", ratio, f"({after.key}) / ({before.key})")
    lines: list[Phrase] = [(f"{name} ", after, "; dense ", before)]
    if name != COMPRESSED:
        lines.append((f"{COMPRESSED} ", bytes_of(report, COMPRESSED), ", zeros stored"))
    left = Cell(
        f"{report.cost.compressed / report.cost.dense:.1%}",
        report.cost.compressed / report.cost.dense,
        ".cost.compressed / .cost.dense",
    )
    lines.append((left, " of the multiply-accumulates are left, with zeros skipped"))
    state: State = "fact"
    word = "as large as dense"
    if round(ratio, 2) != 1:
        state, word = ("good", "smaller than dense") if ratio < 1 else ("bad", "larger than dense")
    return Tile("size", "Size of the ONNX file", state, word, (figure, " of dense"), tuple(lines))


def bytes_of(report: Report, name: str) -> Cell:
    """The size of an ONNX file with its external weights."""
    keys = [f".files[{n}].bytes" for n, row in enumerate(report.files) if row.name in (name, f"{name}.data")]
    size_bytes = report.onnx_bytes(name)
    return Cell(f"{size_bytes / 1e6:.2f} MB", float(size_bytes), " + ".join(keys), name)


def proof(report: Report) -> Tile:
    """The share of held-out predictions that are proven unchanged, and the bound for unseen images."""
    title, found, c = "Predictions proven unchanged", report.certificate, report.comparison
    if found is None:
        todo = "The recipe has no pass certify. Add it to the passes to get a proof."
        if report.of_values():
            title = "Proof"
        if c is None:
            todo = "No images were given. Run the same command with --data IMAGES to get a proof."
        elif not report.certifiable():
            todo = "The outputs do not have one decision for each image, so nothing can be proven about them."
        return Tile("proof", title, "none", "not proven", todo=todo)
    share = number(found.proven / found.images, "{:.2%}", ".certificate.proven / .certificate.images")
    bound = number(found.agreement_bound, "{:.2%}", ".certificate.agreement_bound")
    level = number(found.confidence, "{:.0%}", ".certificate.confidence")
    count = number(found.images, "{:,.0f}", ".certificate.images")
    same = number(found.agreeing / found.images, "{:.2%}", ".certificate.agreeing / .certificate.images")
    lines: tuple[Phrase, ...] = (
        ("same answer on ", same, " of ", count, " held-out images"),
        ("unseen images: same answer on at least ", bound, ", ", level, " confidence"),
    )
    return Tile("proof", title, "fact", "proven", (share,), lines)
