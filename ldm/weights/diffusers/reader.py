"""Reads diffusers and transformers folders: a complete pipeline, or a single network with its config.json."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.weights.diffusers import networks as configs
from ldm.weights.diffusers.fields import Given
from ldm.weights.diffusers.scheduler import scheduler_from, scheduler_to
from ldm.weights.diffusers.tokenizer import read_config, tokenizer_pad
from ldm.weights.info import OPENAI, PAD, ContentsInfo, NetworkInfo, PixelStats, standalone
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
    """Describes the networks in a folder with a model_index.json or a config.json.

    `variant` is a suffix of file names such as "fp16"; None prefers files without one. Raises FileNotFoundError for
    missing parts, ValueError for models other than Stable Diffusion 1.x and 2.x.
    """
    if not (folder / "model_index.json").is_file():
        return part_contents(folder, _networks(folder, variant))
    name = read_config(folder / "model_index.json").get("_class_name", "pipeline without a name")
    if name not in PIPELINES:
        raise ValueError(f"{folder} is a {name}, which ldm does not read; give a model of Stable Diffusion 1.x or 2.x")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; a diffusers folder consists of {', '.join(PARTS)}; download it again"
        )
    networks: dict[str, NetworkInfo] = {}
    for part in ("unet", "vae", "text_encoder"):
        networks |= _networks(folder / part, variant)
    return ContentsInfo(
        folder,
        f"a diffusers folder, {name}",
        networks,
        _model(folder, networks, name),
        tokenizer_pad(folder / "tokenizer"),
    )


def part_contents(source: Path, networks: dict[str, NetworkInfo]) -> ContentsInfo:
    """Describes standalone networks; a text tower's tokenizer is in the same folder or in one beside it."""
    folder = source if source.is_dir() else source.parent
    tokenizers = [path for path in (folder, folder.parent / "tokenizer") if (path / "tokenizer_config.json").is_file()]
    pad = tokenizer_pad(tokenizers[0]) if tokenizers and "text_tower" in networks else PAD
    return ContentsInfo(source, standalone(networks), networks, pad=pad, pixels=_pixels(folder))


