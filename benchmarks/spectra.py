"""Fit of the Marchenko–Pastur law to trained models -> results/spectra.{json,md}, spectrum.svg.

    python benchmarks/spectra.py        # weights of the pretrained models: make bench-models

Each layer of three trained models is fitted twice: its weights, and the same weights randomly shuffled. If a layer
cannot be fitted, the reason is listed.
"""

from typing import Any

import numpy as np
from lib.common import RESULTS, ROOT, markdown, write
from lib.pretrained import efficientnet_lite0, vit_small
from torch import nn

from mpcompile.analysis.spectrum import analyse
from mpcompile.driver.analyze import analyze
from mpcompile.frontend.load_model import Request
from mpcompile.report.spectrum_plots import plot_layer, save

PLOTTED = "blocks.5.attn.qkv"
QUESTION = "Do the layers of trained models follow the Marchenko–Pastur law, and do their shuffled weights?"


def summary(rows: list[dict[str, Any]], model: str) -> tuple[str, ...]:
    """Returns the row of one model as cells of the table."""
    own = [row for row in rows if row["model"] == model]
    fitted = [row for row in own if row["fit"]]

    def spread(values: list[float], digits: int = 3) -> str:
        return f"{min(values):.{digits}f} / {np.median(values):.{digits}f} / {max(values):.{digits}f}"

    return (
        model,
        f"{len(fitted)} of {len(own)}",
        spread([row["fit"]["central_error"] for row in fitted]),
        spread([row["null"]["central_error"] for row in fitted]),
        spread([100 * row["fit"]["spikes"] / row["fit"]["p"] for row in fitted], 1),
        str(max(row["null"]["spikes"] for row in fitted)),
    )


def main() -> None:
    """Fits all layers, and writes the three results files."""
    vit = vit_small()
    models: dict[str, nn.Module | Request] = {
        "ViT-S/14": vit,
        "EfficientNet-Lite0": efficientnet_lite0(),
        "fashion_vit": Request(str(ROOT / "examples" / "fashion_vit" / "model.safetensors")),
    }
    rows = []
    for name, model in models.items():
        for row in analyze(model).model_dump(mode="json")["layers"]:
            assert row["fit"] or row["unfitted"], row["name"]
            rows.append({"model": name, **row})
    write("spectra", QUESTION, "cpu", ("torch", "timm", "scipy"), rows)
    spectrum = analyse(vit.state_dict()[f"{PLOTTED}.weight"].numpy())
    save(plot_layer(f"ViT-S/14  {PLOTTED}", spectrum), RESULTS / "spectrum.svg")
    columns = (
        "model",
        "layers fitted",
        "distance from the law (least / median / most)",
        "the same, shuffled weights",
        "per cent of the spectrum above the edge",
        "most spikes, shuffled weights",
    )
    table = markdown(columns, [summary(rows, name) for name in models])
    reasons = markdown(
        ("model", "layer", "reason without a fit"),
        [(row["model"], row["name"], row["unfitted"]) for row in rows if row["unfitted"]],
    )
    text = f"# Spectra of trained layers\n\n{QUESTION}\n\n{table}\n{reasons}"
    (RESULTS / "spectra.md").write_text(text, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
