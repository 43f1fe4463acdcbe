"""Folders as diffusers and transformers have them: a whole pipeline, or one network with its config.json."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from ldm.files import write_json
from ldm.nn.clip import ImageTower, TextTower
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.weights import diffusers_config as configs
from ldm.weights.contents import OPENAI, PAD, Contents, Pixels, StoredNetwork
from ldm.weights.keymaps import canonical
from ldm.weights.scheduler_config import scheduler_from, scheduler_to
from ldm.weights.tensors import Tensors, open_tensors, write_safetensors
from ldm.weights.tokenizer_folder import read_config, tokenizer_pad, write_tokenizer

PIPELINES = {
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
}
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PREPROCESSOR = "preprocessor_config.json"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
GUIDANCE, STEPS = 7.5, 50  # StableDiffusionPipeline's defaults

Config = dict[str, Any]


def read_unet(folder: Path, dtype: torch.dtype | None = torch.float32) -> UNet:
    """The UNet in a folder, such as MODEL/unet; `dtype` None keeps the file's. Its tensors stay mapped to the file."""
    return cast(UNet, network_in(folder, "unet").load(dtype))


def read_vae(folder: Path, dtype: torch.dtype | None = torch.float32) -> VAE:
    """The autoencoder in a folder, such as MODEL/vae, with both namings of its attention."""
    return cast(VAE, network_in(folder, "vae").load(dtype))


def read_text_tower(folder: Path, dtype: torch.dtype | None = torch.float32) -> TextTower:
    """The text tower in a folder: a pipeline's text_encoder, a CLIPTextModel's or a CLIPModel's."""
    return cast(TextTower, network_in(folder, "text_tower").load(dtype))


def read_image_tower(folder: Path, dtype: torch.dtype | None = torch.float32) -> ImageTower:
    """The image tower in a CLIPVisionModel's or CLIPModel's folder."""
    return cast(ImageTower, network_in(folder, "image_tower").load(dtype))


def network_in(folder: Path, kind: str, variant: str | None = None) -> StoredNetwork:
    return read_folder(folder, variant).network(kind)


def read_folder(folder: Path, variant: str | None = None) -> Contents:
    """What a folder with a model_index.json or a config.json holds.

    `variant` is a suffix such as "fp16"; None takes the plain files where they are there. Raises FileNotFoundError
    for parts that are missing, ValueError for models that are not Stable Diffusion 1.x or 2.x.
    """
    if not (folder / "model_index.json").is_file():
        return part_contents(folder, _networks(folder, variant))
    name = read_config(folder / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{folder} is a {name}, which ldm does not read; give a model of Stable Diffusion 1.x or 2.x")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{folder} misses its {', '.join(missing)}; a diffusers folder holds {', '.join(PARTS)}"
        )
    networks: dict[str, StoredNetwork] = {}
    for part in ("unet", "vae", "text_encoder"):
        networks |= _networks(folder / part, variant)
    return Contents(
        folder, f"a diffusers folder, {name}", networks, _model(folder, networks), tokenizer_pad(folder / "tokenizer")
    )


def part_contents(source: Path, networks: dict[str, StoredNetwork]) -> Contents:
    """Networks alone; a text tower's tokenizer lies in the same folder, or in the one beside it."""
    folder = source if source.is_dir() else source.parent
    tokenizers = [
        place for place in (folder, folder.parent / "tokenizer") if (place / "tokenizer_config.json").is_file()
    ]
    pad = tokenizer_pad(tokenizers[0]) if tokenizers and "text_tower" in networks else PAD
    return Contents(source, f"a {' and a '.join(networks)} alone", networks, pad=pad, pixels=_pixels(folder))


def write_folder(folder: Path, contents: Contents, shard: int | None = None) -> None:
    """Write networks and configurations into an empty folder; weights are cut into shards of at most `shard` bytes."""
    source = contents.source
    if not contents.model:
        network, *more = contents.networks.values()
        if more:
            raise ValueError(
                f"{source} holds {' and '.join(contents.networks)}; only one of them, or a whole model, makes a folder"
            )
        if network.kind == "image_tower":
            write_json(folder / PREPROCESSOR, _preprocessor(network.config["size"], contents.pixels))
        return _write_network(folder, network, shard, _sample_size(contents), contents.pad)
    text = for_diffusers(contents.network("text_tower"))
    scheduler = scheduler_to(contents.model, source)
    parts = {"unet": contents.network("unet"), "vae": contents.network("vae"), "text_encoder": text}
    own = {key: contents.model[key] for key in ("size", "sampling")}  # which no config of diffusers holds
    for part, network in parts.items():
        _write_network(
            folder / part, network, shard, _sample_size(contents), contents.pad, {"ldm_sampling": json.dumps(own)}
        )
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_tokenizer(folder / "tokenizer", text.config["context"], contents.pad)
    inpainting = parts["unet"].config["in_channels"] == 9
    write_json(folder / "model_index.json", _index(scheduler["_class_name"], inpainting))


def for_diffusers(text: StoredNetwork) -> StoredNetwork:
    """The tower without what its `skip` leaves out, and without projection: diffusers knows neither."""
    config = text.full_config
    return text.without(layers=config["layers"] - config["skip"], skip=0, projection=None)


def _pixels(folder: Path) -> Pixels:
    told = read_config(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    return Pixels(tuple(told.get("image_mean", OPENAI.mean)), tuple(told.get("image_std", OPENAI.std)))


def _preprocessor(size: int, pixels: Pixels) -> Config:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }


