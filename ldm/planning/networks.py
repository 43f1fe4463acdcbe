"""The networks of a training on the meta device, with inputs of the size that its config asks for."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.nn.backbone import Backbone, check_size, trainable
from ldm.nn.clip import CLIP, TextTower
from ldm.nn.inpainting import INPAINTING
from ldm.nn.vae import VAE
from ldm.planning.config_tree import build, find, targets
from ldm.planning.flops import Forward
from ldm.planning.numbers import amount
from ldm.planning.settings import AUTOCAST, ONE_DTYPE, compute
from ldm.weights.contents import open_contents
from ldm.weights.native import build as build_network

LATENTS = ("ldm.data.latents.in_memory.InMemory", "ldm.data.latents.cache.CachedLatents")  # data sets of moments


@dataclass(frozen=True)
class PlannedNetwork:
    """A network on the meta device and its forward pass on one batch; None where a step does not call it."""

    name: str
    network: nn.Module
    forward: Forward | None
    note: str


def plan_networks(config: dict[str, Any]) -> tuple[list[PlannedNetwork], list[str]]:
    """The trained network, then the frozen ones, with inputs as configured; and what to know of them."""
    training, precision = config["training"], config["trainer"]["precision"]
    notes: list[str] = []
    if precision not in ONE_DTYPE | AUTOCAST:
        known = ", ".join(ONE_DTYPE | AUTOCAST)
        raise ValueError(f"precision={precision} cannot be planned; choose one of {known}")
    dtype = ONE_DTYPE.get(precision, torch.float32)
    name = next(name for name in ("backbone", "vae", "clip") if name in training)
    network = build(training[name], notes).to("meta", dtype)
    if isinstance(network, Backbone):
        if config.get("adapter"):
            build(config["adapter"], notes).adapt(network)
        return diffusion_parts(config, network, compute(config), notes), notes
    if isinstance(network, CLIP):
        return [clip_part(config, network, dtype)], notes
    if isinstance(network, VAE):
        return [autoencoder_part(config, network, dtype)], notes
    raise ValueError(f"model is a {type(network).__name__}, which is no Backbone, autoencoder or CLIP to plan")


def clip_part(config: dict[str, Any], clip: CLIP, dtype: torch.dtype) -> PlannedNetwork:
    shape = config["data"]["batch_size"], config["training"]["tokenizer"]["context"]
    tokens = torch.empty(shape, dtype=torch.int64, device="meta")
    images = pictures(config, (clip.image.size, clip.image.size), dtype)
    return PlannedNetwork("CLIP", clip, partial(clip, tokens, images), "trained")


def autoencoder_part(config: dict[str, Any], vae: VAE, dtype: torch.dtype) -> PlannedNetwork:
    side = find(config["data"], "size")
    if side is None:
        raise ValueError("data names no size of pictures to plan with; add +data.size=64, or whatever it is")
    images = pictures(config, (side, side) if isinstance(side, int) else side, dtype)
    channels_last(vae)
    return PlannedNetwork("autoencoder", vae, lambda: vae.decode(vae.encode(images)), "trained")


def diffusion_parts(
    config: dict[str, Any], backbone: Backbone, dtype: torch.dtype, notes: list[str]
) -> list[PlannedNetwork]:
    """The denoising network, and of its frozen companions those whose architecture is known."""
    training, batch = config["training"], config["data"]["batch_size"]
    height, width = training["size"]
    vae = frozen(training["first_stage"], "first stage", "vae", notes)
    text = frozen(training["text_encoder"], "text encoder", "text_tower", notes)
    factor, n = vae.factor if isinstance(vae, VAE) else 8, text.context if isinstance(text, TextTower) else 77
    if vae is None:
        notes.append("latents are taken to be an eighth the size of pictures")
    check_size(backbone, factor, (height, width), "training.size")
    shape = batch, backbone.latent_channels, height // factor, width // factor
    with torch.device("meta"):
        x, time = torch.empty(shape, dtype=dtype), torch.empty(batch)
        tokens = torch.empty(batch, n, dtype=torch.int64)
    x = x.contiguous(memory_format=torch.channels_last)
    forward = partial(backbone, x, time, inputs_of(backbone, x, n))
    parts = [PlannedNetwork(backbone.kind, channels_last(backbone), forward, trained_share(backbone))]
    if isinstance(vae, VAE):
        cached = any(target in LATENTS for target in targets(config["data"]["module"]["train"]))
        encode = None if cached else partial(vae.moments, pictures(config, (height, width), torch.float32))
        note = "frozen; not called in a step, because data holds latents" if cached else "frozen"
        parts.append(PlannedNetwork("first stage", vae, encode, note))
    if isinstance(text, TextTower):
        note = "frozen; not called in a step, because data holds its states" if has_states(config) else "frozen"
        parts.append(PlannedNetwork("text encoder", text, None if has_states(config) else partial(text, tokens), note))
    return parts


def inputs_of(backbone: Backbone, x: Tensor, tokens: int) -> Conditioning:
    """The conditioning that a network reads beside the latents x, on the meta device."""
    given: dict[str, Tensor] = {}
    for name, width in backbone.reads.items():
        shape = {"text": (tokens, width), INPAINTING: (width, *x.shape[2:]), "labels": ()}.get(name, (width,))
        given[name] = x.new_empty((len(x), *shape))
    hints = {name: given.pop(name) for name in (INPAINTING,) if name in given}
    return Conditioning(**given, hints=hints)


def trained_share(backbone: Backbone) -> str:
    """How much of the network is trained, for people."""
    trained = sum(weight.numel() for weight in trainable(backbone).values())
    total = sum(weight.numel() for weight in backbone.parameters())
    return "trained" if trained == total else f"{amount(trained)} of them trained"


def channels_last(network: nn.Module) -> nn.Module:
    """`network` itself, laid out as in training."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def pictures(config: dict[str, Any], size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A batch (b, 3, h, w) on the meta device."""
    shape = config["data"]["batch_size"], 3, *size
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)


def has_states(config: dict[str, Any]) -> bool:
    """Whether the data holds what the text encoder says of captions."""
    return find(config["data"]["module"]["train"], "text_encoder") is not None


def frozen(node: dict[str, Any], name: str, kind: str, notes: list[str]) -> nn.Module | None:
    """The network its weights file describes, else the node's `config`; None with a note if neither."""
    try:
        if not node["weights"]:
            raise FileNotFoundError("its weights are not given")
        network = open_contents(node["weights"]).network(kind).build()
    except (FileNotFoundError, ValueError) as error:
        if "config" not in node:
            notes.append(f"the {name} is not counted: {error}")
            return None
        network = build_network({"kind": kind, "config": node["config"]}, node["weights"])
    return channels_last(network.requires_grad_(False).to("meta"))
