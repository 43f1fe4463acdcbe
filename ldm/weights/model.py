"""A whole model as it lies on disk: the UNet's weights, and as plain data all else that sampling needs.

It is a native file or a checkpoint of a run; both hold the same `about`, {"kind": "unet", "config", "model"}.
Nothing in one is ever run: classes come from a closed list, and checkpoints are read with weights_only=True.
"""

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ldm.nn.unet import UNet
from ldm.weights.native import KINDS, fill, fingerprint, locate, read_about, save_network
from ldm.weights.parts import FirstStage, TextEncoder, first_stage, text_encoder

DEFAULT = "shapes"
NEEDED = {"schedule", "prediction", "time", "first_stage", "text_encoder", "size", "sampling"}
SD_PREFIX = "model.diffusion_model."
NOT_YET = "ldm cannot read that kind yet: give a run folder, a .ckpt of a run or a .safetensors of ldm"

State = dict[str, Tensor]
Part = TypeVar("Part", FirstStage, TextEncoder)


@dataclass(frozen=True)
class Stored:
    """A model found on disk; its weights are read when `weights()` is called."""

    file: Path
    about: dict[str, Any]
    weights: Callable[[], State]
    note: str  # which weights, for people


@dataclass(frozen=True)
class Model:
    """The networks on the CPU in float32; about["model"] says how to sample."""

    source: str
    about: dict[str, Any]
    unet: UNet
    first_stage: FirstStage
    text_encoder: TextEncoder

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what it draws: weights, architecture, schedule and prediction."""
        model = self.about["model"]
        decisive = {
            "unet": [fingerprint(self.unet.state_dict()), self.about["config"]],
            "first_stage": [self.first_stage.source["fingerprint"], self.first_stage.network.config],
            "text_encoder": [self.text_encoder.source["fingerprint"], self.text_encoder.network.config],
            "diffusion": [model["schedule"], model["prediction"], model["time"]],
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def save_model(path: str | Path, unet_state: State, about: dict[str, Any]) -> None:
    """Write a native file of the UNet's weights. Raises ValueError where `about` is incomplete."""
    _check_about(about, path)
    save_network(path, "unet", about["config"], unet_state, model=about["model"])


def read_model(path: str | Path = DEFAULT) -> Model:
    """The model in a run folder, a checkpoint or a native file; "shapes" is the one that ships with ldm.

    Raises FileNotFoundError or ValueError, in one sentence, for what is not there or cannot be used.
    """
    stored = find_model(path)
    parts = stored.about["model"]
    unet = cast(UNet, build(stored.about, stored.file))
    fill(unet, stored.weights(), stored.file, torch.float32)
    return Model(
        source=str(path),
        about=stored.about,
        unet=unet.eval(),
        first_stage=_frozen(first_stage, "first stage", parts["first_stage"], stored.file),
        text_encoder=_frozen(text_encoder, "text encoder", parts["text_encoder"], stored.file),
    )


def find_model(path: str | Path) -> Stored:
    """What `read_model` would read, without its tensors."""
    if str(path) == DEFAULT:
        return _default()
    if str(path).startswith("assets:"):
        return _native(locate(path))
    file = Path(path).expanduser()
    if file.is_dir():
        file = _in_folder(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no model {path}; give a run folder, a .ckpt, a .safetensors or {DEFAULT!r}")
    return _native(file) if file.suffix == ".safetensors" else _checkpoint(file)


def build(about: dict[str, Any], source: object) -> nn.Module:
    """The network that `about` describes, on the meta device. Raises ValueError for unfit settings."""
    try:
        with torch.device("meta"):
            return KINDS[about["kind"]](**about["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} describes no network that this ldm can build ({error})") from error


def _default() -> Stored:
    try:
        return _native(locate("assets:unet.safetensors"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "this copy of ldm comes without the default model: run `python train.py` and give model=RUN_DIR"
        ) from error


def _in_folder(folder: Path) -> Path:
    if (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is a diffusers folder; {NOT_YET}")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"the folder {folder} holds no checkpoints/last.ckpt; give the folder of a run that has saved one"
        )
    return checkpoint


def _native(file: Path) -> Stored:
    try:
        about = read_about(file)
    except ValueError:
        if _is_stable_diffusion(file):
            raise ValueError(f"{file} is a single-file Stable Diffusion model; {NOT_YET}") from None
        raise
    _check_about(about, file)

    def weights() -> State:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118

    return Stored(file, about, weights, "as saved")


def _is_stable_diffusion(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as tensors:
            return any(name.startswith(SD_PREFIX) for name in tensors.keys())  # noqa: SIM118
    except Exception:  # safetensors has one bare class for all that is wrong with a file, which read_about reports
        return False


def _checkpoint(file: Path) -> Stored:
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is no checkpoint, or holds more than tensors and plain data, which could run code: "
            "it was not opened"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{file} is no checkpoint of ldm, or is cut short; give one that is whole") from error
    state = saved.get("state_dict", {}) if isinstance(saved, dict) else {}
    if any(str(name).startswith(SD_PREFIX) for name in state):
        raise ValueError(f"{file} is a single-file Stable Diffusion model; {NOT_YET}")
    if not isinstance(saved, dict) or "ldm" not in saved:
        raise ValueError(f"{file} was not written by a run of ldm: it describes no model")
    _check_about(saved["ldm"], file)
    averages = saved.get("ema")
    raw = {name.removeprefix("unet."): tensor for name, tensor in state.items() if name.startswith("unet.")}
    note = f"{'moving average' if averages else 'raw weights'} after {saved.get('global_step', '?')} steps"
    return Stored(file, saved["ldm"], lambda: averages or raw, note)


def _check_about(about: Any, source: object) -> None:
    kind = about.get("kind") if isinstance(about, dict) else None
    if kind != "unet":
        raise ValueError(f"{source} holds a {kind}, but a model is needed here; give a file of one, or a run")
    model = about.get("model")
    missing = sorted(NEEDED - set(model)) if isinstance(model, dict) else ["model"]
    if missing or "config" not in about:
        raise ValueError(
            f"{source} does not say how to sample from it (it lacks {', '.join(missing or ['config'])}); "
            "save it again from its run"
        )


def _frozen(load: Callable[[str], Part], name: str, expected: dict[str, str], source: Path) -> Part:
    """The frozen part that the model was trained with, and no other."""
    weights = expected["weights"]
    try:
        part = load(weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source} was trained with the {name} {weights}, which is not there: put the file back"
        ) from error
    if part.source["fingerprint"] != expected["fingerprint"]:
        raise ValueError(
            f"{source} was trained with another {name} than the {weights} of today: put back the file whose "
            f"fingerprint begins with {expected['fingerprint'][:12]}"
        )
    return part
