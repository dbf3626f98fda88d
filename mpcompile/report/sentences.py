"""Sentences of a report: the verdict, the proofs, the search for a recipe, and the command that reproduces it."""

import shlex

from mpcompile.analysis.charged import Charged
from mpcompile.ir.results import Certificate, Polished
from mpcompile.measure.comparison import Comparison
from mpcompile.measure.layer_verdict import LayerVerdict, tally
from mpcompile.report.confidence_sentences import on_confidence
from mpcompile.report.head_words import accuracy_name, agreement_sentence
from mpcompile.report.layer_counts import count_layers
from mpcompile.report.part_schema import Part
from mpcompile.report.polish_sentences import on_polish
from mpcompile.report.quantized_schema import Quantized
from mpcompile.report.quantized_sentences import beside_dense, loss_split, on_8_bit_kernels, without_kernel
from mpcompile.report.schema import Latency, LayerRow, Report
from mpcompile.report.search_needs import needs
from mpcompile.report.search_schema import Point, Tuning


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
    notes: tuple[str, ...] = (),
    quantized: Quantized | None = None,
    part: Part | None = None,
    logit_factor: float | None = None,
    polished: Polished | None = None,
) -> tuple[str, ...]:
    """The verdict: sentences on speed, masks, tokens, accuracy and proofs. It claims only what this run measured.

    It begins with warnings: why the dense model's accuracy cannot be right, and what is unusual about its decisions.

    Args:
        layers: the rows of all layers.
        target: name of the target.
        accelerated: whether masked layers run on sparse kernels.
        cost: MACs and tokens.
        comparison: accuracy on held-out images; None if there are none.
        latency: one entry for each batch size; empty if speed was not measured.
        verdicts: kernel choice for each masked layer, if the target reports it.
        idle: why no engine of the target ran on this machine; None if one ran.
        certificate: what is proven on held-out images; None if there is no certificate.
        notes: what passes report on token merging, such as why fewer tokens are merged than asked for.
        quantized: the dense models in 8 bits, if the compressed model is in 8 bits.
        part: the part of the model that was compressed; None for the whole model.
        logit_factor: the factor on the logits that the pass confidence folded into the last layers.
        polished: what the pass polish trained and changed; None without it.
    """
    counts = count_layers(layers)
    check = comparison.dense_check if comparison else None
    sentences = [f"Warning: {reason}." for reason in (*check.reasons, *check.remarks)] if check else []
    sentences += part.sentences() if part else ()
    same = "in fp32" if quantized else "in the same precision"
    sentences += [_speed(pair, same if pair is latency[0] else None) for pair in latency]
    if quantized:
        sentences += beside_dense(quantized, latency)
    if idle:
        sentences.append(f"No engine of the target {target} ran on this machine, so speed was not measured: {idle}.")
    if counts.masked:
        patterns = ", ".join(f"{count} at {pattern}" for pattern, count in counts.patterns.items())
        sentences.append(
            f"{counts.masked} of {counts.layers} layers are masked ({patterns}). Each mask was checked in the ONNX "
            "file, along the axis that the product sums over."
        )
        if counts.shared:
            sentences[-1] += " Layers that share a weight count as one."
    else:
        sentences.append(f"None of the {counts.layers} layers is masked.")
    if quantized:
        sentences += on_8_bit_kernels(quantized)
    if verdicts:
        sentences.append(tally(verdicts))
    unknown = bool(idle) or any(row.chosen is None for row in verdicts)
    if counts.masked and not accelerated and not unknown:
        why = "no sparse kernel was chosen" if verdicts else f"the target {target} has no kernels for these patterns"
        sentences.append(f"Masked layers run on dense kernels and save no time: {why}.")
        if quantized:
            sentences += without_kernel(quantized)
    if any(cost.merged):
        sentences.append(
            f"Token merging reduces {cost.tokens[0]} tokens to {cost.tokens[-1]} over {len(cost.merged)} attentions, "
            "which is less work on any target."
        )
    sentences += [f"{note[0].upper()}{note[1:]}." for note in notes]
    sentences += on_polish(polished)
    if comparison and comparison.metric:
        m = comparison.metric
        sentences.append(
            f"On {m.count:,} held-out images, {m.name} is {m.compressed:.4g} compressed and {m.dense:.4g} dense: {m}."
        )
    if comparison and comparison.dense and comparison.compressed:
        lost = 100 * (comparison.dense.top1 - comparison.compressed.top1)
        test = f", {comparison.turned}" if comparison.turned else ""
        sentences.append(
            f"On {comparison.count:,} held-out images, {accuracy_name(comparison.head)} is "
            f"{comparison.compressed.top1:.2%} compressed and "
            f"{comparison.dense.top1:.2%} dense: {abs(lost):.2f} points {'lost' if lost >= 0 else 'gained'}{test}."
        )
        low, high = (100 * share for share in comparison.compressed.interval())
        sentences.append(
            f"The 95% confidence interval of the compressed model's {accuracy_name(comparison.head)} is {low:.1f} to "
            f"{high:.1f}%. Another number of PyTorch threads rounds sums differently, which can change masks and the "
            "last digits of the accuracy."
        )
    elif comparison:
        sentences.append(agreement_sentence(comparison))
    else:
        sentences.append("No images were given (--data), so accuracy was not measured.")
    sentences += on_confidence(comparison, logit_factor)
    if quantized:
        sentences += loss_split(quantized, comparison)
    if idle and comparison:
        what = "Accuracy was" if comparison.values is None else "These errors were"
        sentences.append(f"{what} measured with ONNX Runtime on the CPU, on the same weights.")
    if certificate:
        sentences.append(
            f"{certificate.proven:,} of {certificate.images:,} held-out predictions are proven unchanged. On unseen "
            f"images of the same distribution, at least {certificate.agreement_bound:.2%} of the predictions are those "
            f"of the dense model ({certificate.confidence:.0%} confidence)."
        )
    return tuple(sentences)


