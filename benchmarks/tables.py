"""The result tables of README.md and docs/, written from benchmarks/results.

    python benchmarks/tables.py

Each table is between <!-- begin NAME --> and <!-- end NAME --> on one of PAGES; the rest of the page is not changed.
tests/test_readme.py fails if a page differs from what this script writes, so every number is that of its results file.
"""

import json
import re
from pathlib import Path
from typing import Any

from cpu_vit import cells as vit_cells
from demo import COLUMNS as DEMO_COLUMNS
from fashion_vit import COLUMNS, cells
from lib.common import RESULTS, ROOT, markdown, mean_and_range, rows_of
from lib.cpu_timing import by_processor
from lib.results_text import body, first_table, int8_products, sections
from one_shot import cell

PAGES = ("README.md", "docs/results-accuracy.md", "docs/results-speed.md")
SHOWN = ("2:4", "16:32", "12:32", "1:4", "2:4x4", "merged, dense", "OpenVINO", "torch", "dynamic int8")
# The rows of README's table of speeds: threads, model, tokens merged after each attention, batch size. All rows are in
# docs/results-speed.md.
README_ROWS = (
    (1, "vit_base_patch16_224", 0, 1),
    (1, "vit_base_patch16_224", 0, 8),
)
OURS = "joint, permutation, refit, repair, residual (ours)"
PATTERNS = ("2:4", "8:16", "1:4")  # of the table of accuracies
OURS_IMAGENET, MAGNITUDE_IMAGENET = "ours", "magnitude, statistics moved"
IMAGENET = {
    "efficientnet_lite0": "EfficientNet-Lite0, ImageNet, 400 images",
    "efficientnet_lite1": "EfficientNet-Lite1, ImageNet, 400 images",
}
SPEED_COLUMNS = ("hardware", "model", "batch", "dense fp32", "2:4 fp32", "1:4 fp32", "dense int8", "fastest")
# Columns of the README's table in int8, and the names in cpu_vit_int8; None stands for the row's best dense int8 file.
INT8_COLUMNS: dict[str, str | None] = {
    "best of ONNX Runtime, dense": None,
    "OpenVINO, dense": "OpenVINO, int8",
    "ours, dense": "ours, int8, dense",
    "2:4": "ours, int8, 2:4",
    "2:4x4": "ours, int8, 2:4x4",
    "4:16": "ours, int8, 4:16",
    "2:4x4, `--tome 8`": "ours, int8, 2:4x4, r = 8",
}
MEASURED = {"2:4": "2:4", "1:4": "1:4", "int8": "dynamic int8"}
VITS = {"vit_small_patch16_224": "ViT-S/16", "vit_base_patch16_224": "ViT-B/16"}
SMALL = {"fashion_vit": "ViT of 1.2 M parameters", "efficientnet_lite0": "EfficientNet-Lite0, 96 px"}
TRAINED = {
    "fashion_vit": "ViT of 1.2 M parameters, Fashion-MNIST, 2,000 images",
    "efficientnet_lite0": "EfficientNet-Lite0, new head, Fashion-MNIST, 2,000 images",
}
INSTRUCTIONS = {"avx2": "AVX2", "avx512": "AVX-512", "avx512vnni": "AVX-512 with VNNI"}
Interval = tuple[float, float, float]  # a speed relative to the dense model: median, then 95 % interval


def channel_orders() -> str:
    """Returns the table of channel orders with one layer of each kind, the first."""
    head, rule, *rows = body("permute").strip().splitlines()
    first: dict[str, str] = {}
    for row in rows:
        kind, layer = row.split(" | ")[:2]
        first.setdefault(kind, layer)
    return "\n".join([head, rule, *(row for row in rows if first[row.split(" | ")[0]] == row.split(" | ")[1])]) + "\n"


