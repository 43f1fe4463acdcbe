"""Functions that read a randomly changed copy of a valid file, as ldm reads untrusted files, and may raise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import save_file

from experiments.robustness.mutations import changed_bytes, changed_json
from ldm.app.models import default_settings
from ldm.commands.info.command import describe
from ldm.commands.sample.arguments import parse
from ldm.drawing.prompts import read_rows
from ldm.drawing.recorded import read_recorded
from ldm.image import save_png
from ldm.pipeline.pipeline import Pipeline
from ldm.weights.convert import write
from ldm.weights.model import open_model
from tests.tiny import save_tiny_model
from tests.weights.foreign import ODD, full_model

Target = Callable[[Random, Path], object]
WORDS: dict[str, dict[str, Any]] = {**ODD, "text_tower": {**ODD["text_tower"], "vocab_size": 49408, "width": 12}}
PICTURE: dict[str, Any] = {
    "prompt": "red", "negative": "", "seed": 3, "size": [16, 16], "sampler": "ddim", "spacing": "trailing", "steps": 2,
    "sampler_options": {"eta": 0.5}, "spacing_options": {}, "final_sigma": "zero", "guidance": 2.0,
    "guidance_interval": [0.3, 5.0], "guidance_rescale": 0.0, "fixed_steps": False, "thresholding": "none",
    "thresholding_options": {}, "clip_skip": 0, "chunks": 1, "tile": 0, "noise": "ldm", "model": "m",
    "fingerprint": "0" * 64, "device": "cpu", "precision": "32", "threads": 2, "torch": "2", "ldm": "0",
    "batch": {"prompts": ["red", "blue"], "seeds": [3, 4], "position": 1, "guidance": [1.0, 2.0]},
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Writes valid models for the targets to change."""
    save_tiny_model(folder)
    write(full_model(ODD), folder / "single.safetensors", "single")
    write(full_model(ODD), folder / "single.ckpt", "single")
    write(full_model(WORDS), folder / "diffusers", "diffusers", shard=10**6)


def opened(path: Path) -> None:
    """Describes and opens a model and reads its settings, as `ldm info`, `ldm app` and `ldm convert` do."""
    describe(str(path))
    contents = open_model(path)
    default_settings(str(path))
    for network in contents.networks.values():
        network.check()


def drawn(path: Path) -> None:
    """Opens a model and samples one image in one step, unless it is larger than 64 × 64 pixels."""
    opened(path)
    pipeline = Pipeline.load(str(path), "cpu")
    if pipeline.settings.size[0] * pipeline.settings.size[1] <= 64**2:
        pipeline("red", steps=1)


def metadata_of_a_model(random: Random, folder: Path) -> None:
    source, path = folder / "unet.safetensors", folder / "changed.safetensors"
    with safe_open(source, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["ldm"])
    save_file(state, path, {"ldm": json.dumps(changed_json(about, random))})
    drawn(path)


def bytes_of_a_model(name: str) -> Target:
    def target(random: Random, folder: Path) -> None:
        path = folder / f"changed{Path(name).suffix}"
        path.write_bytes(changed_bytes((folder / name).read_bytes(), random))
        opened(path)

    return target


def configs_of_a_folder(random: Random, folder: Path) -> None:
    changed = folder / "changed"
    shutil.copytree(folder / "diffusers", changed, copy_function=lambda a, b: Path(b).symlink_to(a))
    try:
        path = random.choice([path for path in sorted(changed.rglob("*.json")) if path.name != "vocab.json"])
        value = changed_json(json.loads(path.read_text()), random)
        path.unlink()
        path.write_text(json.dumps(value))
        opened(changed)
    finally:
        shutil.rmtree(changed)


def bytes_of_a_folder(random: Random, folder: Path) -> None:
    changed = folder / "changed"
    shutil.copytree(folder / "diffusers", changed, copy_function=lambda a, b: Path(b).symlink_to(a))
    try:
        path = random.choice([path for path in sorted(changed.rglob("*")) if path.suffix in (".json", ".txt")])
        data = changed_bytes(path.read_bytes(), random)
        path.unlink()
        path.write_bytes(data)
        opened(changed)
    finally:
        shutil.rmtree(changed)


def save_picture(path: Path, settings: Any) -> None:
    """Writes settings into a PNG, including those that `save_png` would refuse."""
    text = PngInfo()
    text.add_itxt("ldm", json.dumps(settings))
    Image.new("RGB", (4, 4)).save(path, pnginfo=text)


def settings_of_a_picture(random: Random, folder: Path) -> None:
    save_picture(folder / "changed.png", changed_json(PICTURE, random))
    read_recorded(folder / "changed.png")


def bytes_of_a_picture(random: Random, folder: Path) -> None:
    save_png(Image.new("RGB", (4, 4)), folder / "sound.png", PICTURE)
    (folder / "changed.png").write_bytes(changed_bytes((folder / "sound.png").read_bytes(), random))
    read_recorded(folder / "changed.png")


def prompts_file(random: Random, folder: Path) -> None:
    rows = [{"prompt": "a red circle", "seed": 3, "guidance": 2.0, "n": 2}, {"prompt": "blue", "negative": "red"}]
    kind = random.choice(["jsonl", "csv", "txt"])
    lines = {"jsonl": map(json.dumps, rows), "csv": ["prompt,seed,n", '"a, b",3,1', "blue,,2"], "txt": ["red", "blue"]}
    path = folder / f"changed.{kind}"
    if kind == "jsonl" and random.random() < 0.5:
        path.write_text("\n".join(json.dumps(changed_json(row, random)) for row in rows))
    else:
        path.write_bytes(changed_bytes("\n".join(lines[kind]).encode(), random))
    read_rows(str(path))


def arguments(random: Random, folder: Path) -> None:
    sound = ["a red circle", "steps=4", "size=64x64", "guidance=3", "sampler_options=eta=0.5", "seed=3", "--", "x"]
    parse([changed_bytes(text.encode(), random).decode("utf-8", "surrogateescape") for text in sound])


TARGETS: dict[str, Target] = {
    "metadata of a model of ldm": metadata_of_a_model,
    "bytes of a model of ldm": bytes_of_a_model("unet.safetensors"),
    "bytes of a single .safetensors": bytes_of_a_model("single.safetensors"),
    "bytes of a .ckpt": bytes_of_a_model("single.ckpt"),
    "configs of a diffusers folder": configs_of_a_folder,
    "bytes of a diffusers folder": bytes_of_a_folder,
    "settings recorded in a PNG": settings_of_a_picture,
    "bytes of a PNG": bytes_of_a_picture,
    "prompts_file": prompts_file,
    "arguments of sample.py": arguments,
}
torch.set_num_threads(1)
