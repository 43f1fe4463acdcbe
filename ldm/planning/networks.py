"""Builds the networks of a training run on the meta device, with inputs of the configured size."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.text import train_all
from ldm.conditioning import Conditioning
from ldm.nn.backbone import Backbone, check_size, trainable
from ldm.nn.clip import CLIP, TextTower
from ldm.nn.inpainting import INPAINTING
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.vae import VAE
from ldm.planning.config_tree import build, find, targets
from ldm.planning.flops import Forward
from ldm.planning.numbers import amount
from ldm.planning.settings import AUTOCAST, ONE_DTYPE, compute_dtype
from ldm.weights.contents import open_contents
from ldm.weights.native import build as build_network

LATENTS = ("ldm.data.latents.in_memory.InMemory", "ldm.data.latents.cache.CachedLatents")  # datasets of latent moments


@dataclass(frozen=True)
class PlannedNetwork:
    """A network on the meta device and its forward pass on one batch, or None if a training step does not call it."""

    name: str
    network: nn.Module
    forward: Forward | None
    note: str


def plan_networks(config: dict[str, Any]) -> tuple[list[PlannedNetwork], list[str]]:
    """Returns the trained network followed by the frozen ones, with the configured inputs, and notes about them."""
    training, precision = config["training"], config["trainer"]["precision"]
    notes: list[str] = []
    if precision not in ONE_DTYPE | AUTOCAST:
        known = ", ".join(ONE_DTYPE | AUTOCAST)
        raise ValueError(f"precision={precision} cannot be planned; choose one of {known}")
    dtype = ONE_DTYPE.get(precision, torch.float32)
    name = next(name for name in ("backbone", "vae", "clip") if name in training)
    network = build(training[name], notes).to("meta", dtype)
    if isinstance(network, Backbone):
        adapter = build(config["adapter"], notes) if config.get("adapter") else None
        if adapter is not None:
            adapter.adapt(network)
        return diffusion_networks(config, network, adapter, compute_dtype(config), notes), notes
    if isinstance(network, CLIP):
        return [clip_network(config, network, dtype)], notes
    if isinstance(network, VAE):
        return [autoencoder_network(config, network, dtype)], notes
    raise ValueError(f"model is a {type(network).__name__}, but only a Backbone, a VAE or a CLIP can be planned")


def clip_network(config: dict[str, Any], clip: CLIP, dtype: torch.dtype) -> PlannedNetwork:
    shape = config["data"]["batch_size"], config["training"]["tokenizer"]["context"]
    tokens = torch.empty(shape, dtype=torch.int64, device="meta")
    images = image_batch(config, (clip.image.size, clip.image.size), dtype)
    return PlannedNetwork("CLIP", clip, partial(clip, tokens, images), "trained")


def autoencoder_network(config: dict[str, Any], vae: VAE, dtype: torch.dtype) -> PlannedNetwork:
    side = find(config["data"], "size")
    if side is None:
        raise ValueError("data sets no image size to plan with; add it, as in +data.size=64")
    images = image_batch(config, (side, side) if isinstance(side, int) else side, dtype)
    channels_last(vae)
    return PlannedNetwork("autoencoder", vae, lambda: vae.decode(vae.encode(images)), "trained")


def diffusion_networks(
    config: dict[str, Any], backbone: Backbone, adapter: Adapter | None, dtype: torch.dtype, notes: list[str]
) -> list[PlannedNetwork]:
    """Returns the denoising network and those of its frozen networks whose architecture is known."""
    training, batch = config["training"], config["data"]["batch_size"]
    height, width = training["size"]
    vae = frozen_network(training["first_stage"], "first stage", "vae", notes)
    text = frozen_network(training["text_encoder"], "text encoder", "text_tower", notes)
    factor, n = vae.factor if isinstance(vae, VAE) else 8, text.context if isinstance(text, TextTower) else 77
    if vae is None:
        notes.append("latents are assumed to be 8 times smaller than images, per side")
    check_size(backbone, factor, (height, width), "training.size")
    shape = batch, backbone.latent_channels, height // factor, width // factor
    with torch.device("meta"):
        x, time = torch.empty(shape, dtype=dtype), torch.empty(batch)
        tokens = torch.empty(batch, n, dtype=torch.int64)
    x = x.contiguous(memory_format=torch.channels_last)
    conditioning = conditioning_of(backbone, x, n)
    if isinstance(text, TextTower) and trains_text(config):
        encoder = TextEncoder([text], [Tokenizer(context=text.context)])
        if text.known is not None:
            text.known = torch.tensor(text.config["token_ids"])  # buffers have no values on the meta device
        (train_all if adapter is None else adapter.adapt_text)(encoder)
        text.to("meta")
        conditioning.get("text").requires_grad_()
    forward = partial(backbone, x, time, conditioning)
    networks = [PlannedNetwork(backbone.kind, channels_last(backbone), forward, trained_share(backbone))]
    if isinstance(vae, VAE):
        cached = any(target in LATENTS for target in targets(config["data"]["module"]["train"]))
        encode = None if cached else partial(vae.moments, image_batch(config, (height, width), torch.float32))
        note = "frozen; not called in a step, because data holds latents" if cached else "frozen"
        networks.append(PlannedNetwork("first stage", vae, encode, note))
    if isinstance(text, TextTower):
        cached = has_text_states(config)
        note = "frozen; not called in a step, because data holds its outputs" if cached else trained_share(text)
        networks.append(PlannedNetwork("text encoder", text, None if cached else partial(text, tokens), note))
    return networks


def conditioning_of(backbone: Backbone, x: Tensor, tokens: int) -> Conditioning:
    """Returns the conditioning that a network reads for the latents x, on the meta device."""
    given: dict[str, Tensor] = {}
    for name, width in backbone.reads.items():
        shape = {"text": (tokens, width), INPAINTING: (width, *x.shape[2:]), "labels": ()}.get(name, (width,))
        given[name] = x.new_empty((len(x), *shape))
    hints = {name: given.pop(name) for name in (INPAINTING,) if name in given}
    return Conditioning(**given, hints=hints)


def trained_share(network: nn.Module) -> str:
    """Returns a human-readable note on how many weights are trained."""
    trained = sum(weight.numel() for weight in trainable(network).values())
    total = sum(weight.numel() for weight in network.parameters())
    if not trained:
        return "frozen"
    return "trained" if trained == total else f"{amount(trained)} of them trained"


def channels_last(network: nn.Module) -> nn.Module:
    """Converts the network in place to the memory format of training."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def image_batch(config: dict[str, Any], size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns a batch (b, 3, h, w) on the meta device."""
    shape = config["data"]["batch_size"], 3, *size
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)


def has_text_states(config: dict[str, Any]) -> bool:
    """Returns whether the data contains text states, the outputs of the text encoder."""
    return not trains_text(config) and find(config["data"]["module"]["train"], "text_encoder") is not None


def trains_text(config: dict[str, Any]) -> bool:
    """Returns whether the text encoder is trained, by a separate learning rate or the vectors of a new token."""
    inversion = "ldm.adapters.text.TextualInversion" in targets(config.get("adapter"))
    return inversion or config["training"].get("text_encoder_lr") is not None


def frozen_network(node: dict[str, Any], name: str, kind: str, notes: list[str]) -> nn.Module | None:
    """Builds the network described by its weights file or else the node's `config`; without either, None and a note."""
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
