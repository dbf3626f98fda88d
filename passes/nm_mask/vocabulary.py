"""Masks whose rows take their patterns from a vocabulary: P patterns for each block of M input channels.

For one block, G[r, k] is the score that row r keeps with the k-th of the K = C(M, N) patterns. The vocabulary S is the
set of at most P patterns that maximises

    F(S) = Σ_r max over k in S of G[r, k],

a facility location problem. F is submodular, so choosing one pattern after another, each time the one that adds most,
reaches at least 1 − 1/e of the optimum (Nemhauser, Wolsey and Fisher 1978). Exchanges follow: each chosen pattern is
replaced by the best of all K patterns while that gains. If the rows' own best patterns are at most P, they are the
vocabulary, and nothing is lost. Blocks do not interact. Ties go to the first pattern in lexicographic order, so equal
scores give equal masks.
"""

import itertools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import grouped, pattern_codes, ungrouped

CHUNK_BYTES = 128 << 20  # of G at once
SWEEPS = 4  # of exchanges, over the P patterns of each block that the sweep before changed
LARGEST = 1e30  # of a score; float32 sums over 10⁸ rows do not overflow
ROUNDING = 1e-6  # relative, of a float32 sum: a smaller gain might be none


def vocabularies(score: Float[Tensor, "out in_ *taps"], pattern: NM) -> Bool[Tensor, "blocks words of"]:
    """The vocabulary of each block of M input channels that keeps most of the scores, all in one block at once."""
    every = all_patterns(pattern.keep, pattern.of)
    words = min(pattern.vocabulary, len(every))
    blocks = _blocks(score, pattern.of).float()
    step = max(1, CHUNK_BYTES // (4 * blocks.shape[1] * len(every)))
    chosen = [_chosen(part, every, words) for part in blocks.split(step)]
    return every[torch.cat(chosen)]


def assigned(
    score: Float[Tensor, "out in_ *taps"], words: Bool[Tensor, "blocks words of"]
) -> Bool[Tensor, "out in_ *taps"]:
    """The mask in which each row takes, in each block, the pattern of the block's vocabulary that keeps most."""
    kept = _blocks(score, words.shape[-1]) @ words.mT.double()
    return taken(words, kept.argmax(-1), score.shape)


def taken(
    words: Bool[Tensor, "blocks words of"], choice: Int[Tensor, "blocks out"], shape: torch.Size
) -> Bool[Tensor, "out in_ *taps"]:
    """The mask of this shape in which row r takes pattern choice[b, r] of the vocabulary of block b."""
    groups = words.gather(1, choice[:, :, None].expand(-1, -1, words.shape[-1]))
    return ungrouped(groups.transpose(0, 1), shape)


def all_patterns(keep: int, of: int) -> Bool[Tensor, "patterns of"]:
    """All patterns that keep `keep` of `of`, in lexicographic order of the kept positions."""
    kept = torch.tensor(list(itertools.combinations(range(of), keep)))
    return torch.zeros(len(kept), of, dtype=torch.bool).scatter_(1, kept, True)


def _blocks(score: Float[Tensor, "out in_ *taps"], of: int) -> Float[Tensor, "blocks out of"]:
    """The scores by blocks of M input channels; an infinite score is finite, as it would make sums of others NaN."""
    return grouped(score, of).transpose(0, 1).double().nan_to_num(nan=0.0).clamp(-LARGEST, LARGEST)


def _chosen(
    blocks: Float[Tensor, "blocks out of"], every: Bool[Tensor, "patterns of"], words: int
) -> Int[Tensor, "blocks words"]:
    """The indices of the patterns in the vocabulary of each block."""
    if words == len(every):
        return torch.arange(words).expand(len(blocks), -1)
    gain = blocks @ every.T.float()  # G
    chosen: list[Tensor] = []
    best = gain.new_full(gain.shape[:2], -torch.inf)
    for _ in range(words):
        chosen.append(_adding_most(best, gain)[0])
        best = torch.maximum(best, _column(gain, chosen[-1]))
    found = _exchanged(gain, torch.stack(chosen, 1))
    own = _own(blocks, every)  # (blocks, patterns): whether a row's own best pattern
    few = own.sum(1) <= words
    first = own.byte().sort(dim=1, descending=True, stable=True).indices[:, :words]
    return torch.where(few[:, None], first, found)


def _exchanged(
    gain: Float[Tensor, "blocks out patterns"], chosen: Int[Tensor, "blocks words"]
) -> Int[Tensor, "blocks words"]:
    """The vocabulary after exchanges of one pattern that gain, in at most SWEEPS sweeps."""
    result, active = chosen.clone(), torch.arange(len(chosen))
    for _ in range(SWEEPS if chosen.shape[1] > 1 else 0):
        chosen = result[active]
        for word in range(chosen.shape[1]):
            others = torch.cat([chosen[:, :word], chosen[:, word + 1 :]], 1)
            rest = gain.gather(2, others[:, None].expand(-1, gain.shape[1], -1)).amax(2)
            candidate, total = _adding_most(rest, gain)
            now = total.gather(1, chosen[:, word, None])[:, 0]
            better = total.gather(1, candidate[:, None])[:, 0] > now * (1 + ROUNDING)
            chosen[:, word] = torch.where(better, candidate, chosen[:, word])
        changed = (chosen != result[active]).any(1)
        result[active] = chosen
        active, gain = active[changed], gain[changed]
        if not len(active):
            break
    return result


def _adding_most(
    best: Float[Tensor, "blocks out"], gain: Float[Tensor, "blocks out patterns"]
) -> tuple[Int[Tensor, " blocks"], Float[Tensor, "blocks patterns"]]:
    """The pattern that adds most to what rows keep already, and what is kept with each."""
    total = torch.maximum(best[:, :, None], gain).sum(1)
    return total.argmax(1), total


def _column(gain: Float[Tensor, "blocks out patterns"], index: Int[Tensor, " blocks"]) -> Float[Tensor, "blocks out"]:
    return gain.gather(2, index[:, None, None].expand(-1, gain.shape[1], 1))[..., 0]


def _own(blocks: Float[Tensor, "blocks out of"], every: Bool[Tensor, "patterns of"]) -> Bool[Tensor, "blocks patterns"]:
    """Whether a pattern is the own best one of a row, with ties to the first position, as for plain N:M."""
    order = blocks.sort(dim=-1, descending=True, stable=True).indices[..., : int(every[0].sum())]
    kept = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order, True)
    index = torch.zeros(1 << every.shape[1], dtype=torch.long)
    index[pattern_codes(every)] = torch.arange(len(every))
    own = torch.zeros(len(blocks), len(every), dtype=torch.bool)
    return own.scatter_(1, index[pattern_codes(kept)], True)
