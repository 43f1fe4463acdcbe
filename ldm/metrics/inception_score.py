"""Inception score (Salimans et al. 2016)."""

import torch
from torch import Tensor
from torchmetrics import Metric


class InceptionScore(Metric):
    """exp(E KL(p(y|x) ‖ p(y))) of class logits (b, k), over all images at once.

    The paper's mean over ten splits is lower: compare only values of the same kind and count.
    """

    full_state_update = False
    higher_is_better = True
    probability: Tensor
    negative_entropy: Tensor
    count: Tensor

    def __init__(self, classes: int, sync: bool = True) -> None:
        super().__init__(sync_on_compute=sync)
        self.add_state("probability", torch.zeros(classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negative_entropy", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        if not logits.isfinite().all():
            raise ValueError("the logits contain NaN or infinity: the classifier overflowed; run it in float32")
        log_p = logits.double().log_softmax(dim=1)
        self.probability += log_p.exp().sum(dim=0)
        self.negative_entropy += (log_p.exp() * log_p).sum()
        self.count += len(logits)

    def compute(self) -> Tensor:
        if not self.count:
            raise ValueError("the Inception score needs at least one image, but was given none")
        mean = self.probability / self.count
        return (self.negative_entropy / self.count - torch.special.xlogy(mean, mean).sum()).exp()
