"""Accuracy of ONNX Runtime's int8 files of the example, relative to dense -> results/int8_baselines.{json,md}.

    python benchmarks/int8_baselines.py [--images 256] [--emulator "qemu-x86_64 -cpu max"]

The reports of `--tune` compare compressed models with these int8 files. Two ways to make them are measured:

- before, up to commit 58aa4e4: 8-bit weights on every processor; dynamic quantisation has one weight scale per tensor;
- now: one weight scale per output channel. If int8 products saturate on the processor, weights have 7 bits where that
  brings the logits of the calibration images closer to dense.

With --emulator, both are measured a second time on an emulated processor. qemu-x86_64 7.2 has AVX2, and neither AVX-512
nor VNNI. Speed is not measured.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lib.common import RESULTS, ROOT, markdown, write
from lib.cpu_timing import processor_name

from mpcompile.driver.inputs import captured, data_for, loaded_from
from mpcompile.export.onnx_export import lower
from mpcompile.recipe.schema import DataChoice

QUESTION = "How much do ONNX Runtime's int8 files of the example differ from dense, and does the processor matter?"
EXAMPLE = ROOT / "examples" / "fashion_vit"
CALIBRATION = 64  # images, as in the tuning loop
COLUMNS = ("processor", "products", "kind", "", "weights", "mean shift", "largest shift", "same answer", "top-1")


def prepare(folder: Path, images: int) -> None:
    """Writes the dense file and the images that int8_worker.py reads."""
    loaded, request = loaded_from(EXAMPLE / "model.safetensors")
    dense = captured(loaded, request)
    lower(dense, folder / "dense.onnx")
    data = data_for(EXAMPLE / "images.npz", dense, DataChoice())
    held_out = data.held_out.first(images)
    labels = np.concatenate([labels.numpy() for _, labels in data.held_out.batches()])[:images]
    calibration = data.calibration.first(CALIBRATION).numpy()
    np.savez(folder / "images.npz", calibration=calibration, held_out=held_out.numpy(), labels=labels)


def measured(folder: Path, emulator: list[str]) -> list[dict[str, Any]]:
    """Returns the rows of this processor, or of the one that `emulator`, the words of a command, emulates."""
    command = [*emulator, sys.executable, str(Path(__file__).parent / "lib" / "int8_worker.py"), str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    device = f"{shlex.join(emulator)}: AVX2, no VNNI; emulated on {processor_name()}" if emulator else processor_name()
    return [{"device": device, "saturates": result["saturates"], **row} for row in result["rows"]]


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the row as cells of the table."""
    return (
        row["device"],
        "saturate" if row["saturates"] else "exact",
        row["kind"],
        row["when"],
        row["method"].partition(":")[0].partition(", since")[0],
        f"{row['shift']:.3f}",
        f"{row['shift_max']:.3f}",
        f"{row['agreement']:.2%}",
        f"{row['top1']:.2%}",
    )


def main() -> None:
    """Measures, and writes both results files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="number of held-out images")
    parser.add_argument("--emulator", type=shlex.split, help="a command that runs a program on an emulated processor")
    arguments = parser.parse_args()
    rows = []
    for emulator in ([], arguments.emulator or []) if arguments.emulator else ([],):
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), arguments.images)
            rows += measured(Path(folder), emulator)
    write("int8_baselines", QUESTION, processor_name(), ("onnxruntime", "torch"), rows)
    head = (
        f"{QUESTION}\n\nThe ViT of examples/fashion_vit, {CALIBRATION} calibration images, {rows[0]['count']} held-out "
        f"images; dense top-1 {rows[0]['dense_top1']:.2%}. Shift: the largest change of a logit, per image. Before: "
        "up to commit 58aa4e4.\n\n"
    )
    (RESULTS / "int8_baselines.md").write_text(head + markdown(COLUMNS, [line(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
