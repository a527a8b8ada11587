"""A data set that another process has opened, as it lies on this machine. Free of torch."""

from __future__ import annotations

from dataclasses import replace

from sdtrain.data.read.dataset import Dataset, size_damage
from sdtrain.data.read.remote import is_remote
from sdtrain.files import stamp_of


def seen_from_here(dataset: Dataset) -> Dataset:
    """`dataset` itself where the first shard that is no address is the very file that was found there.

    Else the shards are copies of this machine: their times are those here, and their sizes are compared with the index.
    Raises DataError for a shard that is longer than its index says.
    """
    number = next((i for i, shard in enumerate(dataset.shards) if not is_remote(shard)), None)
    if number is None or stamp_of(dataset.shards[number]) == tuple(dataset.stamps[number]):
        return dataset
    return replace(dataset, damage=tuple(size_damage(dataset.shards, dataset.index)))
