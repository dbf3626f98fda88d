"""Fills README's tables from benchmarks/results: what stands between <!-- begin NAME --> and <!-- end NAME -->.

    python benchmarks/readme.py

A test holds README to what this would write, so that no number in it is older than its file.
"""

import json
import re

from common import RESULTS, ROOT, markdown
from fashion_vit import COLUMNS, cells


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
