"""One file of weights: Stable Diffusion in the layout of CompVis, or a part alone, recognised by its tensors' names."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.files import atomic_write
from ldm.weights.architecture import infer
from ldm.weights.contents import OPENAI, PAD, Contents, Pixels, StoredNetwork, native
from ldm.weights.keymaps import canonical
from ldm.weights.native import KINDS, refuse_misfits
from ldm.weights.tensors import PICKLED, Tensors, held, open_tensors, write_safetensors

WHOLE = "stable_diffusion"  # the "kind" in the metadata of a whole model that we wrote
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
EMA = "model_ema."
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


def read_file(path: Path, choices: Choices = Choices()) -> Contents:
    """What a .safetensors, .ckpt or .bin holds. Raises ValueError for what is damaged, unknown or of another model."""
    tensors = open_tensors(path)
    about = _about(tensors)
    if about.get("kind") in KINDS:
        return _native(path, tensors, about, choices)
    for name, pattern in REFUSED.items():
        if any(re.fullmatch(pattern, tensor) for tensor in tensors):
            raise ValueError(f"{path} is {name}, which ldm does not read; give a model of Stable Diffusion 1.x or 2.x")
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
    return Contents(path, f"a {' and a '.join(networks)} alone", networks, pad=about.get("pad", pad), pixels=pixels)


def whole(contents: Contents) -> tuple[dict[tuple[str, str], Tensors], dict[str, Any]]:
    """The networks arranged for one file, and the plain data that their tensors do not tell."""
    arranged = {(kind, layout): contents.networks[kind].arranged(layout) for kind, layout in layouts(contents.networks)}
    about = {
        "configs": {kind: network.full_config for kind, network in contents.networks.items()},
        "pad": contents.pad,
        "pixels": asdict(contents.pixels),
    }
    return arranged, about | ({"model": contents.model} if contents.model else {})


def write_file(path: Path, contents: Contents) -> None:
    """Write a whole model, or one part alone, as .safetensors or .ckpt."""
    arranged, about = whole(contents)
    is_whole = {"unet", "vae", "text_tower"} <= contents.networks.keys()
    about |= {"kind": WHOLE if is_whole else "part"}
    prefixed: dict[str, tuple[Tensors, str]] = {}
    for place, tensors in arranged.items():
        prefix = PREFIXES[place] if is_whole else ""
        prefixed |= {prefix + name: (tensors, name) for name in tensors}

    def read(names: Any) -> dict[str, torch.Tensor]:
        names = list(names)
        found: dict[str, torch.Tensor] = {}
        for tensors in arranged.values():
            own = {name: prefixed[name][1] for name in names if prefixed[name][0] is tensors}
            values = tensors.read(own.values())
            found |= {name: values[inner] for name, inner in own.items()}
        return found

    meta = {name: tensors[inner] for name, (tensors, inner) in prefixed.items()}
    if path.suffix in PICKLED:
        state = {name: tensor.clone() for name, tensor in read(meta).items()}  # a view would bring its whole storage
        atomic_write(path, lambda file: torch.save({"state_dict": state, "ldm": about}, file))
    else:
        write_safetensors(
            path, Tensors(contents.source, meta, read), {"format": "pt", "ldm": json.dumps(about)} | _spec(contents)
        )


def layouts(networks: Mapping[str, StoredNetwork]) -> list[tuple[str, str]]:
    """In which layout each network lies in a single file: OpenCLIP's for towers with plain GELU, as SD 2.x's."""
    text = networks.get("text_tower")
    openclip = text is not None and text.config["activation"] == "gelu"
    of = {"text_tower": "openclip" if openclip else "transformers", "image_tower": "transformers"}
    return [(kind, of.get(kind, "compvis")) for kind in networks]


def _about(tensors: Tensors) -> dict[str, Any]:
    """Our own plain data in the file, if any."""
    told = tensors.metadata.get("ldm", {})
    return dict(json.loads(told) if isinstance(told, str) else told)


def _native(path: Path, tensors: Tensors, about: dict[str, Any], choices: Choices) -> Contents:
    """A file of ours, or a checkpoint of a run: the same plain data, the tensors under "unet." or as "ema"."""
    kind, model = about["kind"], about.get("model", {})
    if path.suffix != ".ckpt":
        network = native(tensors, kind, about["config"])
        pad, pixels = about.get("pad", PAD), _pixels(about, Pixels())
        return Contents(path, f"a {kind} of ldm", {kind: network}, model, pad, pixels, ("as saved",))
    averages = tensors.metadata.get("ema") if choices.ema else None
    own = held(path, averages) if averages else tensors.under("unet.")
    note = f"{'moving average' if averages else 'raw weights'} after {tensors.metadata.get('global_step', '?')} steps"
    return Contents(path, "a run of ldm", {kind: native(own, kind, about["config"])}, model, notes=(note,))


def _pixels(about: dict[str, Any], others: Pixels) -> Pixels:
    return Pixels(**{name: tuple(values) for name, values in about["pixels"].items()}) if "pixels" in about else others


def _network(tensors: Tensors, about: dict[str, Any], kind: str, layout: str) -> StoredNetwork | None:
    own = tensors.renamed(canonical(kind, layout, list(tensors)))
    if TELLING[kind, layout] not in own:
        return None
    config = about.get("configs", {}).get(kind) or infer(kind, layout, own, tensors.source)
    return StoredNetwork(kind, config, layout, own)


def _whole(path: Path, tensors: Tensors, about: dict[str, Any], choices: Choices) -> Contents:
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
    return Contents(path, form, networks, model, about.get("pad", 0 if second else PAD), notes=(*notes, *more))


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
    if "model" in about:
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


def _spec(contents: Contents) -> dict[str, str]:
    """What other tools read to tell v from eps."""
    prediction = {"eps": "epsilon", "v": "v"}.get(contents.model.get("prediction", ""))
    return {"modelspec.prediction_type": prediction} if prediction else {}
