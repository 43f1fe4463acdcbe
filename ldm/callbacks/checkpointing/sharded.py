"""FSDP2 training with sharded checkpoints: each rank writes its own shards."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ldm.callbacks.checkpointing import checkpoint_file
from ldm.execution.fsdp import distribute_like
from ldm.weights.storage.sharded import OTHERS, SHARD, SHARDS


class ShardedModelParallel(ModelParallelStrategy):
    """Lightning's strategy for a module that FSDP2 shards, with checkpoints as in `weights.storage.sharded`.

    It resumes from checkpoints of any number of ranks and from unsharded ones; any other strategy resumes from its
    checkpoints, too. All ranks must write to the same folder.
    """

    lightning_restore_optimizer = True  # ModelParallelStrategy restores it only from Lightning's own sharded format

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes this rank's file; a random token in the file names identifies this save among those of one step."""
        path, save = self.broadcast((Path(filepath), secrets.token_hex(4)))
        names = [f"{path.stem}_{save}_rank_{rank}.shards" for rank in range(1, self.world_size)]
        shards: list[Tensor] = []

        def take(tensor: DTensor) -> dict[str, int]:
            shards.append(tensor.to_local().detach())
            return {SHARD: len(shards) - 1}

        checkpoint = {**apply_to_collection(checkpoint, DTensor, take), SHARDS: shards, OTHERS: names}
        if self.global_rank:
            path, checkpoint = path.with_name(names[self.global_rank - 1]), {SHARDS: shards}
        self.checkpoint_io.save_checkpoint(checkpoint, path)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint; of sharded tensors only this rank's shards stay in memory."""
        assert self.lightning_module is not None
        like = next(weight for weight in self.lightning_module.parameters() if isinstance(weight, DTensor))

        def join(shards: list[Tensor]) -> Tensor:
            full = torch.cat(shards).to(like.device)
            return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).clone()

        return checkpoint_file.read(self.broadcast(checkpoint_path), join=join)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own, saved = self.lightning_module.state_dict(), checkpoint["state_dict"]
        spread = {
            name: distribute_like(tensor.to(self.root_device), own.get(name, tensor)) for name, tensor in saved.items()
        }
        self.lightning_module.load_state_dict(spread, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the state as it is; `distribute_state` shards it afterwards."""
        Strategy.load_optimizer_state_dict(self, checkpoint)
