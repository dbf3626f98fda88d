"""Do the layers of real trained models follow the Marchenko–Pastur law? -> results/spectra.{json,md}, spectrum.svg.

    python benchmarks/spectra.py        # weights of the pretrained models: make bench-models

Every layer of three trained models with its fit and the fit of its own entries shuffled, or the reason for none.
"""

from pathlib import Path
from typing import Any

import numpy as np
from lib.common import RESULTS, ROOT, markdown, write
from lib.pretrained import efficientnet_lite0, vit_small
from torch import nn

from mpcompile.analysis.spectrum import analyse
from mpcompile.driver.analyze import analyze
from mpcompile.frontend.load_model import Request
from mpcompile.report.spectrum_plots import plot_layer, save

SHOWN = "blocks.5.attn.qkv"
QUESTION = "do the layers of real trained models follow the Marchenko–Pastur law, and their shuffled entries?"


def summary(rows: list[dict[str, Any]], model: str) -> tuple[str, ...]:
    """The row of one model."""
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
    """Writes the three files."""
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
    shown = analyse(vit.state_dict()[f"{SHOWN}.weight"].numpy())
    save(plot_layer(f"ViT-S/14  {SHOWN}", shown), RESULTS / "spectrum.svg")
    columns = (
        "model",
        "layers fitted",
        "distance from the law (least / median / most)",
        "the same, shuffled",
        "per cent of the spectrum above the edge",
        "most spikes, shuffled",
    )
    table = markdown(columns, [summary(rows, name) for name in models])
    reasons = markdown(
        ("model", "layer", "why no law was fitted"),
        [(row["model"], row["name"], row["unfitted"]) for row in rows if row["unfitted"]],
    )
    text = f"# Spectra of trained layers\n\n{QUESTION}\n\n{table}\n{reasons}"
    Path(RESULTS / "spectra.md").write_text(text, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
