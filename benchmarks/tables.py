"""Writes the result tables of README.md and docs/ from benchmarks/results.

    python benchmarks/tables.py

A table stands between <!-- begin NAME --> and <!-- end NAME --> on one of PAGES; the rest of a page is left as it is.
tests/test_readme.py fails if a page differs from what this would write, so no number is older than its file.
"""

import json
from pathlib import Path
from typing import Any

from cpu_vit import cells as speeds
from fashion_vit import COLUMNS, cells
from lib.common import RESULTS, ROOT, markdown, rows_of
from lib.cpu_turns import by_processor
from one_shot import cell

PAGES = ("README.md", "docs/results-accuracy.md", "docs/results-speed.md")
SHOWN = ("2:4", "16:32", "12:32", "1:4", "2:4x4", "merged, dense", "OpenVINO", "torch", "dynamic int8")
# The rows of README's table on speed: threads, model, tokens merged after each attention, batch. docs/results-speed.md
# has all of them.
FASTER = (
    (1, "vit_small_patch16_224", 0, 8),
    (1, "vit_base_patch16_224", 0, 1),
    (1, "vit_base_patch16_224", 0, 8),
    (1, "vit_base_patch16_224", 8, 8),
    (2, "vit_small_patch16_224", 0, 1),
)
OURS, LARGEST = "joint, permutation, refit, repair, residual (ours)", "largest weights, no refit"
FASTER_COLUMNS = ("hardware", "model", "batch", "dense fp32", "2:4 fp32", "1:4 fp32", "dense int8", "fastest")
MEASURED = {"2:4": "2:4", "1:4": "1:4", "int8": "dynamic int8"}
VITS = {"vit_small_patch16_224": "ViT-S/16", "vit_base_patch16_224": "ViT-B/16"}
SMALL = {"fashion_vit": "ViT of 1.2 M parameters", "efficientnet_lite0": "EfficientNet-Lite0, 96 px"}
TRAINED = {
    "fashion_vit": "ViT of 1.2 M parameters, Fashion-MNIST, 2,000 images",
    "efficientnet_lite0": "EfficientNet-Lite0, new head, Fashion-MNIST, 2,000 images",
}
GPU = ("any NVIDIA GPU", "any", "any", "–", "–", "–", "–", "not measured")
Interval = tuple[float, float, float]  # a speed relative to the dense model: median, then 95 % interval


