"""A checkpoint that several ranks wrote: a file each, with one shard along dimension 0 of every tensor.

The first rank's file has everything else, too: in it a tensor is {"shard": i}, the i-th of each file's "shards", and
"other_ranks" names the files beside it.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARD, SHARDS, OTHERS = "shard", "shards", "other_ranks"
Join = Callable[[list[Tensor]], Tensor]


def shard_files(path: Path, checkpoint: Any) -> list[Path]:
    """All that the checkpoint at `path` lies in. Raises FileNotFoundError where another rank's file is missing."""
    names = checkpoint.get(OTHERS, []) if isinstance(checkpoint, dict) else []
    found = [path, *(path.with_name(name) for name in names)]
    for file in found[1:]:
        if not file.is_file():
            raise FileNotFoundError(
                f"{path} holds one rank's shards, but those in {file} are missing; keep them together"
            )
    return found


def join_shards(path: Path, load: Callable[[Path], Any], join: Join = torch.cat, skip: Collection[str] = ()) -> Any:
    """The checkpoint at `path`, its shards joined, except for what the keys `skip` hold; any other file as it is.

    One tensor at a time is fetched from the other ranks' files.
    """
    checkpoint = load(path)
    if not isinstance(checkpoint, dict) or OTHERS not in checkpoint:
        return checkpoint
    others = [torch.load(file, "cpu", weights_only=True, mmap=True) for file in shard_files(path, checkpoint)[1:]]
    ranks = [checkpoint.pop(SHARDS), *(other[SHARDS] for other in others)]

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {SHARD}:
                return join([shards[value[SHARD]] for shards in ranks])
            return {key: whole(one) for key, one in value.items()}
        return type(value)(map(whole, value)) if isinstance(value, list | tuple) else value

    return {key: value if key in skip else whole(value) for key, value in checkpoint.items() if key != OTHERS}
