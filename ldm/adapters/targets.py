"""Selects the layers that an adapter changes, by presets and by patterns of names."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ldm.adapters.low_rank import Layer, LowRank
from ldm.adapters.presets import PRESETS
from ldm.nn.attention import Attention
from ldm.nn.backbone import Backbone
from ldm.nn.clip import SelfAttention, TextTower

ATTENTION = (Attention, SelfAttention)
CHOICES = f"{', '.join(PRESETS)}, or patterns of such names"
READS_TIME = ("time", "modulation")  # layers of a block that read the timestep, not the image

Network = Backbone | TextTower


def layers(network: nn.Module) -> dict[str, Layer]:
    """Returns the linear and convolution layers by name; an adapted layer is represented by its base."""
    found: dict[str, Layer] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            found[name] = module
    return {name.removesuffix(".base"): layer for name, layer in found.items()}


def targets_of(network: Network, chosen: str | Sequence[str]) -> list[str]:
    """Returns the names of the layers that presets and patterns such as "*.to_q" select, in the network's order.

    attention: the projections of every attention in the repeated blocks (128 layers in SD 1.5's UNet). transformer: all
    layers of the blocks' transformers, which adds the feed-forward layers and, in a UNet, the input and output
    projections (192 layers in SD 1.5's UNet). all: every layer of the blocks and all other convolutions except the
    first and the last (278 layers in SD 1.5's UNet). In a DiT or text tower, the transformer of a block consists of its
    attention and feed-forward layers. Raises ValueError for a preset or pattern that selects no layer.
    """
    known, selected = list(layers(network)), set()
    if not chosen:
        raise ValueError(f"adapter.targets is empty: give {CHOICES}")
    for one in [chosen] if isinstance(chosen, str) else chosen:
        found = [*_preset(network, one)] if one in PRESETS else [name for name in known if fnmatchcase(name, one)]
        if not found:
            raise ValueError(
                f"adapter.targets={chosen}: {one} selects no linear or convolution layer of this {kind_of(network)}, "
                f"whose layers are named like {', '.join(known[:: max(1, len(known) // 4)][:4])}; give {CHOICES}"
            )
        selected |= {*found}
    return [name for name in known if name in selected]


def kind_of(network: Network) -> str:
    return network.kind if isinstance(network, Backbone) else "text encoder"


def _preset(network: Network, preset: str) -> Iterator[str]:
    names = {module: name for name, module in network.named_modules()}
    blocks = list(network.repeated_blocks() if isinstance(network, Backbone) else network.blocks)
    inside = [name for block in blocks for name in _below(names[block], layers(block))]
    if preset == "all":
        convolutions = [name for name, layer in layers(network).items() if isinstance(layer, nn.Conv2d)]
        yield from inside
        yield from convolutions[1:-1]
        return
    for block in blocks:
        for part in _attentions(block) if preset == "attention" else _transformers(block):
            own = [name for name in layers(part) if name.rpartition(".")[2] not in READS_TIME]
            yield from _below(names[part], own)


def _attentions(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if isinstance(module, ATTENTION)]


def _transformers(block: nn.Module) -> list[nn.Module]:
    """Returns the block itself if attention is a direct child, otherwise the children that contain attention."""
    parts = [part for part in block.children() if _attentions(part)]
    return [block] if any(isinstance(part, ATTENTION) for part in parts) else parts


def _below(name: str, inner: Sequence[str] | dict[str, Layer]) -> list[str]:
    return [f"{name}.{one}" for one in inner]


def replace_layer(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Replaces the layer with this name."""
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)


def low_rank_layers(network: nn.Module) -> dict[str, LowRank]:
    """Returns the adapted layers by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LowRank)}
