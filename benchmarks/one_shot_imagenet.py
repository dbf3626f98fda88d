"""Accuracy and confidence of EfficientNet-Lite on ImageNet without training -> results/one_shot_imagenet.{json,md}.

    python benchmarks/one_shot_imagenet.py --images FOLDER                            # weights: make bench-models
    python benchmarks/one_shot_imagenet.py --images FOLDER --models efficientnet_lite0 --patterns 8:16 --methods ours

The models have their own heads. FOLDER has one folder per class, named so that their order is that of ImageNet's
classes (n01440764, …). The results in the repository are from one image per class, short side 256, almost surely from
the training set: dense top-1 is higher than on the validation set. So read differences, not top-1 itself. A seed
chooses 500 calibration and 100 validation images; nothing sees the other 400.

Every method gets the same confidence step (passes/confidence), so that the rows differ in masks and weights alone. The
divergence stands there before that step and after it. "ours" are the passes of `mpcompile MODEL --pattern N:M`:
channels permuted for the pattern, `joint` masks, a refit with the strength that cross-validation chooses and a gain
for each channel, and the correction of batch-norm statistics where it still pays. "ours, fixed strength, no gain" is
the refit without the choice and the gain: λ = 0.02, and the dense targets in full.
`--add` measures only rows that are not there yet.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from budget import logits
from lib.common import RESULTS, markdown, mean_and_range, rows_of, write
from lib.exact_obs import exact_obs
from lib.pretrained import efficientnet_lite0, efficientnet_lite1
from lib.sparsegpt import sparsegpt

from mpcompile.analysis.eligibility import eligible
from mpcompile.data.images import Data
from mpcompile.data.loading import load_data
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.measure.changed_answers import ChangedAnswers
from mpcompile.measure.confidence import common_factor, divergence
from mpcompile.measure.confidence_comparison import compare_confidence
from mpcompile.passes import Confidence, NMMask, Permute, Quantize
from mpcompile.passes.batch_norm import BatchNorm
from mpcompile.passes.reconstruct import cross_validation
from mpcompile.passes.reconstruct.cross_validation import Strength, chosen_strength
from mpcompile.pipeline.pass_manager import Pass, PassManager

QUESTION = "How much accuracy and confidence of EfficientNet-Lite is kept on ImageNet without training?"
CALIBRATION, VALIDATION = 500, 100  # images
SEEN = 200  # calibration images on which the outputs are compared, too
MODELS = {"efficientnet_lite0": efficientnet_lite0, "efficientnet_lite1": efficientnet_lite1}
PATTERNS = ("2:4", "4:8", "8:16", "1:4", "4:16", "4:8v8")
OURS, INT8 = "ours", "ours, int8"  # int8 has the confidence step before it
Pruner = Callable[[Model, Data, NM], Model]
COLUMNS = (
    "model", "pattern", "method", "seeds", "top-1", "of dense", "right, wrong", "p", "same answer", "by margin",
    "divergence", "after its best factor", "on calibration images: same answer, divergence",
    "top probability, of dense", "calibration error, of dense", "s",
)  # fmt: skip


def passes(*steps: Pass) -> Callable[[Model, Data], Model]:
    """Returns a function that applies these passes."""
    return lambda model, data: PassManager(steps).run(model, data.for_passes())[0]


def masked_names(model: Model, pattern: NM) -> list[str]:
    """Returns the layers that the pattern masks."""
    return [name for name, reason in eligible(model, pattern).items() if reason is None]


@contextmanager
def fixed_strength() -> Iterator[None]:
    """Within the context, refits have λ = 0.02 and the dense targets in full; the residual share is still chosen."""

    def fixed(moments: Any, parts: Any, weight: Any, centred: Any, dampings: Any) -> Strength:
        return Strength(0.02, 1.0, chosen_strength(moments, parts, weight, centred, (0.02,)).residual)

    original, cross_validation.chosen_strength = cross_validation.chosen_strength, fixed
    try:
        yield
    finally:
        cross_validation.chosen_strength = original


def at_fixed_strength(model: Model, data: Data, pattern: NM) -> Model:
    """Returns the model of our passes without the choice of the strength and without gains."""
    with fixed_strength():
        return passes(Permute(pattern), NMMask(pattern, gain=False))(model, data)


METHODS: dict[str, Pruner] = {
    "magnitude, statistics moved": lambda m, d, p: passes(NMMask(p, "magnitude", "none"), BatchNorm())(m, d),
    "Wanda, statistics moved": lambda m, d, p: passes(NMMask(p, "wanda", "none"), BatchNorm())(m, d),
    "SparseGPT": lambda m, d, p: sparsegpt(m, d.calibration, p, masked_names(m, p)),
    "exact OBS": lambda m, d, p: exact_obs(m, d.calibration, p, masked_names(m, p)),
    "ours, fixed strength, no gain": at_fixed_strength,
    "ours, no gain": lambda m, d, p: passes(Permute(p), NMMask(p, gain=False))(m, d),
    OURS: lambda m, d, p: passes(Permute(p), NMMask(p), BatchNorm())(m, d),
    INT8: lambda m, d, p: passes(Permute(p), NMMask(p), BatchNorm(), Confidence(), Quantize())(m, d),
}


def with_confidence(result: Model, model: Model, data: Data) -> Model:
    """Returns the pruned model after the confidence step; `model` is the dense one."""
    return Confidence()(replace(result, dense=model.graph if result.dense is None else result.dense), data.for_passes())


def compared(pruned: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Compares the logits (n, classes) of the pruned and the dense model, and returns the accuracy keys of a row."""
    correct, dense_correct = (logits.argmax(1) == labels for logits in (pruned, dense))
    changed = ChangedAnswers.between(dense_correct.numpy(), correct.numpy())
    confidence = compare_confidence(dense, pruned, labels)
    assert confidence is not None
    before, after = confidence.dense, confidence.compressed
    assert before.calibration is not None
    assert after.calibration is not None
    return {
        "top1": float(correct.double().mean()),
        "dense_top1": float(dense_correct.double().mean()),
        "right": changed.right,
        "wrong": changed.wrong,
        "p": changed.chance,
        "agreement": float((pruned.argmax(1) == dense.argmax(1)).double().mean()),
        "agreement_by_margin": [quartile.agreeing / quartile.count for quartile in confidence.quartiles],
        "logit_shift": float((pruned - dense).abs().amax(1).mean()),
        "divergence": confidence.divergence,
        "least_divergence": confidence.least_divergence,
        "best_factor": confidence.best_factor,
        "top_probability": after.top_probability,
        "dense_top_probability": before.top_probability,
        "calibration_error": after.calibration.error,
        "dense_calibration_error": before.calibration.error,
        "images": len(labels),
    }


