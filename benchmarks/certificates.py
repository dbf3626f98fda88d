"""Whether certificates hold on images that they were not computed from -> results/certificates.{json,md}.

    python benchmarks/certificates.py        # EfficientNet's weights: make bench-models

The 2,000 held-out images of Fashion-MNIST are split in two halves, and the certificate is computed from the first.
Both halves: the number of predictions that are proved unchanged, and how many of these differ; the theorem says none.
Second half: the share of predictions that agree with the dense model, against the Clopper–Pearson bound that was
computed from the first half.
"""

from dataclasses import replace
from typing import Any

import torch
from budget import models
from lib.common import RESULTS, markdown, write
from lib.pretrained import fashion_data

from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import Certify, NMMask, Permute
from mpcompile.passes.certify import unchanged
from mpcompile.passes.dense_comparison import outputs_of
from mpcompile.pipeline.pass_manager import Pass, PassManager

CASES = {
    "largest weights, no refit": NMMask(criterion="magnitude", refit="none"),
    "joint, refit (ours)": NMMask(),
}
PATTERNS = (NM(2, 4), NM(1, 4))
QUESTION = "Do certificates hold on images that they were not computed from?"


def measure(name: str, model: Model, pattern: NM, method: str, step: NMMask) -> dict[str, Any]:
    """Prunes and certifies the model, and returns its row."""
    data = fashion_data(model.source)
    halves = [replace(data.held_out, order=data.held_out.order[start::2]) for start in (0, 1)]
    steps: list[Pass] = [Permute(), replace(step, pattern=pattern), Certify(attribute=0)]
    result, _ = PassManager(steps).run(model, replace(data, held_out=halves[0]))
    certificate = result.certificate
    assert certificate is not None
    row: dict[str, Any] = {"model": name, "pattern": str(pattern), "method": method}
    row["bound"] = certificate.agreement_bound
    for half, images in zip(("first", "second"), halves, strict=True):
        with torch.no_grad():
            before, after = outputs_of(model.graph, images), outputs_of(result.graph, images)
        proven, same = unchanged(before, after), before.argmax(1) == after.argmax(1)
        row[half] = {
            "images": len(images),
            "proven": int(proven.sum()),
            "flips": int((~same).sum()),
            "flips_of_proven": int((proven & ~same).sum()),
            "agreement": float(same.double().mean()),
        }
    print(row, flush=True)
    return row


def main() -> None:
    """Measures, and writes both results files."""
    rows = [
        measure(name, model, pattern, method, step)
        for name, _, model in models()
        for pattern in PATTERNS
        for method, step in CASES.items()
    ]
    write("certificates", QUESTION, "cpu", ("torch", "timm", "scipy"), rows)
    (RESULTS / "certificates.md").write_text(page(rows), encoding="utf-8")


def page(rows: list[dict[str, Any]]) -> str:
    """Returns the Markdown page: a title and one table."""
    heads = (
        "model", "pattern", "method", "certified, of 2,000", "of these changed", "changed, of 2,000",
        "bound from the first half", "agreement on the second half", "holds",
    )  # fmt: skip
    table = [
        (
            row["model"],
            row["pattern"],
            row["method"],
            f"{row['first']['proven'] + row['second']['proven']:,}",
            str(row["first"]["flips_of_proven"] + row["second"]["flips_of_proven"]),
            f"{row['first']['flips'] + row['second']['flips']:,}",
            f"{row['bound']:.2%}",
            f"{row['second']['agreement']:.2%}",
            "yes" if row["second"]["agreement"] >= row["bound"] else "**no**",
        )
        for row in rows
    ]
    return f"# Certificates and measured agreement\n\n{markdown(heads, table)}"


if __name__ == "__main__":
    main()
