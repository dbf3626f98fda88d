"""Fills README's tables from benchmarks/results: what stands between <!-- begin NAME --> and <!-- end NAME -->.

    python benchmarks/readme.py

A test holds README to what this would write, so that no number in it is older than its file.
"""

import json
import re

from cpu_vit import cells as speeds
from fashion_vit import COLUMNS, cells
from lib.common import RESULTS, ROOT, markdown, rows_of
from lib.cpu_turns import by_processor
from one_shot import cell

SHOWN = ("2:4", "16:32", "12:32", "1:4", "2:4x4", "merged, dense", "OpenVINO", "torch", "dynamic int8")


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
    told = "; ".join(
        f"{row['edge']:+.2f} for σ₊ and {row['std']:+.2f} for the standard deviation on {row['model']}"
        for row in rows
        if "edge" in row
    )
    reason = f"Rank correlation over layers with how much the logits amplify a loss in them: {told}."
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


def blocks() -> dict[str, str]:
    """The text of each block of README."""
    capture = json.loads((RESULTS / "capture.json").read_text(encoding="utf-8"))
    fashion = json.loads((RESULTS / "fashion_vit.json").read_text(encoding="utf-8"))
    rows, where = fashion["rows"], fashion["environment"]
    demo = markdown(("", "dense", "compressed", "difference"), [tuple(row) for row in rows[0]["summary"]])
    device = (
        f"{where['processor']}, {where['cores']} cores, ONNX Runtime {where['onnxruntime']}, torch {where['torch']}"
    )
    captured = sum(row["captured"] for row in capture["rows"])
    return {
        "demo": f"What the demo prints, here on {device}:\n\n{demo}",
        "capture": f"{captured} of the {len(capture['rows'])} timm and torchvision architectures tried are captured "
        "([table, with a reason for each other](benchmarks/results/capture.md)).\n",
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
        "results": markdown(COLUMNS, [cells(row) for row in rows]) + f"\nMeasured on {device}.\n",
    }


def filled(text: str) -> str:
    """README with every block as the results have it."""
    for name, block in blocks().items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(pattern, lambda m, block=block: m[1] + block + m[2], text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"README.md has {count} blocks named {name}; needed is one")
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
