"""Weight magnitude that channel orders keep, by search method -> results/permute.{json,md}.

    python benchmarks/permute.py [KIND …]        # weights of the pretrained models: make bench-models

If kinds of channels are named, only their rows are measured; the other rows of the file are kept.

Efficacy is (kept after − kept before) / (ideal − kept before). The ideal keeps the largest weights of each row without
regard to groups. The sets of exchangeable channels are those found in real models: the hidden channels of MLPs, the
value channels within each head, the residual stream shared by all blocks, and expanded and narrow channels of a CNN.

Baselines, each implemented from its description:

- interleave: columns in decreasing order of Σ W², dealt round-robin to the groups (arXiv 2606.02608);
- serpentine: columns in decreasing order of Σ|W|, dealt to the groups in alternating direction (Zhang et al., ICLR
  2024);
- random: the best of 200 random orders;
- greedy swaps: repeatedly, the best swap of two columns of any two groups (Pool and Yu, NeurIPS 2021);
- 8-window: for each pair of groups of 4, the best of the 35 ways to divide their 8 columns; in each round the best
  disjoint pairs are applied (the same paper).

The last two get 10 times the time of our search, and at least 15 s, since they make little progress in the same time.
They support only 2:4.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lib.common import RESULTS, markdown, rows_of, write
from lib.pretrained import efficientnet_lite0, vit_small
from torch import Tensor

from mpcompile.analysis.eligibility import eligible
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes.permute.coupling import couple
from mpcompile.passes.permute.order_search import kept_score, search, serpentine, upper_bound
from mpcompile.passes.permute.ordering_problem import OrderingProblem, ordering_problem, scores_by_axis

SWEEPS = 10
CHUNK = 64  # pairs of groups per batch, to limit memory
QUESTION = "What share of the possible gain does each search for an order of channels reach?"
SHOWN: dict[str, dict[str, tuple[str, ...]]] = {
    "vit_small_patch14_dinov2": {
        "MLP hidden": ("blocks.0.mlp.fc2", "blocks.5.mlp.fc2", "blocks.11.mlp.fc2"),
        "values within heads": ("blocks.0.attn.proj", "blocks.5.attn.proj", "blocks.11.attn.proj"),
        "residual stream": ("blocks.0.attn.qkv",),
    },
    "tf_efficientnet_lite0": {
        "expanded channels": ("blocks.3.1.conv_pwl", "blocks.4.1.conv_pwl", "blocks.5.2.conv_pwl"),
        "narrow channels": ("blocks.3.1.conv_pw", "blocks.4.1.conv_pw", "blocks.5.2.conv_pw"),
    },
}


def models() -> Iterator[tuple[str, Model]]:
    """Yields the two captured models by name.

    The ViT gets a classifier: without one its residual stream would be the model's output, and could not be reordered.
    """
    vit = vit_small(112)
    vit.reset_classifier(10)  # type: ignore[operator]
    for module, arch in ((vit, "vit_small_patch14_dinov2"), (efficientnet_lite0(), "tf_efficientnet_lite0")):
        yield arch, capture(module, source_of(module, name=arch, arch=arch, sha256=""))


def problems(model: Model, pattern: NM, layer: str) -> list[OrderingProblem]:
    """Returns one ordering problem per exchangeable set of channels that the layer reads."""
    patterns = {name: pattern for name, reason in eligible(model, pattern).items() if reason is None}
    scores = scores_by_axis(model, patterns, {})
    groups = [g for g in couple(model).groups if any(axis.owner == f"{layer}.weight" for axis in g.readers)]
    sets = [channels for group in groups for channels in group.sets]
    return [problem for channels in sets if (problem := ordering_problem(channels, scores))]


def interleave(x: Tensor, of: int) -> Tensor:
    """Returns the order of arXiv 2606.02608 for scores (rows, columns) and groups of `of` columns."""
    return x.square().sum(0, dtype=torch.float64).argsort(descending=True, stable=True).reshape(of, -1).T.reshape(-1)


def best_random(x: Tensor, pattern: NM, count: int = 200) -> Tensor:
    """Returns the order of `count` random ones that keeps the largest score."""
    rng = torch.Generator().manual_seed(0)
    orders = [torch.randperm(x.shape[1], generator=rng) for _ in range(count)]
    return max(orders, key=lambda order: kept_score(x[:, order], pattern))


# The 35 ways to divide 8 columns into two groups of 4, each given by the group with column 0.
SUBSETS = [s for s in itertools.combinations(range(8), 4) if 0 in s]
SWAPS = [s for s in SUBSETS if len(set(s) & {0, 1, 2, 3}) in (3, 1)]  # those that swap one column of each group


def two_of_four(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Returns the elementwise sum of the two largest of four tensors: the score that 2:4 keeps of a group."""
    high, low, other_high, other_low = a.maximum(b), a.minimum(b), c.maximum(d), c.minimum(d)
    return (high + other_high).maximum(high + low).maximum(other_high + other_low)


