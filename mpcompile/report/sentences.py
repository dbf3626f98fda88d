"""What a report says in sentences: the verdict, what is proven, and how to make it again."""

import shlex
from collections import Counter

from mpcompile.analysis.block_macs import Charged
from mpcompile.ir.results import Certificate
from mpcompile.measure.accuracy import Comparison
from mpcompile.measure.layer_verdict import LayerVerdict, tally
from mpcompile.report.schema import Latency, LayerRow, Report
from mpcompile.report.search_schema import Tuning


def verdict_on(
    layers: tuple[LayerRow, ...],
    target: str,
    accelerated: bool,
    cost: Charged,
    comparison: Comparison | None,
    latency: tuple[Latency, ...],
    verdicts: tuple[LayerVerdict, ...] = (),
    idle: str | None = None,
    certificate: Certificate | None = None,
) -> tuple[str, ...]:
    """What was gained, against what, what was lost and what is proven, in sentences that claim only what was seen."""
    masked = [row for row in layers if row.pattern]
    sentences = [_speed(pair, first=pair is latency[0]) for pair in latency]
    if idle:
        sentences.append(f"No engine of the target {target} ran here, and no speed was measured: {idle}.")
    if masked:
        patterns = ", ".join(
            f"{count} at {pattern}" for pattern, count in Counter(row.pattern for row in masked).most_common()
        )
        sentences.append(
            f"{len(masked)} of {len(layers)} layers are masked ({patterns}), and each mask was found again in the ONNX "
            "file, on the axis that is summed over."
        )
    else:
        sentences.append(f"None of the {len(layers)} layers is masked.")
    if verdicts:
        sentences.append(tally(verdicts))
    unknown = bool(idle) or any(row.chosen is None for row in verdicts)
    if masked and not accelerated and not unknown:
        why = "no sparse kernel was chosen" if verdicts else f"the target {target} has no kernels for them"
        sentences.append(f"Masked layers run as dense and save no time here: {why}.")
    if any(cost.merged):
        sentences.append(
            f"Tokens are merged, from {cost.tokens[0]} to {cost.tokens[-1]} over {len(cost.merged)} attentions, "
            "which is less work for any target."
        )
    if comparison and comparison.dense and comparison.compressed:
        lost = 100 * (comparison.dense.top1 - comparison.compressed.top1)
        turned = f", {comparison.turned}" if comparison.turned else ""
        sentences.append(
            f"On {comparison.count:,} held-out images top-1 is {comparison.compressed.top1:.2%}, and "
            f"{comparison.dense.top1:.2%} dense: {abs(lost):.2f} points {'lost' if lost >= 0 else 'gained'}{turned}."
        )
    elif comparison:
        sentences.append(
            f"On {comparison.count:,} images {comparison.agreement:.2%} of the answers are the dense model's."
        )
    else:
        sentences.append("No images were given (--data), so accuracy was not measured.")
    if idle and comparison:
        sentences.append("What is said of accuracy was measured with ONNX Runtime on the CPU, on these weights.")
    if certificate:
        sentences.append(
            f"Of {certificate.images:,} held-out answers {certificate.proven:,} are proven unchanged; of images to "
            f"come, drawn as these were, at least {certificate.agreement_bound:.2%} get the dense model's answer, with "
            f"{certificate.confidence:.0%} confidence."
        )
    return tuple(sentences)


def _speed(pair: Latency, first: bool) -> str:
    """How fast at one batch, against what; the first time with all that makes the two alike."""
    baseline = "the dense model"
    if first:
        baseline += f" in the same precision on the same target ({pair.dense.device})"
    subject = "the compressed model is " if pair.speedup.significant else ""
    return f"At batch {pair.dense.batch} {subject}{pair.speedup.describe(baseline)}."


def proven(certificate: Certificate) -> tuple[tuple[str, str], ...]:
    """What a certificate says, in the order of its strength: what it comes to, and what that rests on."""
    c = certificate
    return (
        (
            f"{c.proven} predictions are proven unchanged",
            f": the dense model's margin (its largest logit less the second, {c.margin_median:.3f} in the median) "
            f"exceeds twice the largest change of any logit ({c.shift_mean:.3f} on average, {c.shift_max:.3f} at most)."
            " It holds for these images and for every model whose logits lie as near.",
        ),
        (f"{c.agreeing} predictions are the same", ", proven or not. That is an observation."),
        (
            f"At least {100 * c.agreement_bound:.2f} % of images to come get the same prediction",
            f", with {100 * c.confidence:.0f} % confidence (Clopper–Pearson), if they are drawn as these were. It says "
            "nothing of images from elsewhere, and nothing of whether a prediction is right.",
        ),
    )


def searched(tuning: Tuning) -> str:
    """What the search for a recipe looked at, and by what it judged."""
    equal = tuning.as_fast()
    unsure = (
        f" The speed of {', '.join(equal)} cannot be told from that of the recipe taken: another run may take another."
        if equal
        else ""
    )
    methods = [f"{point.name} has {point.method}" for point in tuning.references if point.method]
    return (
        f"{len(tuning.points)} of at most {tuning.allowed}, on {tuning.images} validation images; a recipe holds if "
        f"its drop in top-1 and the standard error of that together are within {tuning.limit:g} points. Int8 is the "
        f"dense model as ONNX Runtime quantises it, for comparison{''.join(f'; {text}' for text in methods)}.{unsure}"
    )


def command(report: Report) -> str:
    """The command that makes the folder again, in it; capitals stand for what the report cannot know."""
    # A module that was handed over in memory has no name but its class's.
    model = "MODEL" if report.model.name == report.model.arch else shlex.quote(report.model.name)
    data = " --data DATA" if report.data.calibration or report.data.held_out else ""
    return f"mpcompile {model} --config recipe.yaml{data} -o OUT"


def command_terms(report: Report) -> tuple[str, ...]:
    """What stands behind the words of that command."""
    model, data = report.model, report.data
    terms = []
    if model.name == model.arch:
        terms.append(f"MODEL was given in memory: {model.arch}, SHA-256 of its weights {model.sha256}")
    else:
        terms.append(
            f"the model's SHA-256 is {model.sha256}; its architecture was taken to be {model.arch}, which --arch names "
            "where the file does not"
        )
    if data.calibration or data.held_out:
        terms.append(
            f"DATA has the images; which {data.calibration} calibrate and which {data.validation} validate, seed "
            f"{data.seed} decides"
        )
    return (*terms, "OUT is the folder to write; recipe.yaml lies beside this report")
