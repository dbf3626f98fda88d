"""Exact Optimal Brain Surgeon, row by row, as a baseline: one weight removed at a time, the others updated each time.

Source: Frantar, Singh and Alistarh, Optimal Brain Compression, arXiv 2208.11580, Algorithm 1 with the N:M condition of
its section 4: a weight may be removed while its group keeps more than N. Each layer is pruned on the outputs of the
pruned layers before it, and towards its own dense weights.
"""

import torch
from torch import Tensor

from lib.sparsegpt import pruned_in_order
from mpcompile.data.images import Split
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM

DAMPING = 0.01  # relative to the mean of the diagonal, as in the paper's code
CHUNK_BYTES = 256 << 20  # of inverses, one for each row


def pruned(weight: Tensor, gram: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """Returns the updated weights (rows, columns), float64, and their mask.

    `gram` (columns, columns) is the uncentred second moment of the inputs, float64.
    """
    gram = gram + (DAMPING * gram.diagonal().mean() + 1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    step = max(1, CHUNK_BYTES // (8 * inverse.numel()))
    parts = [_pruned_rows(rows, inverse, pattern) for rows in weight.double().split(step)]
    updated, mask = (torch.cat(part) for part in zip(*parts, strict=True))
    return updated, mask


def _pruned_rows(weight: Tensor, inverse: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """The rows of one chunk; each has an inverse of its own, from which removed columns are eliminated."""
    w, rows = weight.clone(), torch.arange(len(weight))
    inverses = inverse.repeat(len(w), 1, 1)
    kept = torch.ones_like(w, dtype=torch.bool)
    for _ in range(w.shape[1] // pattern.of * (pattern.of - pattern.keep)):
        full = kept.reshape(len(w), -1, pattern.of).sum(-1) <= pattern.keep
        closed = ~kept | full.repeat_interleave(pattern.of, 1)
        cost = (w.square() / inverses.diagonal(dim1=1, dim2=2)).masked_fill(closed, torch.inf)
        column = cost.argmin(1)
        pivot, vector = inverses[rows, column, column], inverses[rows, :, column]
        w -= vector * (w[rows, column] / pivot)[:, None]
        inverses -= vector[:, :, None] * (vector / pivot[:, None])[:, None]
        kept[rows, column] = False
        # A removed column has no part in later steps; 1 on the diagonal keeps the quotients finite.
        inverses[rows, column] = 0
        inverses[rows, :, column] = 0
        inverses[rows, column, column] = 1
        w[rows, column] = 0
    return torch.where(kept, w, 0), kept


def exact_obs(model: Model, images: Split, pattern: NM, names: list[str]) -> Model:
    """Returns the model with these layers pruned and updated by exact OBS."""
    return pruned_in_order(model, images, pattern, names, pruned)