def best_divisions(
    x: Tensor, groups: Tensor, pairs: Tensor, subsets: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Returns, for each pair of groups, the largest gain of redividing its 8 columns, and the index of that subset."""
    gains, indices = [], []
    for part in pairs.split(CHUNK):
        columns = x[:, groups[part].reshape(len(part), 8)]  # (rows, pairs, 8)
        c = columns.unbind(-1)
        current = two_of_four(*c[:4]) + two_of_four(*c[4:])
        values = []
        for subset in subsets:
            rest = [i for i in range(8) if i not in subset]
            values.append((two_of_four(*(c[i] for i in subset)) + two_of_four(*(c[i] for i in rest)) - current).sum(0))
        best, index = torch.stack(values).max(0)
        gains.append(best)
        indices.append(index)
    return torch.cat(gains), torch.cat(indices)


def pairwise_search(x: Tensor, seconds: float, subsets: Sequence[tuple[int, ...]], disjoint_pairs: bool) -> Tensor:
    """Returns an order found by greedily redividing pairs of groups of 4, until nothing gains or time is over.

    Each round applies the best pair; with `disjoint_pairs`, also the next best pairs that share no group with it.
    """
    groups = torch.arange(x.shape[1]).reshape(-1, 4).clone()
    pairs = torch.combinations(torch.arange(len(groups)), 2)
    end = time.perf_counter() + seconds
    gains, best = best_divisions(x, groups, pairs, subsets)
    while time.perf_counter() < end:
        changed: set[int] = set()
        for index in gains.argsort(descending=True).tolist():
            one, other = pairs[index].tolist()
            if float(gains[index]) <= 1e-5 or (changed and not disjoint_pairs):
                break
            if one in changed or other in changed:
                continue
            changed |= {one, other}
            columns = torch.cat([groups[one], groups[other]])
            first = list(subsets[int(best[index])])
            rest = [i for i in range(8) if i not in first]
            groups[one], groups[other] = columns[first].clone(), columns[rest].clone()
        if not changed:
            break
        outdated = torch.tensor([one in changed or other in changed for one, other in pairs.tolist()])
        gains[outdated], best[outdated] = best_divisions(x, groups, pairs[outdated], subsets)
    return groups.reshape(-1)


def methods(pattern: NM, limit: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns the baselines by name: functions from scores (rows, columns) to an order; `limit` is in seconds."""
    baselines: dict[str, Callable[[Tensor], Tensor]] = {
        "interleave": lambda x: interleave(x, pattern.of),
        "serpentine": lambda x: serpentine(x, pattern.of),
        "random, best of 200": lambda x: best_random(x, pattern),
    }
    if pattern == NM(2, 4):
        baselines["greedy swaps"] = lambda x: pairwise_search(x, limit, SWAPS, disjoint_pairs=False)
        baselines["8-window"] = lambda x: pairwise_search(x, limit, SUBSETS, disjoint_pairs=True)
    return baselines


def measure(model: Model, arch: str, kind: str, layer: str, pattern: NM) -> dict[str, Any]:
    """Runs our search and the baselines on the exchangeable sets that one layer reads, and returns the row."""
    own = problems(model, pattern, layer)
    started = time.perf_counter()
    ours = [search(problem.score, pattern, problem.work(SWEEPS)) for problem in own]
    seconds = {"ours": time.perf_counter() - started}
    before, after = sum(f.before for f in ours), {"ours": sum(f.after for f in ours)}
    limit = max(10 * seconds["ours"], 15.0) / len(own)
    for name, order in methods(pattern, limit).items():
        started = time.perf_counter()
        after[name] = sum(kept_score(problem.score[:, order(problem.score)], pattern) for problem in own)
        seconds[name] = time.perf_counter() - started
    ideal = sum(upper_bound(problem.score, pattern) for problem in own)
    shape = f"{len(own)} × " if len(own) > 1 else ""
    return {
        "model": arch,
        "kind": kind,
        "layer": layer,
        "pattern": str(pattern),
        "cells": f"{shape}{own[0].score.shape[0]} × {own[0].score.shape[1]}",
        "kept_before": before / ideal,
        "efficacy": {name: (value - before) / (ideal - before) for name, value in after.items()},
        "seconds": seconds,
    }


def main() -> None:
    """Measures, and writes both results files."""
    torch.manual_seed(0)
    kinds = sys.argv[1:] or [kind for shown in SHOWN.values() for kind in shown]
    stored = rows_of("permute") if sys.argv[1:] else []
    rows: list[dict[str, Any]] = []
    for arch, model in models():
        for kind, layers in SHOWN[arch].items():
            if kind not in kinds:
                rows.extend(row for row in stored if (row["model"], row["kind"]) == (arch, kind))
                continue
            for pattern, layer in itertools.product((NM(2, 4), NM(8, 16)), layers):
                rows.append(measure(model, arch, kind, layer, pattern))
                print(rows[-1], flush=True)
    write("permute", QUESTION, "cpu", ("torch", "timm", "scipy"), rows)
    columns = ["ours", "8-window", "greedy swaps", "random, best of 200", "serpentine", "interleave"]
    cells = []
    for row in rows:
        shown = [
            f"{100 * row['efficacy'][n]:.1f} % ({row['seconds'][n]:.1f} s)" if n in row["efficacy"] else ""
            for n in columns
        ]
        cells.append((row["kind"], row["layer"], row["cells"], row["pattern"], *shown))
    table = markdown(("channels", "read by", "rows × columns", "pattern", *columns), cells)
    (RESULTS / "permute.md").write_text(f"# Orders of channels\n\n{QUESTION}\n\n{table}", encoding="utf-8")
    wins = np.mean([row["efficacy"]["ours"] >= max(row["efficacy"].values()) for row in rows])
    print(table, f"our search has the highest efficacy in {wins:.0%} of the rows")


if __name__ == "__main__":
    main()
