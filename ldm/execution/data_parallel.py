"""Data-parallel training (DDP) with a choice of the dtype in which gradients travel between the ranks."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

DTYPES = "float32", "bfloat16"


def bfloat16_mean(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Sends the gradients of a bucket as bfloat16, and replaces them by their mean over the ranks."""
    gradients = bucket.buffer()
    sent = gradients.div(dist.get_world_size()).bfloat16()
    received = dist.all_reduce(sent, async_op=True).get_future()
    return received.then(lambda done: gradients.copy_(done.value()[0]))


class DataParallel(DDPStrategy):
    """Lightning's DDPStrategy that sends gradients as float32 or bfloat16.

    With bfloat16 each rank rounds its gradients, and their sum is rounded again. Raises ValueError for another dtype.
    """

    def __init__(self, gradients: str = "float32", **settings: Any) -> None:
        if gradients not in DTYPES:
            raise ValueError(f"strategy.name.gradients is {gradients!r}, but must be {' or '.join(DTYPES)}")
        super().__init__(**settings)
        self.gradients = gradients

    def configure_ddp(self) -> None:
        super().configure_ddp()
        if self.gradients == "bfloat16":  # as a hook given to Lightning, it would be ignored on CPUs
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, bfloat16_mean)
