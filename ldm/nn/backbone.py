"""What the rest of the code may know of a denoising network."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.conditioning import Conditioning
from ldm.nn.inpainting import INPAINTING


class Backbone(nn.Module, ABC):
    """A network that maps noisy latents, times and conditioning to a prediction.

    `kind` names the class in files of weights, `config` holds the arguments of the constructor, and `checkpointing`
    recomputes each of the repeated blocks in the backward pass instead of keeping its activations.
    """

    kind: ClassVar[str]
    config: dict[str, Any]
    checkpointing: bool

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of the latents, and of the prediction."""

    @property
    @abstractmethod
    def reads(self) -> dict[str, int]:
        """The fields and hints of a `Conditioning` that it reads, and the width or number of channels of each."""

    @property
    def multiple(self) -> int:
        """The height and width of latents must be multiples of this."""
        return 1

    @abstractmethod
    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The blocks that make up nearly all of the network, in the order in which they run: the units of gradient
        checkpointing, of sharding and of the FLOP count."""

    @abstractmethod
    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Latents (b, c, h, w), times (b,) and conditioning of k·b samples → predictions (k·b, c, h, w).

        Sample i of x goes with the conditionings i, b + i, 2b + i, …; what does not depend on the conditioning is
        computed once for all k of them.
        """

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def shared(self, text: Tensor, x: Tensor) -> Tensor:
        """The text (k·b, n, d). Raises ValueError where it cannot be shared evenly by the b latents."""
        if len(text) % len(x):
            raise ValueError(f"{len(text)} texts cannot be shared evenly by {len(x)} latents: give each as many")
        return text

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """One of the repeated blocks, recomputed in the backward pass if `checkpointing` is set."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def check_inputs(backbone: Backbone, latent_channels: int, given: dict[str, int]) -> None:
    """Raises ValueError where the network does not take the first stage's latents, or does not get the conditioning
    that it reads: `given` are the widths of the text encoder's fields."""
    if backbone.latent_channels != latent_channels:
        raise ValueError(
            f"the first stage has {latent_channels} latent channels, but the {backbone.kind} takes "
            f"{backbone.latent_channels}: choose a first_stage and a model of equal channels"
        )
    reads = dict(backbone.reads)
    hint = reads.pop(INPAINTING, latent_channels + 1)  # the mask and the latents of the masked image
    if hint != latent_channels + 1:
        raise ValueError(
            f"the {backbone.kind} takes {latent_channels + hint} input channels, but must take {latent_channels} or, "
            f"for inpainting, {2 * latent_channels + 1}: choose a model of so many"
        )
    for name, width in reads.items():
        if given.get(name) != width:
            found = f"{name} of width {given[name]}" if name in given else f"no {name}"
            raise ValueError(
                f"the {backbone.kind} reads {name} of width {width}, but the text encoder gives {found}: choose a "
                "text_encoder and a model that fit"
            )


def check_size(backbone: Backbone, factor: int, size: Sequence[int], what: str = "size") -> None:
    """Raises ValueError where the network does not take the latents of images of this height and width, which are
    smaller than the images by the first stage's `factor`; `what` names the size in the error."""
    multiple = factor * backbone.multiple
    if any(length < 1 or length % multiple for length in size):
        raise ValueError(
            f"{what} is {size[0]}x{size[1]}, but this model draws heights and widths that are multiples of {multiple}"
        )


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that require gradients, by name."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