def _pixels(folder: Path) -> PixelStats:
    config = read_config(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    return PixelStats(tuple(config.get("image_mean", OPENAI.mean)), tuple(config.get("image_std", OPENAI.std)))


def weights_file(folder: Path, variant: str | None = None) -> Path:
    """Returns the weights file in a folder.

    Prefers files without a variant, safetensors over .bin, and a single file over shards. Raises FileNotFoundError if
    there is none, or none of the given `variant`.
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
                groups = match.groupdict()
                ranked.append((groups["v"] or groups.get("w") or "", rank, file))
    candidates = [candidate for candidate in ranked if variant is None or candidate[0] == variant]
    if not candidates:
        available = ", ".join(sorted({name or "plain" for name, _, _ in ranked})) or "none"
        raise FileNotFoundError(
            f"{folder} holds no weights{f' of variant {variant}' if variant else ''} (available: {available}); "
            "give another variant or folder"
        )
    return min(candidates)[2]


def networks_of(config_file: Path, weights: Path) -> dict[str, NetworkInfo]:
    """Describes the network of a config.json, or both towers of a CLIPModel. Raises ValueError for other classes."""
    config = read_config(config_file)
    name = config.get("_class_name") or config.get("model_type")
    readers: dict[Any, dict[str, tuple[str, Callable[[Config, Path], Config], Config]]] = {
        "UNet2DConditionModel": {"unet": ("diffusers", configs.unet_from, config)},
        "AutoencoderKL": {"vae": ("diffusers", configs.vae_from, config)},
        "clip_text_model": {"text_tower": ("transformers", configs.text_from, config)},
        "clip_vision_model": {"image_tower": ("transformers", configs.image_from, config)},
        "clip": {
            "text_tower": ("transformers", configs.text_from, _section(config, "text_config", config_file)),
            "image_tower": ("transformers", configs.image_from, _section(config, "vision_config", config_file)),
        },
    }
    if name not in readers:
        raise ValueError(
            f"{config_file} is the config of a model of type {name}, which ldm does not read; give a "
            "UNet2DConditionModel, an AutoencoderKL or a CLIP"
        )
    tensors, networks = open_tensors(weights), {}
    for kind, (layout, reader, given) in readers[name].items():
        own = tensors.renamed(canonical(kind, layout, list(tensors)))
        try:
            networks[kind] = NetworkInfo(kind, reader(given, config_file) | _projection(kind, own), layout, own)
        except (LookupError, TypeError, ArithmeticError, AttributeError) as error:
            raise ValueError(f"{config_file} does not describe a {kind} ({error!r}); download it again") from error
    return networks


def _section(config: Config, name: str, source: Path) -> Config:
    """Returns a tower's config from a CLIP config; as in transformers, NAME_dict in old files overrides it."""
    sections = [config.get(name) or {}, config.get(f"{name}_dict") or {}]
    if not all(isinstance(section, dict) for section in sections):
        raise ValueError(f"{source} has a {name} that is not an object of settings; download it again")
    return sections[0] | sections[1]


def _networks(folder: Path, variant: str | None) -> dict[str, NetworkInfo]:
    return networks_of(folder / "config.json", weights_file(folder, variant))


def _projection(kind: str, tensors: Tensors) -> Config:
    projection = {"text_tower": "text_projection.weight", "image_tower": "visual_projection.weight"}.get(kind, "")
    return {"projection": int(tensors[projection].shape[0])} if projection in tensors else {}


def _model(folder: Path, networks: dict[str, NetworkInfo], pipeline: str) -> Config:
    """Returns the sampling settings. The configs override ldm's own metadata, because a user may have edited them."""
    source = folder / "scheduler" / "scheduler_config.json"
    # inpainting pipelines always set skip_prk_steps, regardless of the file
    config = read_config(source) | ({"skip_prk_steps": True} if "Inpaint" in pipeline else {})
    schedule, prediction, sampler = scheduler_from(config, source)
    diffusion = {
        "schedule": schedule,
        "prediction": prediction,
        "time": "thousand" if schedule["name"] == "flow" else "index",
    }
    own = _own(networks["unet"].tensors)
    sampling = {"steps": STEPS, "guidance": GUIDANCE} | own.get("sampling", {})
    if not own or not _is_unedited(diffusion | {"sampling": sampling}, source):
        options = {"sampler_options": {}, "spacing_options": {}, "final_sigma": "zero"}
        sampling |= {name: value for name, value in options.items() if name in sampling} | sampler
    unet = Given(read_config(folder / "unet" / "config.json"), folder / "unet" / "config.json")
    sides = unet.integers("sample_size", (64,))
    size = [side * factor_of(networks["vae"]) for side in (sides * 2)[:2]]
    return diffusion | {"size": own.get("size", size), "sampling": sampling}


def _own(unet: Tensors) -> Config:
    """Returns the size and sampling settings that ldm stored with the weights; empty for files from other tools."""
    try:
        own = json.loads(unet.metadata.get("ldm_sampling", "{}"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the metadata of {unet.source} is corrupt; download or export it again") from error
    types: dict[str, type] = {"size": list, "sampling": dict}
    if own != {} and (
        not isinstance(own, dict) or not all(isinstance(own.get(key), kind) for key, kind in types.items())
    ):
        raise ValueError(f"the metadata of {unet.source} is corrupt; download or export it again")
    return own


def _is_unedited(model: Config, config: Path) -> bool:
    """Returns whether the scheduler config is the one that ldm writes for these settings."""
    try:
        return scheduler_to(model, config) == read_config(config)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False  # it cannot have been written by ldm


def factor_of(vae: NetworkInfo) -> int:
    return 2 ** (len(vae.config["widths"]) - 1)
