"""Results of passes that the report shows: spectra, certificates, training epochs, a polish."""

from dataclasses import dataclass

from mpcompile.ir.head import Kind


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Summary of the Marchenko–Pastur fit of one layer; floats only, so that it prints and serialises.

    `q` is the aspect ratio of the weight matrix (shorter side / longer side), `sigma` the fitted standard deviation of
    its noise entries, `edge` the singular value that pure noise exceeds with 5 % probability (or the budget's `level`),
    `spikes` the number of singular values above it, and `bulk_share` the share of the spectrum inside the fitted bulk.
    `fit_error` is the Kolmogorov–Smirnov distance between the empirical and the fitted distribution over the middle
    half of the spectrum; `null_error` is the same for the layer's own entries shuffled (None if not computed).
    `histogram` counts the singular values below 1.5 times the edge in bins of a twentieth of the edge; it is empty in
    reports of earlier versions. The mathematics: mpcompile/analysis/spectrum.py.
    """

    q: float
    sigma: float
    edge: float
    spikes: int
    bulk_share: float
    fit_error: float
    null_error: float | None
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MarginQuartile:
    """The decisions whose dense margin is in one quarter of all margins, and how many of them are the same.

    The margin is the largest output minus the second, or the distance to the threshold; for several labels the smallest
    distance. `interval` is the 95 % confidence interval of the agreement (Wilson); None if the decisions are those of
    positions, which are not independent.
    """

    lowest: float  # margin
    highest: float  # margin
    count: int
    agreeing: int
    interval: tuple[float, float] | None

    @property
    def agreement(self) -> float:
        """The share of the decisions that are the same."""
        return self.agreeing / self.count


@dataclass(frozen=True, slots=True)
class LayerCertificate:
    """The effect of one layer's change R = A − S, where A are its dense weights and S its compressed ones.

    `reach` is the mean over images of ‖Rψ‖∞, the largest change of any of the layer's outputs, where ψ are its inputs
    in the compressed model; `reach_max` is the maximum over images. `share` is the layer's share of the squared logit
    shift, to first order; 0 if the attribution was switched off. `critical` is the largest amplification L from ‖Rψ‖∞
    to the logits at which the paper's theorem still certifies the change, given the penalties used in training; None if
    those are not known. The statements are in passes/certify.py.
    """

    name: str
    reach: float
    reach_max: float
    share: float
    critical: float | None


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is proven about the compressed model on held-out images, and a bound for unseen images."""

    images: int
    agreeing: int  # images with the same decision as the dense model
    proven: int  # images whose logit shift is too small for their dense margin to change the decision
    agreement_bound: float  # lower bound of the agreement on unseen images: Clopper–Pearson, one-sided, at `confidence`
    confidence: float
    shift_mean: float  # mean over images of max |Δ logit|
    shift_max: float  # maximum over images
    # Median over images of the dense margin: largest logit minus second largest, or the distance to the threshold if
    # `head` is not softmax.
    margin_median: float
    explained: float  # sum of the layers' shares: 1 if the logits are linear in the weights
    layers: tuple[LayerCertificate, ...]
    head: Kind = "softmax"  # the kind of decision (mpcompile/ir/head.py)
    quartiles: tuple[MarginQuartile, ...] = ()  # agreement by quartile of the dense margin, lowest margins first


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch of distillation. Losses are means over its steps; spectra are of the masked layers at its end."""

    steps: int
    loss: float
    labels_loss: float | None  # cross-entropy; None without labels
    teacher_loss: float  # τ² KL to the dense model; for outputs that are values the relative squared error
    rate: float  # learning rate of the last step
    edge: float | None  # mean bulk edge σ₊ (a singular value) of the masked layers; None if no law can be fitted
    spikes: int | None  # singular values above the noise edge, summed over the masked layers


@dataclass(frozen=True, slots=True)
class Closeness:
    """How close a compressed model's outputs are to the dense ones on validation images.

    Attributes:
        divergence: KL(dense ‖ compressed) in nats with the best common factor on the logits; for outputs that are
            values the squared error relative to the variance of the dense values.
        factor: that factor; None for values.
        agreement: the share of decisions that are the same; None for values.
    """

    divergence: float
    factor: float | None
    agreement: float | None


@dataclass(frozen=True, slots=True)
class RateTrial:
    """A learning rate that was tried from the start for some steps. The rate is relative to the size of a weight."""

    rate: float
    steps: int
    after: Closeness | None  # None: the loss or the outputs were not finite


@dataclass(frozen=True, slots=True)
class Polished:
    """A training of limited minutes on the dense outputs: what it did, and what it changed on validation images."""

    minutes: float  # the limit
    steps: int  # of the whole limit, with those of the trials; 0 if no training was needed or possible
    taken: int  # steps of the training itself; fewer than planned if it did not improve any more
    batch: int  # images of a step
    size: tuple[int, ...]  # (channels, height, width) of an image in training
    rate: float | None  # learning rate, relative to the size of a weight; None without training
    trials: tuple[RateTrial, ...]  # of the rates, if more than one was tried
    training: int  # images that were trained on
    validation: int  # images that `before` and `after` are measured on
    before: Closeness
    after: Closeness  # equal to `before` if the model is left as it was
    kept_start: str | None  # why the model is left as it was, as a sentence; None if it was trained
