"""Our own file of one network: safetensors whose metadata holds the architecture as plain data.

Opening one builds the class that its `kind` names from a closed list; nothing else in the file is ever run.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ldm.files import atomic_write
from ldm.nn.clip import CLIP, ImageTower, TextTower
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE

ASSETS = Path(__file__).parents[1] / "assets"


def _clip(text: dict[str, Any], image: dict[str, Any]) -> CLIP:
    return CLIP(TextTower(**text), ImageTower(**image))


KINDS: dict[str, Callable[..., nn.Module]] = {
    "unet": UNet,
    "vae": VAE,
    "text_tower": TextTower,
    "image_tower": ImageTower,
    "clip": _clip,
}


def locate(path: str | Path) -> Path:
    """The file that `path` names; "assets:NAME" is one that ships with ldm. Raises FileNotFoundError."""
    text = str(path)
    found = ASSETS / text.removeprefix("assets:") if text.startswith("assets:") else Path(text).expanduser()
    if not found.is_file():
        raise FileNotFoundError(f"there is no weights file {found}; give the path of a .safetensors file")
    return found


def save_network(path: str | Path, kind: str, config: dict[str, Any], state: dict[str, Tensor], **about: Any) -> None:
    """Write tensors and architecture atomically; `about` is any more plain data to keep beside them."""
    metadata = {"ldm": json.dumps({"kind": kind, "config": config, **about}, ensure_ascii=False)}
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, metadata)
    atomic_write(path, lambda file: file.write(data))


def read_about(path: str | Path) -> dict[str, Any]:
    """What a file of ours says of itself, without reading a tensor. Raises ValueError for any other file."""
    file = locate(path)
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file ({error}); fetch or export it again") from error
    if "ldm" not in metadata:
        raise ValueError(f"{file} was not written by ldm: its metadata names no architecture")
    return dict(json.loads(metadata["ldm"]))


def load_network(path: str | Path, kind: str, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """The network in `path`, in evaluation mode; `dtype` None keeps the file's. ValueError if it is no `kind`."""
    file, about = locate(path), read_about(path)
    if about["kind"] != kind:
        raise ValueError(f"{file} holds a {about['kind']}, but a {kind} is needed here; give the file of one")
    with torch.device("meta"):
        network = KINDS[kind](**about["config"])
    with safe_open(file, framework="pt") as tensors:
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return fill(network, state, file, dtype).eval()


def fill(network: nn.Module, state: dict[str, Tensor], source: object, dtype: torch.dtype | None = None) -> nn.Module:
    """`network` with its parameters replaced by `state`; every missing, unexpected or mis-shaped name is listed."""
    expected = network.state_dict()
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    told = [f"{len(names)} {what}: {_shorten(names)}" for what, names in problems.items() if names]
    if told:
        raise ValueError(f"the weights in {source} are those of another {type(network).__name__} ({'; '.join(told)})")
    cast = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    network.load_state_dict(cast, assign=True)
    return network


def fingerprint(state: dict[str, Tensor]) -> str:
    """SHA-256 of names, types and bytes: the same for the same weights, whatever file they lie in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shorten(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
