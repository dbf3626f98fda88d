"""How much more an order of channels keeps, by search -> results/permute.{json,md}.

    python benchmarks/permute.py [KIND …]        # weights of the pretrained models: make bench-models

With kinds of channels named, only their rows are measured anew, and the others stay as they are in the file.

Efficacy is (kept after − kept before) / (ideal − kept before), where the ideal keeps in each row the largest weights
wherever they are. The cells are those that the analysis finds in real models: the hidden layers of MLPs, the values
within each head, the residual stream that all blocks share, and expanded and narrow channels of a CNN.

Searches to beat, each written from its description:

- interleave: columns by falling Σ W², dealt to the groups in turn (arXiv 2606.02608);
- serpentine: by falling Σ|W|, dealt there and back again (Zhang et al., ICLR 2024);
- random: the best of 200 orders;
- greedy swaps: the best exchange of two columns of any two groups, one at a time (Pool and Yu, NeurIPS 2021);
- 8-window: of any two groups of four the best of all 35 ways to deal their eight columns anew, the best that share no
  group at once (the same).

The last two get ten times the time that ours took, and 15 s at least: in the same time they hardly begin. They know 2:4
alone.
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
from mpcompile.passes.permute.permute import OrderingProblem, ordering_problem, scores_by_axis

SWEEPS = 10
CHUNK = 64  # pairs of groups at once
QUESTION = "what share of the possible gain does an order of channels reach, by search?"
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
    """The two captured models; the ViT gets an output layer, without which its residual stream would be the output."""
    vit = vit_small(112)
    vit.reset_classifier(10)  # type: ignore[operator]
    for module, arch in ((vit, "vit_small_patch14_dinov2"), (efficientnet_lite0(), "tf_efficientnet_lite0")):
        yield arch, capture(module, source_of(module, name=arch, arch=arch, sha256=""))


def problems(model: Model, pattern: NM, layer: str) -> list[OrderingProblem]:
    """The searches for the exchangeable sets of channels that a layer reads."""
    patterns = {name: pattern for name, reason in eligible(model, pattern).items() if reason is None}
    scores = scores_by_axis(model, patterns, {})
    groups = [g for g in couple(model).groups if any(axis.owner == f"{layer}.weight" for axis in g.readers)]
    sets = [channels for group in groups for channels in group.sets]
    return [problem for channels in sets if (problem := ordering_problem(channels, scores))]


def interleave(x: Tensor, of: int) -> Tensor:
    """The paper's order."""
    return x.square().sum(0, dtype=torch.float64).argsort(descending=True, stable=True).reshape(of, -1).T.reshape(-1)


def best_random(x: Tensor, pattern: NM, count: int = 200) -> Tensor:
    """The best of some random orders."""
    rng = torch.Generator().manual_seed(0)
    orders = [torch.randperm(x.shape[1], generator=rng) for _ in range(count)]
    return max(orders, key=lambda order: kept_score(x[:, order], pattern))


SUBSETS = [s for s in itertools.combinations(range(8), 4) if 0 in s]  # one of each of the 35 ways, by its first group
SWAPS = [s for s in SUBSETS if len(set(s) & {0, 1, 2, 3}) in (3, 1)]  # those that exchange one column


def two_of_four(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The sum of the two largest of four."""
    high, low, other_high, other_low = a.maximum(b), a.minimum(b), c.maximum(d), c.minimum(d)
    return (high + other_high).maximum(high + low).maximum(other_high + other_low)


def ways(x: Tensor, groups: Tensor, pairs: Tensor, subsets: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """For each pair of groups the best gain of dealing their columns anew, and which way that is."""
    gains, which = [], []
    for part in pairs.split(CHUNK):
        columns = x[:, groups[part].reshape(len(part), 8)]  # (rows, pairs, 8)
        c = columns.unbind(-1)
        now = two_of_four(*c[:4]) + two_of_four(*c[4:])
        values = []
        for subset in subsets:
            rest = [i for i in range(8) if i not in subset]
            values.append((two_of_four(*(c[i] for i in subset)) + two_of_four(*(c[i] for i in rest)) - now).sum(0))
        best, index = torch.stack(values).max(0)
        gains.append(best)
        which.append(index)
    return torch.cat(gains), torch.cat(which)


def by_pairs(x: Tensor, seconds: float, subsets: Sequence[tuple[int, ...]], at_once: bool) -> Tensor:
    """Greedy improvement of pairs of groups of four, until nothing gains or the time is over."""
    groups = torch.arange(x.shape[1]).reshape(-1, 4).clone()
    g = len(groups)
    pairs = torch.combinations(torch.arange(g), 2)
    end = time.perf_counter() + seconds
    gains, which = ways(x, groups, pairs, subsets)
    while time.perf_counter() < end:
        busy: set[int] = set()
        for index in gains.argsort(descending=True).tolist():
            one, other = pairs[index].tolist()
            if float(gains[index]) <= 1e-5 or (busy and not at_once):
                break
            if one in busy or other in busy:
                continue
            busy |= {one, other}
            columns = torch.cat([groups[one], groups[other]])
            first = list(subsets[int(which[index])])
            rest = [i for i in range(8) if i not in first]
            groups[one], groups[other] = columns[first].clone(), columns[rest].clone()
        if not busy:
            break
        touched = torch.tensor([one in busy or other in busy for one, other in pairs.tolist()])
        gains[touched], which[touched] = ways(x, groups, pairs[touched], subsets)
    return groups.reshape(-1)


def methods(pattern: NM, limit: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """Orders by each of the searches to beat."""
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "interleave": lambda x: interleave(x, pattern.of),
        "serpentine": lambda x: serpentine(x, pattern.of),
        "random, best of 200": lambda x: best_random(x, pattern),
    }
    if pattern == NM(2, 4):
        found["greedy swaps"] = lambda x: by_pairs(x, limit, SWAPS, at_once=False)
        found["8-window"] = lambda x: by_pairs(x, limit, SUBSETS, at_once=True)
    return found


def measure(model: Model, arch: str, kind: str, layer: str, pattern: NM) -> dict[str, Any]:
    """The row for one layer's exchangeable sets of channels."""
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
    best = sum(upper_bound(problem.score, pattern) for problem in own)
    shape = f"{len(own)} × " if len(own) > 1 else ""
    return {
        "model": arch,
        "kind": kind,
        "layer": layer,
        "pattern": str(pattern),
        "cells": f"{shape}{own[0].score.shape[0]} × {own[0].score.shape[1]}",
        "kept_before": before / best,
        "efficacy": {name: (value - before) / (best - before) for name, value in after.items()},
        "seconds": seconds,
    }


def main() -> None:
    """Writes both files."""
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
    print(table, f"ours is first in {wins:.0%} of the rows")


if __name__ == "__main__":
    main()