def _speed(pair: Latency, precision: str | None) -> str:
    """The speed at one batch size; with the baseline's precision, target and device too if `precision` is given."""
    baseline = "the dense model"
    if precision:
        baseline += f" {precision} on the same target ({pair.dense.device})"
    subject = "" if pair.speedup.conclusion == "interval includes 1" else "the compressed model is "
    return f"At batch {pair.dense.batch} {subject}{pair.speedup.describe(baseline)}."


def proven(certificate: Certificate) -> tuple[tuple[str, str], ...]:
    """The claims of a certificate, strongest first: pairs of a claim and its justification."""
    c = certificate
    margin, exceeds = "largest logit minus the second", "exceeds twice"
    if c.head != "softmax":
        margin, exceeds = "the distance of its logit to the threshold", "exceeds"
        if c.head != "sigmoid":
            margin = "the smallest distance of a logit to the threshold"
    by_margin: tuple[tuple[str, str], ...] = ()
    if c.quartiles and c.agreeing < c.images:
        shares = ", ".join(f"{row.agreement:.1%}" for row in c.quartiles)
        by_margin = (
            (
                f"The same predictions by quarter of the dense margin, lowest margins first: {shares}",
                ". A low margin means that another prediction was close.",
            ),
        )
    return (
        (
            f"{c.proven} predictions are proven unchanged",
            f": the dense model's margin ({margin}, median {c.margin_median:.3f}) {exceeds} "
            f"the largest change of any logit (mean {c.shift_mean:.3f}, maximum {c.shift_max:.3f}). This holds for "
            "these images, and for every model whose logits differ no more from the dense ones.",
        ),
        (f"{c.agreeing} predictions are the same", ", whether proven or not. This is an observation."),
        *by_margin,
        (
            f"At least {100 * c.agreement_bound:.2f} % of unseen images get the same prediction",
            f", with {100 * c.confidence:.0f} % confidence (Clopper–Pearson), if they have the distribution of these "
            "images. This says nothing about other distributions, nor about whether a prediction is right.",
        ),
    )


def searched(tuning: Tuning) -> str:
    """How the search for a recipe selected, how int8 was quantised, and which recipes are about as fast."""
    equal = tuning.as_fast()
    tied = (
        f" The speed of {', '.join(equal)} does not differ significantly from that of the chosen recipe: another run "
        "may choose another one."
        if equal
        else ""
    )
    methods = [f"{point.name} has {point.method}" for point in tuning.references if point.method]
    return (
        f"{len(tuning.points)} of at most {tuning.allowed} recipes were tried on {tuning.images} validation images. A "
        f"recipe holds if its drop in {tuning.metric or 'top-1'} plus the standard error of the drop is at most "
        f"{tuning.limit:g}{tuning.unit}. "
        f"Int8 is the dense model quantised by ONNX Runtime, for comparison{''.join(f'; {m}' for m in methods)}.{tied}"
    )


def last_tried(tuning: Tuning) -> str:
    """The recipe that was tried last and what was measured, as one line of progress."""
    point = tuning.points[-1]
    head = f"recipe {len(tuning.points)} of at most {tuning.allowed}, {point.name}"
    if point.failed is not None:
        return f"{head}: failed, {point.failed}"
    return f"{head}: {_measured(tuning, point)}, {'within' if point.holds else 'not within'} the limit"


def which_recipe(tuning: Tuning) -> tuple[str, ...]:
    """Sentences on which of the tried recipes to take for which need; the first one is the chosen recipe."""
    return tuple(
        f"{need.need[0].upper()}{need.need[1:]}: {need.point.name}, {_measured(tuning, need.point)}"
        + (f" ({need.file})." if need.file else ".")
        for need in needs(tuning)
    )


def _measured(tuning: Tuning, point: Point) -> str:
    """The speed and the drop of a measured point."""
    speed = "times as fast as dense" if tuning.batches else "times fewer MACs than dense"
    drop = (
        f"drop {point.drop:.2f} ± {point.error:.2f} points"
        if tuning.metric is None
        else (f"{tuning.metric} {point.drop:.4g} ± {point.error:.2g} lower")
    )
    return f"{point.speed:.2f} {speed}, {drop}"


def command(report: Report) -> str:
    """The command that reproduces the folder; capitals stand for paths that the report does not know."""
    # The name of a module that was passed in memory is its class name.
    model = "MODEL" if report.model.name == report.model.arch else shlex.quote(report.model.name)
    data = " --data DATA" if report.data.calibration or report.data.held_out else ""
    return f"mpcompile {model} --config recipe.yaml{data} -o OUT"


def command_terms(report: Report) -> tuple[str, ...]:
    """Sentences, without their periods, on the model, the data and the capitals in `command`."""
    model, data = report.model, report.data
    terms = []
    if model.name == model.arch:
        terms.append(f"MODEL was passed in memory: {model.arch}, SHA-256 of its weights {model.sha256}")
    else:
        terms.append(
            f"The model's SHA-256 is {model.sha256} and its architecture {model.arch}, which --arch has to name if the "
            "file does not"
        )
    if data.calibration or data.held_out:
        terms.append(
            f"DATA has the images, of which seed {data.seed} selects {data.calibration} for calibration and "
            f"{data.validation} for validation"
        )
    return (*terms, "OUT is the output folder; recipe.yaml is in the folder of this report")