def budget() -> str:
    """Returns the table of budget signals: top-1 at two densities and at two shares of MACs, for each model."""
    rows = rows_of("budget")
    dense = {row["model"]: row["top1"] for row in rows if row["kind"] == "dense"}
    chosen = [("density", 0.6), ("density", 0.5), ("2:4", 0.8), ("2:4", 0.7)]

    def cell(signal: str, model: str, kind: str, at: float) -> str:
        same = [row for row in rows if (row["model"], row["kind"]) == (model, kind)]
        tops = [row["top1"] for row in same if (row["at"], row["signal"]) == (at, signal)]
        return f"{100 * sum(tops) / len(tops):.1f}"

    signals = list(dict.fromkeys(row["signal"] for row in rows if "signal" in row))
    heads = [f"{model}, {'density' if k == 'density' else '2:4, MACs'} {at:g}" for model in dense for k, at in chosen]
    table = [(signal, *(cell(signal, m, k, at) for m in dense for k, at in chosen)) for signal in signals]
    table.insert(0, ("dense", *(f"{100 * dense[m]:.1f}" for m in dense for _ in chosen)))
    correlations = "; ".join(
        f"{row['edge']:+.2f} for σ₊ and {row['std']:+.2f} for the standard deviation on {row['model']}"
        for row in rows
        if "edge" in row
    )
    reason = f"Rank correlation, over layers, with how strongly removing weights changes the logits: {correlations}."
    return markdown(("signal", *heads), table) + f"\n{reason}\n"


def one_shot() -> str:
    """Returns top-1 and logit shift by method at 2:4 and 1:4, without the re-estimated batch-norm statistics."""
    rows = rows_of("one_shot")
    dense = {row["model"]: row["top1"] for row in rows if row["method"] == "dense"}
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "dense" and "re-estimated" not in m]

    def cells(model: str, method: str, pattern: str) -> tuple[str, str]:
        return cell([r for r in rows if (r["model"], r["method"], r.get("pattern")) == (model, method, pattern)])

    chosen_columns = [(model, pattern) for model in dense for pattern in ("2:4", "1:4")]
    heads = [head for model, pattern in chosen_columns for head in (f"{model}, {pattern}", "shift")]
    table = [("dense", *(text for model, _ in chosen_columns for text in (f"{100 * dense[model]:.2f}", "")))]
    table += [(m, *(text for model, pattern in chosen_columns for text in cells(model, m, pattern))) for m in methods]
    return markdown(("method", *heads), table)


def cpu_vit() -> str:
    """Returns a table per processor, on one thread; a pattern as fast as another one of its density is omitted."""
    tables = []
    rows = rows_of("cpu_vit")
    for heading, own in by_processor(rows):
        lines = [vit_cells(row | {"model": row["model"].removesuffix("_patch16_224")}, SHOWN) for row in own]
        tables.append(f"1 thread, {heading}:\n\n{markdown(('model', 'batch', 'r', 'dense ms', *SHOWN), lines)}")
    return "\n".join(tables)


def speed_cell(speed: Interval) -> str:
    """Returns a speed as a cell: `1.32× [1.20, 1.43]`."""
    return f"{speed[0]:.2f}× [{speed[1]:.2f}, {speed[2]:.2f}]"


def fastest(speeds: dict[str, Interval]) -> str:
    """Returns the fastest model, and the others whose 95 % interval overlaps its interval.

    If dense fp32 is among them, the text is "no difference".
    """
    ratios = {"dense fp32": (1.0, 1.0, 1.0)} | speeds
    best = max(ratios, key=lambda name: ratios[name][0])
    tied = [name for name in ratios if ratios[name][2] >= ratios[best][1]]
    if "dense fp32" in tied:
        return "no difference"
    return " or ".join(sorted(tied, key=lambda name: -ratios[name][0]))


