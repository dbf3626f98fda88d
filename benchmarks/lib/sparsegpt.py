"""Two implementations of SparseGPT as baselines: one written from the paper, and the one in NVIDIA ModelOpt.

Source: Frantar and Alistarh, arXiv 2301.00774. `sparsegpt` updates the weights layer by layer, each layer on the
outputs of the pruned layers before it, as the paper describes. ModelOpt 0.47 computes the updated weights but keeps
only their mask: `_compute_mask` returns `weight != 0` of a copy. Its rows therefore have SparseGPT's mask with the
dense weights.
"""

import copy
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace

import torch
from torch import Tensor, nn

from mpcompile.data.images import Split
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import flat, unflat
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.passes.reconstruct.layerwise import layerwise

DAMPING = 0.01  # as in the paper; ModelOpt's default is 0.1


def pruned(weight: Tensor, gram: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """Returns the updated weights (rows, columns), float64, and their mask.

    `gram` (columns, columns) is the uncentred second moment of the inputs, float64.
    """
    gram = gram.clone()
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    gram += DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    w, mask = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    w[:, dead] = 0
    for i in range(w.shape[1]):
        if i % pattern.of == 0:
            block = slice(i, i + pattern.of)
            by_saliency = (w[:, block].square() / inverse.diagonal()[block].square()).argsort(dim=1, stable=True)
            mask[:, block] = mask[:, block].scatter(1, by_saliency[:, : pattern.of - pattern.keep], False)
        error = torch.where(mask[:, i], 0, w[:, i]) / inverse[i, i]
        w[:, i:] -= error[:, None] * inverse[i, i:]
        w[:, i] = torch.where(mask[:, i], w[:, i], 0)
    return torch.where(mask, w, 0), mask


def sparsegpt(model: Model, images: Split, pattern: NM, names: list[str]) -> Model:
    """Returns the model with these layers pruned and updated as in the paper."""
    return pruned_in_order(model, images, pattern, names, pruned)


@torch.no_grad()
def pruned_in_order(
    model: Model,
    images: Split,
    pattern: NM,
    names: list[str],
    prune: Callable[[Tensor, Tensor, NM], tuple[Tensor, Tensor]],
) -> Model:
    """Returns the model with these layers pruned, each on the outputs of the pruned layers before it.

    `prune` takes a weight as (rows, columns), the uncentred second moment of its inputs, and the pattern; it returns
    the new weight and its mask.
    """
    model = replace(model, graph=copy.deepcopy(model.graph))
    plans = {}
    for step in layerwise(model, None, images, names):
        assert step.moments is not None
        [name] = step.weight.names
        gram, weight = step.moments.problem(centred=False).gram, step.layer.weight
        rows = flat(weight).reshape(len(gram), -1, gram.shape[-1])
        results = [prune(part, g, pattern) for part, g in zip(rows, gram, strict=True)]
        updated, mask = (torch.cat(parts) for parts in zip(*results, strict=True))
        weight.copy_(unflat(updated, weight.shape))
        plans[name] = replace(model.plan_of(name), pattern=pattern, mask=unflat(mask, weight.shape))
    return model.with_plan(plans)


@torch.no_grad()
def modelopt_sparsegpt(model: Model, module: nn.Module, images: Split, pattern: NM, names: list[str]) -> Model:
    """Returns the model with ModelOpt's masks, and magnitude masks for layers that ModelOpt skips.

    Raises ImportError if ModelOpt is not installed.
    """
    import modelopt.torch.sparsity as mts

    copied = copy.deepcopy(module).eval()
    config = {
        "data_loader": [pixels for pixels, _ in images.batches(32)],
        "collect_func": lambda batch: batch,
        "pattern": f"{pattern.of - pattern.keep}:{pattern.of} sparsity",  # ModelOpt counts zeros
        "verbose": False,
    }
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        masked_modules = dict(mts.sparsify(copied, "sparsegpt", config=config).named_modules())
    model = replace(model, graph=copy.deepcopy(model.graph))
    plans = {}
    for name in names:
        layer, mask = model.layer(name), getattr(masked_modules[name], "_weight_mask", None)
        if mask is None:
            mask = nm_mask(layer.weight.abs(), pattern)
        layer.weight.masked_fill_(~mask, 0.0)
        plans[name] = replace(model.plan_of(name), pattern=pattern, mask=mask)
    return model.with_plan(plans)