def cells(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Returns the seeds of one model, pattern and method as cells of the table."""

    def mean(key: str, shape: str = "{:.3f}") -> str:
        return shape.format(np.mean([row[key] for row in rows]))

    def ranged(key: str, shape: str = "{:.3f}") -> str:
        return mean_and_range([row[key] for row in rows], shape)

    first = rows[0]
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]  # None: the run was paused
    return (
        first["model"], first["pattern"], first["method"], ", ".join(str(row["seed"]) for row in rows),
        f"{ranged('top1', '{:.2%}')} of {mean('dense_top1', '{:.2%}')}",
        f"{np.mean([row['top1'] / row['dense_top1'] for row in rows]):.1%}",
        f"{sum(row['right'] for row in rows)}, {sum(row['wrong'] for row in rows)}",
        f"{max(row['p'] for row in rows):.2g}", ranged("agreement", "{:.1%}"),
        " / ".join(f"{100 * share:.0f}" for share in np.mean([row["agreement_by_margin"] for row in rows], 0)),
        f"{mean('divergence_before')} → {mean('divergence')}", ranged("least_divergence"),
        f"{mean('seen_agreement', '{:.1%}')}, {mean('seen_divergence')}",
        f"{mean('top_probability')}, {mean('dense_top_probability')}",
        f"{mean('calibration_error')}, {mean('dense_calibration_error')}",
        f"{np.median(seconds):.0f}" if seconds else "–",
    )  # fmt: skip


def main() -> None:
    """Measures, and writes both results files after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with one folder of images per class")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=[*MODELS])
    parser.add_argument("--patterns", nargs="*", default=[*PATTERNS])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--add", action="store_true", help="keep the rows that are there, and measure only others")
    arguments = parser.parse_args()
    chosen = [
        (name, pattern, method, seed)
        for seed in arguments.seeds
        for name in arguments.models
        for pattern in arguments.patterns
        for method in arguments.methods
    ]
    rows = [row for row in rows_of("one_shot_imagenet") if arguments.add or key_of(row) not in chosen]
    there = {key_of(row) for row in rows}
    for name, pattern, method, seed in chosen:
        if (name, pattern, method, seed) not in there:
            rows.append(measured(arguments.images, name, NM.parse(pattern), method, seed))
            print(cells(rows[-1:]), flush=True)
            report(rows)


def key_of(row: dict[str, Any]) -> tuple[str, str, str, int]:
    """Returns what distinguishes a row."""
    return row["model"], row["pattern"], row["method"], row["seed"]


def measured(images: Path, name: str, pattern: NM, method: str, seed: int) -> dict[str, Any]:
    """Returns the row of one method."""
    module = MODELS[name]()
    model = capture(module, source_of(module, name=name, arch=f"tf_{name}", sha256=""))
    data = load_data(images, model.source, 1000, CALIBRATION, seed=seed, validation=VALIDATION)
    dense, labels = logits(model, data)
    started = time.perf_counter()
    result = METHODS[method](model, data, pattern)
    row: dict[str, Any] = {"model": name, "pattern": str(pattern), "method": method, "seed": seed}
    row["seconds"] = time.perf_counter() - started
    row["divergence_before"] = divergence(dense, logits(result, data)[0])
    if method != INT8:
        result = with_confidence(result, model, data)
    return row | compared(logits(result, data)[0], dense, labels) | on_seen(result, model, data)


def on_seen(result: Model, model: Model, data: Data) -> dict[str, float]:
    """Returns the agreement, and the divergence after its best factor, on the first calibration images."""
    images = Data(held_out=replace(data.calibration, order=data.calibration.order[:SEEN]))
    (now, _), (dense, _) = logits(result, images), logits(model, images)
    best = common_factor(dense, now)
    assert best is not None
    return {
        "seen_agreement": float((now.argmax(1) == dense.argmax(1)).double().mean()),
        "seen_divergence": best.divergence,
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Writes both results files with the rows measured so far."""
    orders = [*MODELS], [*PATTERNS], [*METHODS]

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        *names, seed = key_of(row)
        return (*(order.index(name) for order, name in zip(orders, names, strict=True)), seed)

    rows.sort(key=place)
    write("one_shot_imagenet", QUESTION, "cpu", ("torch", "timm"), rows)
    setting = (
        f"A seed selects {CALIBRATION} calibration, {VALIDATION} validation and {rows[0]['images']} held-out images. "
        "Means over the seeds, and [lowest, highest]. right, wrong: answers that became so, against the dense model, "
        "in all seeds together; p: exact McNemar test, the largest of the seeds. By margin: same answer in per cent by "
        "quartile of the dense margin, lowest first. Divergence: KL(dense ‖ pruned) before the confidence step → after "
        "it; after its best factor: what is no matter of confidence. The same on "
        f"{SEEN} of the calibration images shows what a method overfits. s: median."
    )
    table = [cells([*group]) for _, group in groupby(rows, lambda row: key_of(row)[:3])]
    text = f"# EfficientNet-Lite on ImageNet\n\n{QUESTION}\n\n{setting}\n\n{markdown(COLUMNS, table)}"
    (RESULTS / "one_shot_imagenet.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
