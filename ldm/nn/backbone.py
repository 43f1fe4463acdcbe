"""The interface of denoising networks: `Backbone`, and checks that one fits the parts around it."""

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

    `kind` names the class in weight files, `config` holds the constructor's arguments, and `checkpointing` turns on
    gradient checkpointing: activations within a repeated block are recomputed in the backward pass.
    """

    kind: ClassVar[str]
    config: dict[str, Any]
    checkpointing: bool

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """The number of channels of the latents and of the prediction."""

    @property
    @abstractmethod
    def reads(self) -> dict[str, int]:
        """The fields and hints of a `Conditioning` that the network reads, with the width or channels of each."""

    @property
    def size_multiple(self) -> int:
        """The height and width of the latents must be multiples of this number."""
        return 1

    @abstractmethod
    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The blocks that hold nearly all parameters, in the order in which they run: the units of gradient
        checkpointing, sharding and FLOP counts."""

    @abstractmethod
    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Maps latents (b, c, h, w), times (b,) and the conditioning of k·b samples to predictions (k·b, c, h, w).

        Sample i of x is combined with the conditionings i, b + i, 2b + i, …; layers that do not depend on the
        conditioning run once for all k of them.
        """

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def text_states(self, conditioning: Conditioning, x: Tensor) -> Tensor:
        """Returns the text states (k·b, n, d) for latents x (b, …).

        Raises ValueError if the number of texts is not a multiple of the number of latents.
        """
        text = conditioning.get("text")
        if len(text) % len(x):
            raise ValueError(
                f"got {len(text)} texts for {len(x)} latents: give the same number of texts for each of the latents"
            )
        return text

    def run_block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Calls one of the repeated blocks, with gradient checkpointing if `checkpointing` is set."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def check_inputs(backbone: Backbone, latent_channels: int, given: dict[str, int]) -> None:
    """Raises ValueError if the backbone does not fit the first stage's `latent_channels`, or reads conditioning that
    the text encoder, whose fields have the widths `given`, does not provide."""
    if backbone.latent_channels != latent_channels:
        raise ValueError(
            f"the first stage has {latent_channels} latent channels, but the {backbone.kind} takes "
            f"{backbone.latent_channels}: choose a first_stage and a model with the same number of channels"
        )
    reads = dict(backbone.reads)
    hint = reads.pop(INPAINTING, latent_channels + 1)  # the mask and the latents of the masked image
    if hint != latent_channels + 1:
        raise ValueError(
            f"the {backbone.kind} takes {latent_channels + hint} input channels, but must take {latent_channels} or, "
            f"for inpainting, {2 * latent_channels + 1}: choose another model"
        )
    for name, width in reads.items():
        if given.get(name) != width:
            found = f"{name} of width {given[name]}" if name in given else f"no {name}"
            raise ValueError(
                f"the {backbone.kind} reads {name} of width {width}, but the text encoder gives {found}: choose "
                "a text_encoder and a model that match"
            )


def check_size(backbone: Backbone, factor: int, size: Sequence[int], what: str = "size") -> None:
    """Raises ValueError if the network does not take the latents of images of `size` (height, width).

    `factor` is the first stage's downsampling factor; `what` names the size in the error message.
    """
    multiple = factor * backbone.size_multiple
    if any(length < 1 or length % multiple for length in size):
        raise ValueError(
            f"{what} is {size[0]}x{size[1]}, but this model takes heights and widths that are positive multiples of "
            f"{multiple}"
        )


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that require gradients, by name."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
