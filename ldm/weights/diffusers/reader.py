"""Folders as diffusers and transformers have them: a whole pipeline, or one network with its config.json."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.weights.diffusers import networks as configs
from ldm.weights.diffusers.scheduler import scheduler_from
from ldm.weights.diffusers.tokenizer import read_config, tokenizer_pad
from ldm.weights.info import OPENAI, PAD, ContentsInfo, NetworkInfo, Pixels
from ldm.weights.keymaps import canonical
from ldm.weights.storage.opening import open_tensors
from ldm.weights.storage.tensors import Tensors

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


def read_folder(folder: Path, variant: str | None = None) -> ContentsInfo:
    """What a folder with a model_index.json or a config.json holds.

    `variant` is a suffix such as "fp16"; None takes the plain files where they are there. Raises FileNotFoundError
    for parts that are missing, ValueError for models that are not Stable Diffusion 1.x or 2.x.
    """
    if not (folder / "model_index.json").is_file():
        return part_contents(folder, _networks(folder, variant))
    name = read_config(folder / "model_index.json").get("_class_name", "pipeline without a name")
    if name not in PIPELINES:
        raise ValueError(f"{folder} is a {name}, which ldm does not read; give a model of Stable Diffusion 1.x or 2.x")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{folder} misses its {', '.join(missing)}; a diffusers folder holds {', '.join(PARTS)}"
        )
    networks: dict[str, NetworkInfo] = {}
    for part in ("unet", "vae", "text_encoder"):
        networks |= _networks(folder / part, variant)
    return ContentsInfo(
        folder, f"a diffusers folder, {name}", networks, _model(folder, networks), tokenizer_pad(folder / "tokenizer")
    )


def part_contents(source: Path, networks: dict[str, NetworkInfo]) -> ContentsInfo:
    """Networks alone; a text tower's tokenizer lies in the same folder, or in the one beside it."""
    folder = source if source.is_dir() else source.parent
    tokenizers = [
        place for place in (folder, folder.parent / "tokenizer") if (place / "tokenizer_config.json").is_file()
    ]
    pad = tokenizer_pad(tokenizers[0]) if tokenizers and "text_tower" in networks else PAD
    return ContentsInfo(source, f"a {' and a '.join(networks)} alone", networks, pad=pad, pixels=_pixels(folder))


def _pixels(folder: Path) -> Pixels:
    told = read_config(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    return Pixels(tuple(told.get("image_mean", OPENAI.mean)), tuple(told.get("image_std", OPENAI.std)))


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


def networks_of(config_file: Path, weights: Path) -> dict[str, NetworkInfo]:
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
        try:
            networks[kind] = NetworkInfo(kind, reader(given, config_file) | _projection(kind, own), layout, own)
        except (LookupError, TypeError, ArithmeticError, AttributeError) as error:
            raise ValueError(f"{config_file} describes no {kind} ({error!r}); fetch it again") from error
    return networks


def _networks(folder: Path, variant: str | None) -> dict[str, NetworkInfo]:
    return networks_of(folder / "config.json", weights_file(folder, variant))


def _projection(kind: str, tensors: Tensors) -> Config:
    projection = {"text_tower": "text_projection.weight", "image_tower": "visual_projection.weight"}.get(kind, "")
    return {"projection": int(tensors[projection].shape[0])} if projection in tensors else {}


def _model(folder: Path, networks: dict[str, NetworkInfo]) -> Config:
    """How to sample; what we wrote beside the weights comes after what the configs say, which may have been edited."""
    schedule, prediction, sampler = scheduler_from(
        read_config(folder / "scheduler" / "scheduler_config.json"), folder / "scheduler"
    )
    own = json.loads(networks["unet"].tensors.metadata.get("ldm_sampling", "{}"))
    sample_size = read_config(folder / "unet" / "config.json").get("sample_size") or 64
    size = [n * factor_of(networks["vae"]) for n in _pair(sample_size)]
    sampling = {"steps": STEPS, "guidance": GUIDANCE} | own.get("sampling", {}) | sampler
    time = "thousand" if schedule["name"] == "flow" else "index"
    return {
        "schedule": schedule,
        "prediction": prediction,
        "time": time,
        "size": own.get("size", size),
        "sampling": sampling,
    }


def factor_of(vae: NetworkInfo) -> int:
    return 2 ** (len(vae.config["widths"]) - 1)


def _pair(size: int | list[int]) -> list[int]:
    return list(size) if isinstance(size, list) else [size, size]
