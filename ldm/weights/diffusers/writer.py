"""Writes models and single networks as folders that diffusers and transformers read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.files import write_json
from ldm.weights.contents import Contents, StoredNetwork
from ldm.weights.diffusers import networks as configs
from ldm.weights.diffusers.reader import PREPROCESSOR, STEMS, factor_of
from ldm.weights.diffusers.scheduler import scheduler_to
from ldm.weights.diffusers.tokenizer import write_tokenizer
from ldm.weights.info import PixelStats
from ldm.weights.storage.tensors import Tensors
from ldm.weights.storage.values import write_safetensors

Config = dict[str, Any]


def write_folder(folder: Path, contents: Contents, shard: int | None = None) -> None:
    """Writes networks and their configs into an empty folder, with weights in shards of at most `shard` bytes.

    Raises ValueError for contents that diffusers cannot represent.
    """
    source = contents.source
    if not contents.model:
        network, *more = contents.networks.values()
        if more:
            raise ValueError(
                f"{source} holds {' and '.join(contents.networks)}, but a folder stores one network or a complete "
                "model; give --part"
            )
        if network.kind == "image_tower":
            write_json(folder / PREPROCESSOR, _preprocessor(network.config["size"], contents.pixels))
        return _write_network(folder, network, shard, _sample_size(contents), contents.pad)
    text = for_diffusers(contents.network("text_tower"))
    scheduler = scheduler_to(contents.model, source)
    parts = {"unet": contents.network("unet"), "vae": contents.network("vae"), "text_encoder": text}
    own = {key: contents.model[key] for key in ("size", "sampling")}  # no diffusers config has fields for these
    for part, network in parts.items():
        _write_network(
            folder / part, network, shard, _sample_size(contents), contents.pad, {"ldm_sampling": json.dumps(own)}
        )
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_tokenizer(folder / "tokenizer", text.config["context"], contents.pad)
    inpainting = parts["unet"].config["in_channels"] == 9
    write_json(folder / "model_index.json", _index(scheduler["_class_name"], inpainting))


def for_diffusers(text: StoredNetwork) -> StoredNetwork:
    """Returns the tower without its skipped layers and projection, because diffusers has no setting for them."""
    config = text.full_config
    return text.with_config(layers=config["layers"] - config["skip"], skip=0, projection=None)


def _preprocessor(size: int, pixels: PixelStats) -> Config:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }


def _sample_size(contents: Contents) -> int:
    """Returns the side length of the latents, or of the images for a standalone VAE."""
    if not contents.model:
        return 512 if "vae" in contents.networks else 64
    return int(contents.model["size"][0]) // factor_of(contents.network("vae"))


def _write_network(
    folder: Path,
    network: StoredNetwork,
    shard: int | None,
    sample_size: int,
    pad: int,
    metadata: dict[str, str] | None = None,
) -> None:
    config = network.full_config
    source = network.tensors.source
    writers: dict[str, Callable[[], Config]] = {
        "unet": lambda: configs.unet_to(config, sample_size, source),
        "vae": lambda: configs.vae_to(config, sample_size, source),
        "text_tower": lambda: configs.text_to(config, pad),
        "image_tower": lambda: configs.image_to(config),
    }
    written = writers[network.kind]()
    layout, stem = ("diffusers", STEMS[0]) if network.kind in ("unet", "vae") else ("transformers", STEMS[1])
    tensors = network.in_layout(layout)
    write_shards(folder, stem, tensors, {"format": "pt"} | (metadata or {}), shard)
    write_json(folder / "config.json", written)


def write_shards(folder: Path, stem: str, tensors: Tensors, metadata: dict[str, str], shard: int | None) -> None:
    """Writes one .safetensors file, or shards of at most `shard` bytes (unless a tensor is larger) and their index."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shard and groups[-1] and size + tensor.nbytes > shard:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    if len(groups) == 1:
        return write_safetensors(folder / f"{stem}.safetensors", tensors, metadata)
    places: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = f"{stem}-{number:05}-of-{len(groups):05}.safetensors"
        write_safetensors(folder / file, tensors.renamed({name: name for name in names}), metadata)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": tensors.nbytes}, "weight_map": places}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def _index(scheduler: str, inpainting: bool) -> Config:
    return {
        "_class_name": f"StableDiffusion{'Inpaint' if inpainting else ''}Pipeline",
        "_diffusers_version": "0.30.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