def body(name: str) -> str:
    """The tables of a results file, without its title and its question."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    return text[text.index("\n|") + 1 :]


def orders() -> str:
    """The rows of the first layer of each kind."""
    head, rule, *rows = body("permute").strip().splitlines()
    first: dict[str, str] = {}
    for row in rows:
        kind, layer = row.split(" | ")[:2]
        first.setdefault(kind, layer)
    return "\n".join([head, rule, *(row for row in rows if first[row.split(" | ")[0]] == row.split(" | ")[1])]) + "\n"


def first_table(name: str) -> str:
    """The first table of a results file."""
    return body(name).partition("\n\n")[0] + "\n"


def budget() -> str:
    """Top-1 at half density and at 70 % of the multiply-accumulates, a column a model."""
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
    reason = f"Rank correlation over layers with how much the logits amplify a loss in them: {correlations}."
    return markdown(("signal", *heads), table) + f"\n{reason}\n"


def one_shot() -> str:
    """Top-1 and logit shift of the methods that leave batch statistics alone or have them moved, at 2:4 and 1:4."""
    rows = rows_of("one_shot")
    dense = {row["model"]: row["top1"] for row in rows if row["method"] == "dense"}
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "dense" and "re-estimated" not in m]

    def cells(model: str, method: str, pattern: str) -> tuple[str, str]:
        return cell([r for r in rows if (r["model"], r["method"], r.get("pattern")) == (model, method, pattern)])

    shown = [(model, pattern) for model in dense for pattern in ("2:4", "1:4")]
    heads = [head for model, pattern in shown for head in (f"{model}, {pattern}", "shift")]
    table = [("dense", *(text for model, _ in shown for text in (f"{100 * dense[model]:.2f}", "")))]
    table += [(m, *(text for model, pattern in shown for text in cells(model, m, pattern))) for m in methods]
    return markdown(("method", *heads), table)


def cpu_vit() -> str:
    """A table a processor, of one thread; patterns that run like another one of their density are left out."""
    tables = []
    rows = rows_of("cpu_vit")
    for where, found in by_processor(rows):
        lines = [speeds(row | {"model": row["model"].removesuffix("_patch16_224")}, SHOWN) for row in found]
        tables.append(f"1 thread, {where}:\n\n{markdown(('model', 'batch', 'r', 'dense ms', *SHOWN), lines)}")
    return "\n".join(tables)


def interval(found: Interval) -> str:
    """A speed as a cell: `1.32× [1.20, 1.43]`."""
    return f"{found[0]:.2f}× [{found[1]:.2f}, {found[2]:.2f}]"


def fastest(found: dict[str, Interval]) -> str:
    """The fastest of the measured models, with every one whose 95 % interval overlaps its interval."""
    ratios = {"dense fp32": (1.0, 1.0, 1.0)} | found
    best = max(ratios, key=lambda name: ratios[name][0])
    tied = [name for name in ratios if ratios[name][2] >= ratios[best][1]]
    if "dense fp32" in tied:
        return "no difference"
    return " or ".join(sorted(tied, key=lambda name: -ratios[name][0]))


def faster() -> str:
    """Speed of 2:4 and 1:4 in fp32, and of dense int8, relative to dense fp32: a row per processor, model and batch."""
    rows = [row for row in [*rows_of("cpu_vit"), *rows_of("cpu_vit_2_threads")] if place(row) in FASTER]
    rows.sort(key=lambda row: (row["device"], FASTER.index(place(row))))
    table = []
    for row in rows:
        found = {name: tuple(row["speedup"][key]) for name, key in MEASURED.items()}
        model, batch = VITS[row["model"]] + (f", `--tome {row['r']}`" if row["r"] else ""), str(row["batch"])
        dense = f"{row['dense_ms']:.0f} ms"
        table.append((hardware(row), model, batch, dense, *(interval(found[n]) for n in MEASURED), fastest(found)))
    return markdown(FASTER_COLUMNS, [*table, *small_models(), GPU])


def place(row: dict[str, Any]) -> tuple[int, str, int, int]:
    """What tells a row of cpu_vit from the others of its processor."""
    return row["threads"], row["model"], row["r"], row["batch"]


def hardware(row: dict[str, Any]) -> str:
    """The processor and the number of threads that the model ran on."""
    threads = row.get("threads", 1)
    processor = row["device"].partition(",")[0].replace("(R)", "").removesuffix(" Processor")
    return f"{processor}, {threads} thread{'s' if threads > 1 else ''}"


def small_models() -> list[tuple[str, ...]]:
    """The rows of the two models that patterns were compared on, at batch 8; dense int8 was not timed on them."""
    device = {"device": json.loads((RESULTS / "cpu_choice.json").read_text(encoding="utf-8"))["environment"]["device"]}
    rows = {(row["model"], row["pattern"]): row for row in rows_of("cpu_choice")}
    table = []
    for model, name in SMALL.items():
        found = {pattern: tuple(rows[model, pattern]["speedup"]["8"]) for pattern in ("2:4", "1:4")}
        dense = f"{rows[model, '2:4']['dense_ms']['8']:.0f} ms"
        used = rows[model, "2:4"]["native"]
        result = f"{fastest(found)} (int8 not timed)" if used else "dense: no layer gains on the kernel"
        table.append((hardware(device), name, "8", dense, *map(interval, found.values()), "–", result))
    return table


def accuracy() -> str:
    """Top-1 of each model: dense, at 2:4 by magnitude alone, at 2:4 and 1:4 as compiled, and dense in int8."""

    def percent(rows: list[dict[str, Any]], key: str = "top1") -> str:
        found = [100 * row[key] for row in rows]
        spread = f" [{min(found):.2f}, {max(found):.2f}]" if max(found) > min(found) else ""
        return f"{sum(found) / len(found):.2f} %{spread}" if found else "–"

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
            *(of(model, OURS, pattern) for pattern in ("2:4", "1:4")),
            measured.get(model, "–"),
        )
        for model, name in TRAINED.items()
    ]
    largest, ours = ([row for row in imagenet if row["method"] == method] for method in (LARGEST, OURS))
    dense = percent(ours, "dense_top1")
    table.append(("EfficientNet-Lite0, ImageNet, 400 images", dense, percent(largest), percent(ours), "–", "–"))
    return markdown(
        (
            "model, held-out images",
            "dense",
            "2:4 by magnitude, no refit",
            "2:4 compressed",
            "1:4 compressed",
            "dense int8",
        ),
        table,
    )


def blocks() -> dict[str, str]:
    """The text of each block, by its name."""
    capture = json.loads((RESULTS / "capture.json").read_text(encoding="utf-8"))
    fashion = json.loads((RESULTS / "fashion_vit.json").read_text(encoding="utf-8"))
    rows, where = fashion["rows"], fashion["environment"]
    device = (
        f"{where['processor']}, {where['cores']} cores, ONNX Runtime {where['onnxruntime']}, torch {where['torch']}"
    )
    captured = sum(row["captured"] for row in capture["rows"])
    return {
        "demo": f"Measured on {device}:\n\n"
        + markdown(("", "dense", "compressed", "difference"), [tuple(row) for row in rows[0]["summary"]]),
        "capture": f"{captured} of the {len(capture['rows'])} timm and torchvision architectures tried can be traced "
        "([list, with the reason for each failure](benchmarks/results/capture.md)).\n",
        "accuracy": accuracy(),
        "faster": faster(),
        "results": markdown(COLUMNS, [cells(row) for row in rows]) + f"\nMeasured on {device}.\n",
        "spectra": first_table("spectra"),
        "budget": budget(),
        "permute": orders(),
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
    }


def written() -> dict[Path, str]:
    """Each of PAGES with its tables as the results have them. Exits if a table stands on no page, or on two."""
    texts = {ROOT / page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    for name, block in blocks().items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        pages = [path for path, text in texts.items() for _ in range(text.count(begin))]
        if len(pages) != 1:
            raise SystemExit(f"{len(pages)} blocks are named {name} in {', '.join(PAGES)}; needed is one")
        before, _, rest = texts[pages[0]].partition(begin)
        _, _, after = rest.partition(end)
        texts[pages[0]] = f"{before}{begin}{block}{end}{after}"
    return texts


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
