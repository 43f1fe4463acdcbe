"""CLIP score: how well images match their captions (Hessel et al. 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torchmetrics import Metric

from ldm.metrics.features import ClipFeatures, clip_features
from ldm.nn.text_encoder import TextEncoder
from ldm.weights.native import fingerprint
from ldm.weights.parts import text_encoder


class ClipSimilarity(nn.Module):
    """Maps images uint8 (b, 3, h, w) and their b captions to cosine similarities (b,) in the shared space."""

    def __init__(self, text: TextEncoder, image: ClipFeatures) -> None:
        super().__init__()
        self.text, self.image = text.towers[0].float().eval().requires_grad_(False), image
        self.tokenize = text.tokenize
        self.fingerprint = fingerprint(self.state_dict())

    @property
    def device(self) -> torch.device:
        return self.text.position_embedding.device

    @torch.no_grad()
    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        tokens = self.tokenize(list(captions)).to(images.device)
        return cosine_similarity(self.image.embed(images), self.text.embed(tokens))


def clip_similarity(image: str, text: str | None = None) -> ClipSimilarity:
    """Loads CLIP from the path of a full model, see `ldm.weights.recognise`, or from the paths of its two towers."""
    return ClipSimilarity(text_encoder(image if text is None else text).network, clip_features(image))


class ClipScore(Metric):
    """100 · mean of max(cosine, 0) over images, which is 100 times MLPerf's CLIP score."""

    full_state_update = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, sync: bool = True) -> None:
        super().__init__(sync_on_compute=sync)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, cosines: Tensor) -> None:
        """Adds cosine similarities (b,)."""
        if not cosines.isfinite().all():
            raise ValueError("the similarities contain NaN or infinity: a CLIP tower overflowed; run it in float32")
        self.total += cosines.double().clamp(min=0).sum()
        self.count += len(cosines)

    def compute(self) -> Tensor:
        if not self.count:
            raise ValueError("the CLIP score needs at least one image, but was given none")
        return 100 * self.total / self.count
