"""Draws the samples of a run from WebDataset shards: from some shards, which the seed chooses, and not from all."""

import math

import numpy as np

from mpcompile.data.dataset_name import DatasetName
from mpcompile.data.dataset_pool import OpenDataset, Pool, first_of_stream, held_out_of_stream
from mpcompile.data.dataset_splits import chosen_splits
from mpcompile.data.divide import Numbers
from mpcompile.data.image_tree import shown
from mpcompile.data.shard_files import ALL, Shards, shards_by_split
from mpcompile.data.shards import Member, Sample, image_of, label_of, samples_of
from mpcompile.errors import LoadError

SPREAD = 16  # shards that samples are drawn from, if these have enough: a shard may hold few classes


def open_shards(dataset: DatasetName, numbers: Numbers) -> OpenDataset:
    """The samples of a run from `wds/…`. Reads the headers and labels of some shards. Raises LoadError."""
    shards = shards_by_split(dataset)
    chosen = chosen_splits(dataset, list(shards))
    notes = list(chosen.notes)
    is_divided = chosen.held_out is None
    counts = {chosen.train: first_of_stream(numbers, is_divided)}
    if chosen.held_out is not None:
        counts[chosen.held_out] = held_out_of_stream(numbers)
    pools = [_drawn(dataset, split, shards[split], count, numbers.seed, notes) for split, count in counts.items()]
    return OpenDataset(pools[0], None if is_divided else pools[1], tuple(notes), by_index=False)


def _drawn(dataset: DatasetName, split: str, shards: Shards, count: int, seed: int, notes: list[str]) -> Pool:
    """`count` samples of a split, or all if there are fewer. Raises LoadError."""
    rng = np.random.default_rng(seed)
    each = math.ceil(count / min(len(shards), SPREAD))
    drawn: list[tuple[Member, Sample]] = []
    left: list[tuple[Member, Sample]] = []
    without = read = 0
    for position in rng.permutation(len(shards)):
        found = [(image_of(sample, dataset.image), sample) for sample in samples_of(shards[position])]
        images = [(image, sample) for image, sample in found if image is not None]
        if not images and found:
            there = shown(sorted({suffix for _, sample in found for suffix in sample}), 12)
            raise LoadError(f"{shards[position]} has no images; its files end with {there}; give ,image=SUFFIX")
        without += len(found) - len(images)
        read += 1
        order = rng.permutation(len(images)).tolist()
        drawn += [images[index] for index in order[:each]]
        left += [images[index] for index in order[each:]]
        if len(drawn) >= count:
            break
    drawn = (drawn + left)[:count]  # shards of few samples: the rest comes from the others
    where = str(dataset) if split == ALL else f"split {split} of {dataset}"
    if not drawn:
        raise LoadError(f"{where} has no samples; give shards that have some")
    if without:
        notes.append(f"{without:,} samples of {dataset} without an image were left out")
    return Pool(
        [image for image, _ in drawn],
        [label_of(sample, dataset.label) for _, sample in drawn],
        None,
        f"{where} ({len(drawn):,} samples of {read:,} of {len(shards):,} shards)",
    )
