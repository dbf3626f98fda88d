"""Sentences on the number format of a layer and on the kernel that runs it."""

from collections.abc import Iterator

from mpcompile.report.explained_values import amount
from mpcompile.report.schema import LayerRow, Report


def number_format(report: Report, row: LayerRow) -> Iterator[tuple[str, str]]:
    """Whether the layer is in 8 bits, and why not; nothing for models that are not in 8 bits."""
    if report.quantized is None:
        return
    if row.precision is None:
        yield "format", f"It stays in floating point: {row.unquantized or 'no pass quantised it'}."
        return
    rounding = ""
    if row.rounding_error is not None:
        rounding = f" Rounding its weights costs a relative squared error of {amount(row.rounding_error)}."
    yield "format", f"Its weights and inputs are in {row.precision}.{rounding}"
    ran = next((each for each in report.quantized.kernels if each.layer == row.name), None)
    if ran is None:
        yield "format", "Which operator ran it is unknown: the target did not report it."
        return
    time = f", {ran.ms:.3g} ms a call" if ran.ms is not None else ""
    if ran.in_8_bits:
        own = " of mpcompile" if ran.native else ""
        operator = f", {ran.kernel}" if ran.kernel else ""
        yield "format", f"The target ran it on an 8-bit kernel{own}{operator}{time}."
    else:
        yield "format", f"The target ran it in floating point all the same{time}: {ran.reason}."


def kernel(report: Report, row: LayerRow) -> Iterator[tuple[str, str]]:
    """Whether the mask saves time on the target, and why not; nothing for dense layers."""
    if row.pattern is None:
        return
    target = report.recipe.target
    verdict = next((v for v in report.verdicts if v.layer == (row.shares_weight_with or row.name)), None)
    if verdict is None:
        why = report.idle or (
            "the target reports no choice" if report.accelerated else "it has no kernel for this pattern"
        )
        saves = "" if report.idle or report.accelerated else " Its zeros save no time."
        yield "kernel", f"Which kernel runs it on the target {target} is unknown: {why}.{saves}"
        return
    times = ""
    if verdict.dense_ms and verdict.sparse_ms:
        times = f" It took {verdict.sparse_ms:.3g} ms with sparse kernels and {verdict.dense_ms:.3g} ms without"
        # The times are those of one profile. Why a kernel was not chosen is told by the reason, and not by their ratio.
        times += f": {verdict.times_as_fast:.2f} times as fast." if verdict.chosen else "."
    if verdict.chosen:
        name = f" {verdict.kernel}" if verdict.kernel else ""
        yield "kernel", f"The target {target} runs it on the sparse kernel{name}: {verdict.reason}.{times}"
    elif verdict.chosen is False:
        yield "kernel", f"The target {target} runs it on a dense kernel: {verdict.reason}.{times}"
    else:
        yield "kernel", f"Which kernel the target {target} runs it on is unknown: {verdict.reason}.{times}"
    if verdict.eligible is False:
        yield "kernel", f"The rule that decides this is {verdict.rule}."
