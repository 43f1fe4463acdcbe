"""One file of weights: Stable Diffusion in the layout of CompVis, or a part alone, recognised by its tensors' names."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.weights.about import about_of
from ldm.weights.adapters.own import as_in_network
from ldm.weights.architecture import infer
from ldm.weights.found import OPENAI, PAD, Found, FoundNetwork, Pixels
from ldm.weights.keymaps import NATIVE, canonical
from ldm.weights.kinds import ADAPTER, KINDS
from ldm.weights.storage.opening import open_tensors
from ldm.weights.storage.tensors import Tensors, refuse_misfits

PREFIXES = {  # of a whole model's parts
    ("unet", "compvis"): "model.diffusion_model.",
    ("vae", "compvis"): "first_stage_model.",
    ("text_tower", "transformers"): "cond_stage_model.transformer.",
    ("text_tower", "openclip"): "cond_stage_model.model.",
}
TELLING = {  # a tensor that only this network, in this layout, has
    ("unet", "compvis"): "input_blocks.0.0.weight",
    ("unet", "diffusers"): "down_blocks.0.resnets.0.time_emb_proj.weight",
    ("vae", "compvis"): "encoder.down.0.block.0.norm1.weight",
    ("vae", "diffusers"): "encoder.down_blocks.0.resnets.0.norm1.weight",
    ("text_tower", "transformers"): "text_model.embeddings.token_embedding.weight",
    ("text_tower", "openclip"): "transformer.resblocks.0.ln_1.weight",
    ("image_tower", "transformers"): "vision_model.embeddings.class_embedding",
}
REFUSED = {  # recognised by any one name, the first that fits
    "a LoRA": r".*(\.lora[._]|lora_(up|down|unet|te|A|B)).*",
    "a ControlNet": r"control_model\..*|controlnet_cond_embedding\..*",
    "a textual inversion": r"emb_params|string_to_param.*|<.*>",
    "Stable Diffusion XL": r"conditioner\.embedders\..*|(model\.diffusion_model\.)?label_emb\..*|add_embedding\..*",
    "Flux": r"(model\.diffusion_model\.)?(double_blocks|single_blocks)\.0\..*|single_transformer_blocks\.0\..*",
    "Stable Diffusion 3": r"(model\.diffusion_model\.)?joint_blocks\.0\..*|transformer_blocks\.0\.attn\.add_q_proj\..*",
}
ADDED = {  # what to do with files that are no models
    "a LoRA": " as a model but adds to one, as lora=FILE",
    "a textual inversion": " as a model but adds to one, as embedding=FILE",
}
EMA = "model_ema."
RUN_PREFIXES = "backbone.", "unet."  # of the denoising network in checkpoints of runs; the second until version 0.1
# What whole models hold besides: the schedule's tables, and what only training used.
UNUSED = re.compile(
    r"model_ema\..*|alphas_cumprod.*|betas|log_one_minus_.*|logvar|posterior_.*|sqrt_.*|lvlb_weights|"
    r"embedding_manager\..*|cond_stage_model\.logit_scale|scale_factor"
)
SCHEDULE = {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}
SAMPLING = {"sampler": "ddim", "spacing": "leading", "steps": 50, "guidance": 7.5}  # as CompVis's txt2img


@dataclass(frozen=True)
class Choices:
    """What a file leaves open: whether its moving average is taken, where it has one, and what SD 2.x predicts."""

    ema: bool = True
    prediction: str | None = None  # "eps" or "v"; None tells by the name, and says so


def read_file(path: Path, choices: Choices = Choices()) -> Found:
    """What a .safetensors, .ckpt or .bin holds. Raises ValueError for what is damaged, unknown or of another model."""
    tensors = open_tensors(path)
    about = about_of(tensors)
    if about.get("kind") in (*KINDS, ADAPTER):
        return _native(path, tensors, about, choices)
    for name, pattern in REFUSED.items():
        if any(re.fullmatch(pattern, tensor) for tensor in tensors):
            raise ValueError(
                f"{path} is {name}, which ldm does not read{ADDED.get(name, '')}; give a model of Stable Diffusion 1.x "
                "or 2.x"
            )
    if any(name.startswith(PREFIXES["unet", "compvis"]) for name in tensors):
        return _whole(path, tensors, about, choices)
    networks = {kind: network for kind, layout in TELLING if (network := _network(tensors, about, kind, layout))}
    if not networks:
        raise ValueError(
            f"{path} holds no network that ldm knows (its tensors are {', '.join([*tensors][:3]) or 'none'}); give a "
            "model of Stable Diffusion 1.x or 2.x, an autoencoder, a CLIP, or a run of ldm"
        )
    text = networks.get("text_tower")
    pad = 0 if text and text.layout == "openclip" else PAD  # as SD 2.x, whose tower it is
    pixels = _pixels(about, OPENAI)
    return Found(path, f"a {' and a '.join(networks)} alone", networks, pad=about.get("pad", pad), pixels=pixels)


def _native(path: Path, tensors: Tensors, about: dict[str, Any], choices: Choices) -> Found:
    """A file of ours, or a checkpoint of a run: the same plain data, the tensors under a prefix or as "ema"."""
    kind, model = about["kind"], about.get("model", {})
    if "config" not in about:
        raise ValueError(f"{path} is a {kind} of ldm whose architecture its metadata lacks; export it again")
    base = about.get("base", {})
    if path.suffix != ".ckpt":
        network = FoundNetwork(kind, about["config"], NATIVE, as_in_network(tensors, about))
        pad, pixels = about.get("pad", PAD), _pixels(about, Pixels())
        return Found(
            path,
            f"{'a' if kind != ADAPTER else 'an'} {kind} of ldm",
            {kind: network},
            model,
            pad,
            pixels,
            ("as saved",),
            base,
        )
    averages = tensors.metadata.get("ema") if choices.ema else None
    if averages:
        from ldm.weights.storage.values import held  # here: it needs torch, with which the checkpoint has been read

        own = held(path, averages)
    else:
        own = next((part for prefix in RUN_PREFIXES if (part := tensors.under(prefix))), tensors)
    note = f"{'moving average' if averages else 'raw weights'} after {tensors.metadata.get('global_step', '?')} steps"
    networks = {kind: FoundNetwork(kind, about["config"], NATIVE, own)}
    return Found(path, "a run of ldm", networks, model, notes=(note,), base=base)


def _pixels(about: dict[str, Any], others: Pixels) -> Pixels:
    return Pixels(**{name: tuple(values) for name, values in about["pixels"].items()}) if "pixels" in about else others


def _network(tensors: Tensors, about: dict[str, Any], kind: str, layout: str) -> FoundNetwork | None:
    own = tensors.renamed(canonical(kind, layout, list(tensors)))
    if TELLING[kind, layout] not in own:
        return None
    config = about.get("configs", {}).get(kind) or infer(kind, layout, own, tensors.source)
    return FoundNetwork(kind, config, layout, own)


def _whole(path: Path, tensors: Tensors, about: dict[str, Any], choices: Choices) -> Found:
    known = tuple(PREFIXES.values())
    stray = [name for name in tensors if not name.startswith(known) and not UNUSED.fullmatch(name)]
    refuse_misfits(path, "Stable Diffusion", missing=(), unexpected=stray, misshapen=())
    networks, notes = {}, []
    for (kind, layout), prefix in PREFIXES.items():
        part = tensors.under(prefix)
        if kind == "unet" and (averages := _averages(tensors, part)):
            part = tensors.renamed(averages) if choices.ema else part
            notes.append("the UNet's moving average" if choices.ema else "the UNet's weights, not their moving average")
        if network := _network(part, about, kind, layout):
            networks[kind] = network
    unet = networks["unet"].config
    model, more = _model(path, tensors, about, unet, choices)
    second = unet.get("linear_projection", False)
    form = f"a single file of Stable Diffusion {'2.x' if second else '1.x'}{_inputs(unet['in_channels'])}"
    return Found(path, form, networks, model, about.get("pad", 0 if second else PAD), notes=(*notes, *more))


def _averages(tensors: Tensors, unet: Tensors) -> dict[str, str]:
    """Name in the UNet → name in the file, which has no dots."""
    names = {name: EMA + "diffusion_model" + name.replace(".", "") for name in unet}
    found = {name: average for name, average in names.items() if average in tensors}
    if found and len(found) < len(names):
        missing = [average for average in names.values() if average not in tensors]
        refuse_misfits(tensors.source, "moving average", missing, (), ())
    return found


def _model(
    path: Path, tensors: Tensors, about: dict[str, Any], unet: dict[str, Any], choices: Choices
) -> tuple[dict[str, Any], list[str]]:
    """How to sample, and what of it is a guess."""
    if about.get("model"):
        model = dict(about["model"])
        return model | ({"prediction": choices.prediction} if choices.prediction else {}), []
    prediction, notes = choices.prediction, []
    if prediction is None:
        prediction, why = _prediction(path, tensors, unet)
        notes.append(f"prediction={prediction}, {why}")
    size = [768, 768] if prediction == "v" else [512, 512]
    model = {"schedule": SCHEDULE, "prediction": prediction, "time": "index", "size": size, "sampling": SAMPLING}
    return model, notes


def _prediction(path: Path, tensors: Tensors, unet: dict[str, Any]) -> tuple[str, str]:
    """What the network predicts, and what tells: tensors do not, between SD 2.x at 512 and at 768 pixels."""
    told = tensors.metadata.get("modelspec.prediction_type") or tensors.metadata.get("modelspec.predict_key")
    if told:
        return ("v" if str(told).startswith("v") else "eps"), "as its metadata says"
    if not unet["linear_projection"] or unet["in_channels"] != 4:
        return "eps", "as all of Stable Diffusion 1.x and all inpainting models"
    if tensors.metadata.get("global_step") in (875000, 220000) or re.search(r"512|base", path.name):
        return "eps", "as Stable Diffusion 2.x at 512 pixels, which its name or step count says"
    return (
        "v",
        "as Stable Diffusion 2.x at 768 pixels; its tensors do not tell, so convert with --prediction if it is eps",
    )


def _inputs(channels: int) -> str:
    return {4: "", 9: ", inpainting"}.get(channels, f", a UNet of {channels} input channels")
