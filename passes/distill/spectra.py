"""The spectra of masked weights after an epoch of training."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mpcompile.analysis.spectrum import NoFitError, analyse


def spectra(weights: Sequence[Tensor]) -> tuple[float | None, int | None]:
    """Mean edge σ₊ and total number of spikes, over the weights that a Marchenko–Pastur law can be fitted to."""
    fits = []
    for weight in weights:
        try:
            fits.append(analyse(weight.numpy(force=True), null=False).fit)
        except NoFitError:
            continue
    if not fits:
        return None, None
    return float(np.mean([fit.bulk_edge for fit in fits])), sum(fit.spikes for fit in fits)
