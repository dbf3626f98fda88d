"""Seconds and peak memory of each pass by images, processes and memory limit -> results/scale.{json,md}.

    python benchmarks/scale.py [--models …] [--images 64 256 1024] [--processes 1 2] [--memory 3GiB] [--add]

Each row is one command `mpcompile MODEL --pattern 2:4 --target ort`, under torchrun if there are several processes,
with one thread for each process. Times of passes are those of the report. The peak is that of one process, watched from
outside while the command runs. Images are random JPEG files: their content changes neither time nor memory. Weights are
random, too. Each processor has a table of its own. With --add the rows of the results file are kept, except those that
are measured again on the same processor.

`vit_base_patch16_224` stands for all its 12 blocks, `vit_base_patch16_224, 2 blocks` for a ViT-B of two blocks, whose
layers have the same sizes.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from lib.common import RESULTS, markdown, rows_of, write
from lib.cpu_timing import by_processor, device, device_with_load, load_range, provenance
from PIL import Image
from safetensors.torch import load_file, save_file

from mpcompile.driver.artifact import Artifact

QUESTION = "How do time and memory of a compression grow with images, and what do several processes bring?"
MODELS = {
    "tf_efficientnet_lite0": ("tf_efficientnet_lite0", {}),
    "vit_base_patch16_224": ("vit_base_patch16_224", {}),
    "vit_base_patch16_224, 2 blocks": ("vit_base_patch16_224", {"depth": 2}),
    "vit_large_patch16_224": ("vit_large_patch16_224", {}),
}
OTHERS = 64  # held-out images
KEY = ("device", "model", "pattern", "images", "processes", "memory")
WATCH_SECONDS = 0.02
COLUMNS = (
    "model", "pattern", "images", "processes", "limit", "passes, s", "nm-mask, s", "other passes over 1 s",
    "peak by pass, GB", "peak of a process, GB", "masks",
)  # fmt: skip


def photos(folder: Path, count: int) -> Path:
    """A folder with so many random JPEG files of 256 by 256 pixels."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.jpg")
    return folder


def weights(name: str, folder: Path) -> Path:
    """A file with random weights of a model, the same at every call."""
    arch, arguments = MODELS[name]
    path = folder / f"{name.replace(' ', '_')}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        save_file(timm.create_model(arch, **arguments).state_dict(), path)
    return path


def watched(command: list[str]) -> tuple[float, int]:
    """Runs a command. Returns its seconds, and the largest memory in bytes of any of its processes."""
    started, largest = time.monotonic(), 0
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    while process.poll() is None:
        largest = max([largest, *map(resident_bytes, family(process.pid))])
        time.sleep(WATCH_SECONDS)
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(process.stderr.read().decode())
    return time.monotonic() - started, largest


def family(pid: int) -> list[int]:
    """A process and those that it started, directly or not."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in family(int(child)))]


def resident_bytes(pid: int) -> int:
    """The peak memory of a process since it last began to measure it; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def measure(name: str, pattern: str, images: int, processes: int, memory: str | None, folder: Path) -> dict[str, Any]:
    """One row."""
    arch, arguments = MODELS[name]
    data = folder / f"images-{images}"
    if not data.exists():
        photos(data, images + 16 + OTHERS)
    words = [
        str(weights(name, folder)), "--arch", arch, "--pattern", pattern, "--target", "ort", "--data", str(data),
        "--calibration", str(images), "--held-out", str(OTHERS), "--threads", "1", "-q", "--force",
        "-o", str(folder / "out"),
    ]  # fmt: skip
    for key, value in arguments.items():
        words += ["--arch-arg", f"{key}={value}"]
    words += [] if memory is None else ["--memory", memory]
    group = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    seconds, peak = watched([sys.executable, *(group if processes > 1 else []), "-m", "mpcompile", *words])
    passes = Artifact.open(folder / "out").report.passes
    digest = hashlib.sha256()
    for layer, mask in sorted(load_file(folder / "out" / "masks.safetensors").items()):
        digest.update(layer.encode() + mask.numpy().tobytes())
    return {
        "model": name, "pattern": pattern, "images": images, "processes": processes, "memory": memory,
        "seconds": seconds, "peak_bytes": peak, "masks": digest.hexdigest(),
        "passes": {row.name: row.seconds for row in passes}, "peaks": {row.name: row.peak_bytes for row in passes},
        **provenance(device()),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = []
    for row in rows:
        others = {name: s for name, s in row["passes"].items() if name != "nm-mask" and s >= 1}
        peaks = {name: row["peaks"][name] / 1e9 for name in ("nm-mask", *others) if name in row["peaks"]}
        lines.append(
            (
                row["model"], row["pattern"], str(row["images"]), str(row["processes"]), row["memory"] or "none",
                f"{sum(row['passes'].values()):.0f}", f"{row['passes'].get('nm-mask', 0):.0f}",
                ", ".join(f"{name} {s:.0f}" for name, s in others.items()),
                ", ".join(f"{name} {peak:.2f}" for name, peak in peaks.items()),
                f"{row['peak_bytes'] / 1e9:.2f}", row["masks"][:8],
            )
        )  # fmt: skip
    return markdown(COLUMNS, lines)


def page(rows: list[dict[str, Any]]) -> str:
    """The results file as Markdown, with a table for each processor."""
    tables = [f"## {name}, {load_range(own)}\n\n{table(own)}" for name, own in by_processor(rows)]
    return "\n".join([f"# {QUESTION}\n", *tables])


def main() -> None:
    """Measures, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tf_efficientnet_lite0", "vit_base_patch16_224, 2 blocks"])
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--images", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--memory", nargs="+", default=["none"])
    parser.add_argument("--add", action="store_true")
    options = parser.parse_args()
    known = {tuple(row[key] for key in KEY): row for row in rows_of("scale")} if options.add else {}
    with tempfile.TemporaryDirectory() as temporary:
        for model in options.models:
            for images in options.images:
                for memory in options.memory:
                    for processes in options.processes:
                        for pattern in options.patterns:
                            limit = None if memory == "none" else memory
                            row = measure(model, pattern, images, processes, limit, Path(temporary))
                            known[tuple(row[key] for key in KEY)] = row
                            write("scale", QUESTION, device_with_load(), ("torch", "timm"), list(known.values()))
                            (RESULTS / "scale.md").write_text(page(list(known.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