def readme_speeds() -> str:
    """Returns the speeds of 2:4 and 1:4 in fp32 and of dense int8, relative to dense fp32, by processor and model."""
    rows = [row for row in [*rows_of("cpu_vit"), *rows_of("cpu_vit_2_threads")] if row_key(row) in README_ROWS]
    rows.sort(key=lambda row: (row["device"], README_ROWS.index(row_key(row))))
    table = []
    for row in rows:
        speeds = {name: tuple(row["speedup"][key]) for name, key in MEASURED.items()}
        model, batch = VITS[row["model"]] + (f", `--tome {row['r']}`" if row["r"] else ""), str(row["batch"])
        dense = f"{row['dense_ms']:.0f} ms"
        cells = (speed_cell(speeds[name]) for name in MEASURED)
        table.append((hardware(row), model, batch, dense, *cells, fastest(speeds)))
    return markdown(SPEED_COLUMNS, [*table, *small_models()])


def readme_int8_speeds() -> str:
    """Returns the speeds of whole ViTs in int8 at batch 1, relative to dense fp32, by processor and threads."""
    table = []
    for row in rows_of("cpu_vit_int8"):
        if row["batch"] != 1:
            continue
        over = row["over_fp32"]
        found = [over.get(name or row["best_int8"]) for name in INT8_COLUMNS.values()]
        cells = ("–" if speed is None else f"{speed[0]:.2f}×" for speed in found)
        dense = f"{row['ms']['ONNX Runtime, fp32']:.0f} ms"
        table.append((hardware(row), VITS[row["model"]], dense, *cells))
    return markdown(("hardware", "model", "dense fp32", *INT8_COLUMNS), table)


def row_key(row: dict[str, Any]) -> tuple[int, str, int, int]:
    """Returns the values that identify a row of cpu_vit among those of its processor."""
    return row["threads"], row["model"], row["r"], row["batch"]


def hardware(row: dict[str, Any]) -> str:
    """Returns the processor, the number of threads and, if the row names them, the instructions of its kernel."""
    threads = row.get("threads", 1)
    processor = row["device"].partition(",")[0].replace("(R)", "").removesuffix(" Processor")
    named = re.search(r"kernel (\w+)", row["device"])
    instructions = [INSTRUCTIONS[named[1]]] if named else []
    return ", ".join([processor, f"{threads} thread{'s' if threads > 1 else ''}", *instructions])


def small_models() -> list[tuple[str, ...]]:
    """Returns the rows of the two models in cpu_choice, at batch 8; dense int8 was not timed on them."""
    device = {"device": json.loads((RESULTS / "cpu_choice.json").read_text(encoding="utf-8"))["environment"]["device"]}
    rows = {(row["model"], row["pattern"]): row for row in rows_of("cpu_choice")}
    table = []
    for model, name in SMALL.items():
        speeds = {pattern: tuple(rows[model, pattern]["speedup"]["8"]) for pattern in ("2:4", "1:4")}
        dense = f"{rows[model, '2:4']['dense_ms']['8']:.0f} ms"
        kernel_layers = rows[model, "2:4"]["native"]
        result = f"{fastest(speeds)} (int8 not timed)" if kernel_layers else "dense: no layer is faster on the kernel"
        table.append((hardware(device), name, "8", dense, *map(speed_cell, speeds.values()), "–", result))
    return table


