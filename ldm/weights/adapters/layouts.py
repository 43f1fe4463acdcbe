"""Groups the tensors of an adapter file by the layer that they change. Only names are read."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ldm.weights.adapters.names import TEXT, TEXT_2, UNET, aliased, dotted

KOHYA, DIFFUSERS = LAYOUTS = ("kohya", "diffusers")
PREFIXES: dict[str, str | None] = {  # of names in kohya, diffusers and peft
    "lora_unet_": UNET,
    "lora_te_": TEXT,
    "lora_te1_": TEXT,
    "lora_te2_": TEXT_2,
    "unet.": UNET,
    "transformer.": UNET,
    "text_encoder.": TEXT,
    "text_encoder_2.": TEXT_2,
    "base_model.model.": None,  # of either network; peft does not record which
}
ENDINGS = [  # the spellings of each part of a change
    (r"\.(lora_down|lora\.down|lora_linear_layer\.down|lora_A(\.default)?)\.weight", "down"),
    (r"\.(lora_up|lora\.up|lora_linear_layer\.up|lora_B(\.default)?)\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.alpha", "alpha"),
    (r"\.(dora_scale|magnitude)", "magnitude"),
    (r"\.lora_magnitude_vector(\.default)?(\.weight)?", "output magnitude"),  # of peft, always of the outputs
    *((rf"\.{part}", part) for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
    *((rf"\.{part}", part) for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    (r"\.lokr_t2", "lokr_t2"),
]
TEXT_LAYER = re.compile(r"(text_model\.)?encoder\.layers\.")
PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora(\.(?:down|up)\.weight)")  # diffusers before 0.22
TEXT_PROCESSOR = re.compile(r"(text_encoder.+\.self_attn)\.to_(q|k|v|out)_lora(\.(?:down|up)\.weight)")
TELLING = re.compile(r"down|up|hada_w1_a|lokr_w[12](_a)?")  # a file with one of these parts is an adapter


@dataclass
class Layer:
    """One layer of a network, and the names of the tensors in the file that change it."""

    network: str
    name: str  # with dots, as in diffusers and transformers, if known
    label: str  # as in the file
    prefix: str  # of the label, which names the network; "" if the file has none
    parts: dict[str, str] = field(default_factory=dict)


def layers_of(names: Iterable[str]) -> tuple[list[Layer], list[str]]:
    """Returns the layers that tensors with these names change, and the names that belong to no layer."""
    layers: dict[tuple[str, str], Layer] = {}
    strays = []
    for tensor in names:
        if (found := _parse(tensor)) is None:
            strays.append(tensor)
            continue
        network, label, part, prefix = found
        within = label.removeprefix(prefix)
        name = (dotted(network, within) or within) if prefix.startswith("lora_") else aliased(network, within)
        layer = layers.setdefault((network, name), Layer(network, name, label, prefix))
        if part in layer.parts:
            strays.append(tensor)
        layer.parts[part] = tensor
    return list(layers.values()), strays


def layout_of(layers: Iterable[Layer]) -> str:
    return KOHYA if any(layer.label.startswith("lora_") for layer in layers) else DIFFUSERS


def is_adapter(names: Iterable[str]) -> bool:
    """Returns whether these are names of tensors of an adapter, rather than of a network."""
    return any((found := _parse(name)) is not None and TELLING.fullmatch(found[2]) for name in names)


def _parse(tensor: str) -> tuple[str, str, str, str] | None:
    """Returns the network, the layer as in the file, the part of its change, and the prefix of the name."""
    if match := TEXT_PROCESSOR.fullmatch(tensor):
        tensor = f"{match[1]}.{match[2]}_proj.lora{match[3]}"
    elif match := PROCESSOR.fullmatch(tensor):  # the output projection is the first layer of a list
        tensor = f"{match[1]}.{match[2].replace('to_out', 'to_out.0')}.lora{match[3]}"
    for ending, part in ENDINGS:
        if match := re.fullmatch(rf"(.+?){ending}", tensor):
            prefix = next((one for one in PREFIXES if tensor.startswith(one)), "")
            is_text = TEXT_LAYER.match(match[1].removeprefix(prefix))
            return PREFIXES.get(prefix) or (TEXT if is_text else UNET), match[1], part, prefix
    return None
