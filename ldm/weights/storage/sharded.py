"""Reads checkpoints that several ranks wrote, each into a file with its shard of every tensor along dimension 0.

The first rank's file also contains everything else: there a tensor is {"shard": i}, the i-th of each file's "shards",
and "other_ranks" lists the names of the other files, in the same folder.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARD, SHARDS, OTHERS = "shard", "shards", "other_ranks"
Join = Callable[[list[Tensor]], Tensor]


def shard_files(path: Path, checkpoint: Any) -> list[Path]:
    """Returns all files of the checkpoint at `path`. Raises FileNotFoundError if another rank's file is missing."""
    names = checkpoint.get(OTHERS, []) if isinstance(checkpoint, dict) else []
    files = [path, *(path.with_name(name) for name in names)]
    for file in files[1:]:
        if not file.is_file():
            raise FileNotFoundError(f"{path} contains one rank's shards, but {file} is missing; keep them together")
    return files


def join_shards(path: Path, load: Callable[[Path], Any], join: Join = torch.cat, skip: Collection[str] = ()) -> Any:
    """Loads the checkpoint at `path` and joins its shards, except under the keys in `skip`.

    A file that one process wrote is returned unchanged. The other ranks' files are read one tensor at a time.
    """
    checkpoint = load(path)
    if not isinstance(checkpoint, dict) or OTHERS not in checkpoint:
        return checkpoint
    others = [torch.load(file, "cpu", weights_only=True, mmap=True) for file in shard_files(path, checkpoint)[1:]]
    ranks = [checkpoint.pop(SHARDS), *(other[SHARDS] for other in others)]

    def joined(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {SHARD}:
                return join([shards[value[SHARD]] for shards in ranks])
            return {key: joined(item) for key, item in value.items()}
        return type(value)(map(joined, value)) if isinstance(value, list | tuple) else value

    return {key: value if key in skip else joined(value) for key, value in checkpoint.items() if key != OTHERS}