def accuracy() -> str:
    """Returns top-1 of each model: dense, 2:4 by magnitude without refit, each of PATTERNS, and dense int8."""

    def percent(rows: list[dict[str, Any]], key: str = "top1") -> str:
        values = [100 * row[key] for row in rows]
        if not values:
            return "–"
        return mean_and_range(values, "{:.2f} %", "{:.2f}")

    def of(model: str, method: str, pattern: str | None = None) -> str:
        return percent([r for r in shot if (r["model"], r["method"], r.get("pattern")) == (model, method, pattern)])

    shot, imagenet = rows_of("one_shot"), rows_of("one_shot_imagenet")
    [int8] = [
        r
        for r in rows_of("int8_baselines")
        if (r["kind"], r["when"], r["saturates"]) == ("int8, dynamic", "now", False)
    ]
    measured = {
        "fashion_vit": f"{100 * int8['top1']:.2f} % of {100 * int8['dense_top1']:.2f} %, {int8['count']} images"
    }
    table = [
        (
            name,
            of(model, "dense"),
            of(model, "magnitude", "2:4"),
            *(of(model, OURS, pattern) for pattern in PATTERNS),
            measured.get(model, "–"),
        )
        for model, name in TRAINED.items()
    ]
    for model, name in IMAGENET.items():
        by_method = {
            (method, pattern): [
                row for row in imagenet if (row["model"], row["method"], row["pattern"]) == (model, method, pattern)
            ]
            for method in (MAGNITUDE_IMAGENET, OURS_IMAGENET)
            for pattern in PATTERNS
        }
        compressed = [row for rows in by_method.values() for row in rows]
        if not compressed:
            continue
        dense = percent(by_method[OURS_IMAGENET, "2:4"] or compressed, "dense_top1")
        ours = (percent(by_method[OURS_IMAGENET, pattern]) for pattern in PATTERNS)
        table.append((name, dense, percent(by_method[MAGNITUDE_IMAGENET, "2:4"]), *ours, "–"))
    heads = ("model, held-out images", "dense", "2:4 by magnitude, no refit", *PATTERNS, "dense int8")
    return markdown(heads, table)


def demo() -> str:
    """Returns the table that `make demo` prints, with the processor and the versions of that run."""
    content = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    [row] = content["rows"]
    table = markdown(DEMO_COLUMNS, [tuple(cells) for cells in row["table"]])
    return f"Measured on {machine_of(content)}:\n\n{table}"


def machine_of(content: dict[str, Any]) -> str:
    """Returns the processor, its cores and the versions that a results file was measured with."""
    machine = content["environment"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, ONNX Runtime {machine['onnxruntime']}, "
        f"torch {machine['torch']}"
    )


def blocks() -> dict[str, str]:
    """Returns the text of each block by its name in the pages."""
    capture = json.loads((RESULTS / "capture.json").read_text(encoding="utf-8"))
    fashion = json.loads((RESULTS / "fashion_vit.json").read_text(encoding="utf-8"))
    rows, device = fashion["rows"], machine_of(fashion)
    captured = sum(row["captured"] for row in capture["rows"])
    return {
        "demo": demo(),
        "capture": f"{captured} of the {len(capture['rows'])} architectures of timm, torchvision and transformers that "
        "were tried are captured ([list, with the reason for each failure](benchmarks/results/capture.md)).\n",
        "accuracy": accuracy(),
        "faster": readme_speeds(),
        "faster_int8": readme_int8_speeds(),
        **{name: sections(name) for name in ("cpu_vit_int8", "cpu_conv_int8")},
        "cpu_int8_gemm": int8_products(),
        "results": markdown(COLUMNS, [cells(row) for row in rows]) + f"\nMeasured on {device}.\n",
        "spectra": first_table("spectra"),
        "budget": budget(),
        "permute": channel_orders(),
        "one_shot": one_shot(),
        "one_shot_imagenet": body("one_shot_imagenet"),
        "certificates": first_table("certificates"),
        "token_merging": first_table("token_merging"),
        "distill": first_table("distill"),
        "speed": body("analyze_speed"),
        "cpu_vit": cpu_vit(),
        "server": body("server"),
        "cpu_choice": body("cpu_choice"),
        "int8": body("int8_baselines"),
        "int8_files": body("int8"),
    }


def written() -> dict[Path, str]:
    """Returns the new text of each of PAGES. Raises SystemExit unless each block is on exactly one page."""
    texts = {ROOT / page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    for name, block in blocks().items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        pages = [path for path, text in texts.items() for _ in range(text.count(begin))]
        if len(pages) != 1:
            raise SystemExit(f"{', '.join(PAGES)} have {len(pages)} blocks <!-- begin {name} -->; write exactly one")
        before, _, rest = texts[pages[0]].partition(begin)
        _, _, after = rest.partition(end)
        texts[pages[0]] = f"{before}{begin}{block}{end}{after}"
    return texts


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
