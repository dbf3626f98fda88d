"""What passes find out about a model and its layers: spectra, certificates, epochs of training."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The Marchenko–Pastur fit of one layer, in short; floats only, so that it prints and serialises.

    `q` is the aspect ratio, `sigma` the fitted deviation of an entry, `edge` the singular value T₊ that noise passes
    with 5 % probability, `spikes` how many pass it, `bulk_share` the share of the spectrum inside the fitted bulk. The
    errors are largest distances between distribution functions over the middle half of the spectrum: of the layer, and
    of its own entries shuffled (None where that was not computed). mpcompile.analysis.spectrum has the mathematics.
    """

    q: float
    sigma: float
    edge: float
    spikes: int
    bulk_share: float
    fit_error: float
    null_error: float | None


@dataclass(frozen=True, slots=True)
class LayerCertificate:
    """What one layer's change R = A − S does, A being its dense weights and S those it has now.

    `reach` is the mean over images of ‖Rψ‖∞, the largest change of any of its outputs on the inputs ψ that it now gets;
    `share` its part of the logits' shift, to first order. `critical` is the largest amplification L of ‖Rψ‖∞ to the
    logits at which the paper's theorem still certifies the change, given the penalties that the model was trained with;
    None where those are not known. passes/certify.py has the statements.
    """

    name: str
    reach: float
    reach_max: float
    share: float
    critical: float | None


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is proven of the compressed model on images that no pass has seen, and what follows for others."""

    images: int
    agreeing: int  # images with the dense model's answer
    proven: int  # images whose margin exceeds twice their logit shift
    agreement_bound: float  # Clopper–Pearson, one-sided, at `confidence`
    confidence: float
    shift_mean: float  # of max |Δ logit|
    shift_max: float
    margin_median: float  # of the dense model: largest logit less the second
    explained: float  # the sum of the layers' shares: 1 where the first order is all there is
    layers: tuple[LayerCertificate, ...]


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch of training. Losses are means over its steps; spectra are those of the masked layers at its end."""

    steps: int
    loss: float
    labels_loss: float | None  # cross-entropy; None where the images have no labels
    teacher_loss: float  # τ² KL to the dense model
    rate: float  # learning rate of the last step
    edge: float | None  # mean of σ₊ over the masked layers; None where none can be fitted
    spikes: int | None  # singular values past the noise edge T₊, all masked layers together
