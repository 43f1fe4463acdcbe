"""Reads single files: Stable Diffusion in CompVis's layout, or standalone networks, recognised by tensor names."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.weights.about import about_of
from ldm.weights.adapters.own import as_in_network
from ldm.weights.architecture import infer
from ldm.weights.info import OPENAI, PAD, ContentsInfo, NetworkInfo, PixelStats, standalone
from ldm.weights.keymaps import NATIVE, canonical
from ldm.weights.kinds import ADAPTER, KINDS
from ldm.weights.storage.opening import open_tensors
from ldm.weights.storage.tensors import Tensors, refuse_mismatch

PREFIXES = {  # of the networks in a complete model
    ("unet", "compvis"): "model.diffusion_model.",
    ("vae", "compvis"): "first_stage_model.",
    ("text_tower", "transformers"): "cond_stage_model.transformer.",
    ("text_tower", "openclip"): "cond_stage_model.model.",
}
SIGNATURES = {  # a tensor that only this network has, and only in this layout
    ("unet", "compvis"): "input_blocks.0.0.weight",
    ("unet", "diffusers"): "down_blocks.0.resnets.0.time_emb_proj.weight",
    ("vae", "compvis"): "encoder.down.0.block.0.norm1.weight",
    ("vae", "diffusers"): "encoder.down_blocks.0.resnets.0.norm1.weight",
    ("text_tower", "transformers"): "text_model.embeddings.token_embedding.weight",
    ("text_tower", "openclip"): "transformer.resblocks.0.ln_1.weight",
    ("image_tower", "transformers"): "vision_model.embeddings.class_embedding",
}
UNSUPPORTED = {  # the first pattern that matches a tensor's name determines the error
    "a LoRA": r".*(\.lora[._]|lora_(up|down|unet|te|A|B)).*",
    "a ControlNet": r"control_model\..*|controlnet_cond_embedding\..*",
    "a textual inversion": r"emb_params|string_to_param.*|<.*>",
    "Stable Diffusion XL": r"conditioner\.embedders\..*|(model\.diffusion_model\.)?label_emb\..*|add_embedding\..*",
    "Flux": r"(model\.diffusion_model\.)?(double_blocks|single_blocks)\.0\..*|single_transformer_blocks\.0\..*",
    "Stable Diffusion 3": r"(model\.diffusion_model\.)?joint_blocks\.0\..*|transformer_blocks\.0\.attn\.add_q_proj\..*",
}
ADDED = {  # files that are not models, and how to use them
    "a LoRA": " as a model: it is added to one, as lora=FILE",
    "a textual inversion": " as a model: it is added to one, as embedding=FILE",
}
EMA_PREFIX = "model_ema."
TRAINED_TEXT = "trained_text."  # prefix of the text encoder in checkpoints of runs that train it
RUN_PREFIXES = "backbone.", "unet."  # prefixes of the denoising network in checkpoints; the second in version 0.1
# Other tensors in complete models: tables of the schedule, and those that only training used.
UNUSED = re.compile(
    r"model_ema\..*|alphas_cumprod.*|betas|log_one_minus_.*|logvar|posterior_.*|sqrt_.*|lvlb_weights|"
    r"embedding_manager\..*|cond_stage_model\.logit_scale|scale_factor"
)
REMEDY = "its tensors do not show it: convert with --prediction"  # in the notes on a guess
STATED = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v"}
SCHEDULE = {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}
SAMPLING = {"sampler": "ddim", "spacing": "leading", "steps": 50, "guidance": 7.5}  # as in CompVis's txt2img


@dataclass(frozen=True)
class ReadOptions:
    """Choices that a file leaves open: whether to read its moving average, and what an SD 2.x model predicts."""

    ema: bool = True
    prediction: str | None = None  # "eps" or "v"; None guesses it and adds a note


def read_file(path: Path, options: ReadOptions = ReadOptions()) -> ContentsInfo:
    """Describes the networks in a .safetensors, .ckpt or .bin.

    Raises ValueError for a file that is corrupt, contains no known network, or is of an unsupported model.
    """
    tensors = open_tensors(path)
    about = about_of(tensors)
    if about.get("kind") in (*KINDS, ADAPTER):
        return _native(path, tensors, about, options)
    for name, pattern in UNSUPPORTED.items():
        if any(re.fullmatch(pattern, tensor) for tensor in tensors):
            raise ValueError(
                f"{path} is {name}, which ldm does not read{ADDED.get(name, '')}; give a model of Stable Diffusion 1.x "
                "or 2.x"
            )
    if any(name.startswith(PREFIXES["unet", "compvis"]) for name in tensors):
        return _complete(path, tensors, about, options)
    networks = {}
    for kind, layout in SIGNATURES:
        if network := _network(tensors, about, kind, layout) or _prefixed(tensors, about, kind, layout):
            networks[kind] = network
    if not networks:
        raise ValueError(
            f"{path} holds no network that ldm knows (its tensors are {', '.join([*tensors][:3]) or 'none'}); give a "
            "model of Stable Diffusion 1.x or 2.x, an autoencoder, a CLIP, or a run of ldm"
        )
    text = networks.get("text_tower")
    pad = 0 if text and text.layout == "openclip" else PAD  # an OpenCLIP tower is that of SD 2.x
    pixels = _pixels(about, OPENAI)
    return ContentsInfo(path, standalone(networks), networks, pad=about.get("pad", pad), pixels=pixels)


def _native(path: Path, tensors: Tensors, about: dict[str, Any], options: ReadOptions) -> ContentsInfo:
    """Reads a file in ldm's own format, or a checkpoint of a run.

    Both have the same metadata; a checkpoint has the tensors under a prefix, and their averages under "ema".
    """
    kind, model = about["kind"], about.get("model", {})
    if "config" not in about:
        raise ValueError(f"{path} is a {kind} written by ldm without its architecture; export it again")
    base = about.get("base", {})
    if path.suffix != ".ckpt":
        network = NetworkInfo(kind, about["config"], NATIVE, as_in_network(tensors, about))
        pad, pixels = about.get("pad", PAD), _pixels(about, PixelStats())
        return ContentsInfo(
            path,
            f"{'a' if kind != ADAPTER else 'an'} {kind} written by ldm",
            {kind: network},
            model,
            pad,
            pixels,
            notes=("as saved",),
            base=base,
        )
    averages = tensors.metadata.get("ema") if options.ema else None
    if averages:
        from ldm.weights.storage.values import in_memory  # needs torch, as reading the checkpoint did

        own = in_memory(path, {name: tensor for name, tensor in averages.items() if not name.startswith(TRAINED_TEXT)})
    else:
        own = next((part for prefix in RUN_PREFIXES if (part := tensors.under(prefix))), tensors)
    note = f"{'moving average' if averages else 'raw weights'} after {tensors.metadata.get('global_step', '?')} steps"
    networks = {kind: NetworkInfo(kind, about["config"], NATIVE, own)}
    return ContentsInfo(path, "a run of ldm", networks, model, notes=(note,), base=base)


def _pixels(about: dict[str, Any], default: PixelStats) -> PixelStats:
    if "pixels" not in about:
        return default
    return PixelStats(**{name: tuple(values) for name, values in about["pixels"].items()})


def _network(tensors: Tensors, about: dict[str, Any], kind: str, layout: str) -> NetworkInfo | None:
    own = tensors.renamed(canonical(kind, layout, list(tensors)))
    if SIGNATURES[kind, layout] not in own:
        return None
    config = about.get("configs", {}).get(kind) or infer(kind, layout, own, tensors.source)
    return NetworkInfo(kind, config, layout, own)


def _prefixed(tensors: Tensors, about: dict[str, Any], kind: str, layout: str) -> NetworkInfo | None:
    """Returns the network whose tensors all have a prefix, such as first_stage_model., in a file with one part of a
    model. Raises ValueError if several networks of this kind are in the file."""
    signature = "." + SIGNATURES[kind, layout]
    prefixes = [name.removesuffix(signature) + "." for name in tensors if name.endswith(signature)]
    if len(prefixes) > 1:
        raise ValueError(
            f"{tensors.source} holds several networks of one kind, under {', '.join(prefixes)}; give a file with one"
        )
    return _network(tensors.under(prefixes[0]), about, kind, layout) if prefixes else None


def _complete(path: Path, tensors: Tensors, about: dict[str, Any], options: ReadOptions) -> ContentsInfo:
    known = tuple(PREFIXES.values())
    unexpected = [name for name in tensors if not name.startswith(known) and not UNUSED.fullmatch(name)]
    refuse_mismatch(path, "Stable Diffusion", missing=(), unexpected=unexpected, misshapen=())
    networks, notes = {}, []
    for (kind, layout), prefix in PREFIXES.items():
        part = tensors.under(prefix)
        if kind == "unet" and (averages := _averages(tensors, part)):
            part = tensors.renamed(averages) if options.ema else part
            notes.append("the UNet's moving average" if options.ema else "the UNet's weights, not their moving average")
        if network := _network(part, about, kind, layout):
            networks[kind] = network
    unet = networks["unet"].config
    model, chosen = _model(path, tensors, about, unet, options)
    sd2 = unet.get("linear_projection", False)
    pad = about.get("pad", 0 if sd2 else PAD)
    description = f"a single file of Stable Diffusion {'2.x' if sd2 else '1.x'}{_inputs(unet['in_channels'])}"
    guesses = tuple(note for note in chosen if REMEDY in note)
    return ContentsInfo(path, description, networks, model, pad, notes=(*notes, *chosen), guesses=guesses)


def _averages(tensors: Tensors, unet: Tensors) -> dict[str, str]:
    """Returns the names of the moving average in the file, which have no dots, by their names in the UNet."""
    names = {name: EMA_PREFIX + "diffusion_model" + name.replace(".", "") for name in unet}
    averages = {name: average for name, average in names.items() if average in tensors}
    if averages and len(averages) < len(names):
        missing = [average for average in names.values() if average not in tensors]
        refuse_mismatch(tensors.source, "moving average", missing, (), ())
    return averages


def _model(
    path: Path, tensors: Tensors, about: dict[str, Any], unet: dict[str, Any], options: ReadOptions
) -> tuple[dict[str, Any], list[str]]:
    """Returns the sampling settings and notes on guessed ones. Notes are part of the provenance of evaluations."""
    if about.get("model"):
        model = dict(about["model"])
        return model | ({"prediction": options.prediction} if options.prediction else {}), []
    prediction, notes = options.prediction, []
    if prediction is None:
        prediction, why = _prediction(path, tensors, unet)
        notes.append(f"prediction={prediction}, {why}")
    size = _size(path, tensors) or ([768, 768] if prediction == "v" and unet["linear_projection"] else [512, 512])
    model = {"schedule": SCHEDULE, "prediction": prediction, "time": "index", "size": size, "sampling": SAMPLING}
    return model, notes


def _size(path: Path, tensors: Tensors) -> list[int] | None:
    """Returns height and width from "WIDTHxHEIGHT" in the metadata, or None if they are not there."""
    stated = tensors.metadata.get("modelspec.resolution")
    if stated is None:
        return None
    match = re.fullmatch(r"([1-9]\d{1,4})(?:x([1-9]\d{1,4}))?", str(stated))
    if not match:
        raise ValueError(
            f"the metadata of {path} has modelspec.resolution={str(stated)[:40]!r}, but it must be WIDTHxHEIGHT, "
            "such as 512x512; save the file again without it"
        )
    return [int(match[2] or match[1]), int(match[1])]


def _prediction(path: Path, tensors: Tensors, unet: dict[str, Any]) -> tuple[str, str]:
    """Returns what the network predicts, and why; the tensors of SD 2.x are the same at 512 and at 768 pixels."""
    stated = tensors.metadata.get("modelspec.prediction_type") or tensors.metadata.get("modelspec.predict_key")
    if stated:
        if stated not in STATED:
            raise ValueError(
                f"the metadata of {path} says that it predicts {str(stated)[:40]!r}, but ldm reads "
                f"{', '.join(STATED)}; give another model"
            )
        return STATED[stated], "as its metadata says"
    if not unet["linear_projection"] or unet["in_channels"] != 4:
        return "eps", "as all of Stable Diffusion 1.x and all inpainting models"
    if tensors.metadata.get("global_step") in (875000, 220000):
        return "eps", "as Stable Diffusion 2.x at 512 pixels, which its step count says"
    if re.search(r"512|base", path.name):
        return "eps", f"as Stable Diffusion 2.x at 512 pixels, which its name says; {REMEDY} v if it is not eps"
    return "v", f"as Stable Diffusion 2.x at 768 pixels; {REMEDY} eps if it is not v"


def _inputs(channels: int) -> str:
    return {4: "", 9: ", inpainting"}.get(channels, f", a UNet with {channels} input channels")