def weights_file(folder: Path, variant: str | None = None) -> Path:
    """The weights in a folder: safetensors before .bin, whole before sharded, the plain variant before others.

    Raises FileNotFoundError where there are none, or not in the `variant` asked for.
    """
    stem = rf"({'|'.join(STEMS)})"
    ranked = []
    for file in folder.glob("*model*") if folder.is_dir() else ():
        for rank, pattern in enumerate(
            (
                rf"{stem}(\.(?P<v>[\w-]+))?\.safetensors",
                rf"{stem}(\.(?P<v>[\w-]+))?\.safetensors\.index(\.(?P<w>[\w-]+))?\.json",
                rf"{stem}(\.(?P<v>[\w-]+))?\.bin",
                rf"{stem}(\.(?P<v>[\w-]+))?\.bin\.index(\.(?P<w>[\w-]+))?\.json",
            )
        ):
            if (match := re.fullmatch(pattern, file.name)) and not re.search(r"-\d+-of-\d+", file.name):
                found = match.groupdict()
                ranked.append((found["v"] or found.get("w") or "", rank, file))
    chosen = [one for one in ranked if variant is None or one[0] == variant]
    if not chosen:
        there = ", ".join(sorted({one[0] or "plain" for one in ranked})) or "none"
        raise FileNotFoundError(
            f"{folder} holds no weights{f' of variant {variant}' if variant else ''} (there: {there})"
        )
    return min(chosen)[2]


def networks_of(config_file: Path, weights: Path) -> dict[str, StoredNetwork]:
    """The networks that a config.json describes: one, or both towers of a CLIPModel."""
    config = read_config(config_file)
    name = config.get("_class_name") or config.get("model_type")
    readers: dict[Any, dict[str, tuple[str, Callable[[Config, Path], Config], Config]]] = {
        "UNet2DConditionModel": {"unet": ("diffusers", configs.unet_from, config)},
        "AutoencoderKL": {"vae": ("diffusers", configs.vae_from, config)},
        "clip_text_model": {"text_tower": ("transformers", configs.text_from, config)},
        "clip_vision_model": {"image_tower": ("transformers", configs.image_from, config)},
        "clip": {
            "text_tower": ("transformers", configs.text_from, config.get("text_config", {})),
            "image_tower": ("transformers", configs.image_from, config.get("vision_config", {})),
        },
    }
    if name not in readers:
        raise ValueError(
            f"{config_file} describes a {name}, which ldm does not read; give a UNet2DConditionModel, an "
            "AutoencoderKL or a CLIP"
        )
    tensors, networks = open_tensors(weights), {}
    for kind, (layout, reader, given) in readers[name].items():
        own = tensors.renamed(canonical(kind, layout, list(tensors)))
        networks[kind] = StoredNetwork(kind, reader(given, config_file) | _projection(kind, own), layout, own)
    return networks


def _networks(folder: Path, variant: str | None) -> dict[str, StoredNetwork]:
    return networks_of(folder / "config.json", weights_file(folder, variant))


def _projection(kind: str, tensors: Tensors) -> Config:
    projection = {"text_tower": "text_projection.weight", "image_tower": "visual_projection.weight"}.get(kind, "")
    return {"projection": int(tensors[projection].shape[0])} if projection in tensors else {}


def _model(folder: Path, networks: dict[str, StoredNetwork]) -> Config:
    """How to sample; what we wrote beside the weights comes after what the configs say, which may have been edited."""
    schedule, prediction, sampler = scheduler_from(
        read_config(folder / "scheduler" / "scheduler_config.json"), folder / "scheduler"
    )
    own = json.loads(networks["unet"].tensors.metadata.get("ldm_sampling", "{}"))
    sample_size = read_config(folder / "unet" / "config.json").get("sample_size") or 64
    size = [n * _factor(networks["vae"]) for n in _pair(sample_size)]
    sampling = {"steps": STEPS, "guidance": GUIDANCE} | own.get("sampling", {}) | sampler
    time = "thousand" if schedule["name"] == "flow" else "index"
    return {
        "schedule": schedule,
        "prediction": prediction,
        "time": time,
        "size": own.get("size", size),
        "sampling": sampling,
    }


def _factor(vae: StoredNetwork) -> int:
    return 2 ** (len(vae.config["widths"]) - 1)


def _pair(size: int | list[int]) -> list[int]:
    return list(size) if isinstance(size, list) else [size, size]


def _sample_size(contents: Contents) -> int:
    """The side of the latents, or of the picture where there is only a VAE."""
    if not contents.model:
        return 512 if "vae" in contents.networks else 64
    return int(contents.model["size"][0]) // _factor(contents.network("vae"))


def _write_network(
    folder: Path,
    network: StoredNetwork,
    shard: int | None,
    sample_size: int,
    pad: int,
    told: dict[str, str] | None = None,
) -> None:
    config = network.full_config
    source = network.tensors.source
    writers: dict[str, Callable[[], Config]] = {
        "unet": lambda: configs.unet_to(config, sample_size, source),
        "vae": lambda: configs.vae_to(config, sample_size, source),
        "text_tower": lambda: configs.text_to(config, pad),
        "image_tower": lambda: configs.image_to(config),
    }
    ours = network.kind in ("unet", "vae")
    written = writers[network.kind]()
    tensors = network.arranged("diffusers" if ours else "transformers")
    write_shards(folder, STEMS[0] if ours else STEMS[1], tensors, {"format": "pt"} | (told or {}), shard)
    write_json(folder / "config.json", written)


def write_shards(folder: Path, stem: str, tensors: Tensors, metadata: dict[str, str], shard: int | None) -> None:
    """One .safetensors, or several of at most `shard` bytes (unless one tensor is larger) and their index."""
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
