"""Defines the command-line keys of sample.py, with their parsers and help texts."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.pipeline.limits import MAX_PIXELS, OFFLOAD_MODES
from ldm.pipeline.precision import AUTO, DTYPES

ADDED = ("lora", "embedding")  # the keys of files to add to a model, which may be given several times


@dataclass(frozen=True)
class Key:
    parse: Callable[[str], Any]  # raises ValueError, whose message completes "must be …"
    help: str


def integer(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < minimum:
            raise ValueError(f"an integer >= {minimum} with at most 18 digits")
        return int(text)

    return parse


def seed(text: str) -> int:
    if "," in text:
        raise ValueError("one integer: n=3 uses it and the next two, and each row of a prompts_file has its own")
    return integer(0)(text)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("a number")
    return value


def fraction(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise ValueError("a number above 0 and at most 1")
    return value


def interval(text: str) -> tuple[float, float | None]:
    low, comma, high = text.partition(",")
    try:
        return number(low), None if comma and not high else number(high)
    except ValueError as error:
        raise ValueError("LOW,HIGH of sigma/alpha, such as 0.3,5, or 2, without an upper end") from error


def height_by_width(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not match:
        raise ValueError("HEIGHTxWIDTH in pixels, such as 64x96")
    if int(match[1]) * int(match[2]) > MAX_PIXELS:
        raise ValueError(f"HEIGHTxWIDTH of at most {MAX_PIXELS:,} pixels, such as 1024x1024")
    return int(match[1]), int(match[2])


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return parse


def yes_or_no(text: str) -> bool:
    return one_of("true", "false")(text) == "true"


def options(text: str) -> dict[str, Any]:
    """Parses name=value,name=value; a value may be a list in brackets."""
    pairs = re.findall(r"(\w+)=(\[[^\]]*\]|[^,\[\]]+)(?:,|$)", text)
    if ",".join(f"{name}={value}" for name, value in pairs) != text:
        raise ValueError("name=value,name=value …, such as eta=0.5 or sigmas=[10,3,0.5]")
    return {name: _literal(value) for name, value in pairs}


def _literal(text: str) -> Any:
    """Returns JSON, such as a number, boolean or list, as its value, and other text unchanged."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def lora(text: str) -> tuple[str, float]:
    """Parses FILE or FILE:WEIGHT; the weight is 1 by default."""
    path, _, weight = text.rpartition(":")
    if not text:
        raise ValueError("a file, or FILE:WEIGHT such as style.safetensors:0.8")
    if not path:
        return text, 1.0
    try:
        return path, number(weight)
    except ValueError as error:
        if Path(text).expanduser().exists() or not Path(path).expanduser().exists():
            return text, 1.0  # the colon is part of the file's name
        raise ValueError("a file, or FILE:WEIGHT with a number, such as style.safetensors:0.8") from error


def embedding(text: str) -> tuple[str, str | None]:
    """Parses FILE or FILE:TOKEN; the token is None by default."""
    path, colon, token = text.rpartition(":")
    if not text or (colon and not (path and token)):
        raise ValueError("a file, or FILE:TOKEN such as cat.pt:<my-cat>")
    return (path, token) if colon and not Path(text).expanduser().exists() else (text, None)


def nonempty(text: str) -> str:
    if not text:
        raise ValueError("a name or path")
    return text


KEYS = {
    "model": Key(nonempty, "a run folder, a .ckpt, a .safetensors of ldm, or shapes (the default)"),
    "lora": Key(lora, "FILE or FILE:WEIGHT: an adapter to merge into the model; may be given several times (none)"),
    "embedding": Key(embedding, "FILE or FILE:TOKEN: a textual inversion; may be given several times (none)"),
    "lora_dir": Key(
        nonempty,
        "folder of the files that tags in prompts name, as in <lora:NAME:0.8>, with prompt_syntax=a1111 (none)",
    ),
    "negative": Key(str, "what the images should not show"),
    "seed": Key(seed, "seed of each prompt's first image; the next images use the following seeds (0)"),
    "n": Key(integer(1), "images per prompt (1)"),
    "steps": Key(integer(1), "sampling steps; more steps are slower and more accurate (the model's own)"),
    "sampler": Key(nonempty, "such as ddim, euler or dpmpp_2m; sampler=? lists all (the model's own)"),
    "spacing": Key(nonempty, "time step spacing, such as trailing, leading or karras; spacing=? lists all"),
    "sampler_options": Key(options, "such as eta=0.5 or order=3,variant=bh1; an unknown option lists all"),
    "spacing_options": Key(options, "such as rho=5 or, for spacing=custom, sigmas=[10,3,0.5]"),
    "final_sigma": Key(
        one_of("zero", "min"),
        "where sampling ends: at no noise, or at the noise of the schedule's first time (the model's own)",
    ),
    "guidance": Key(number, "guidance scale: how closely to follow the prompt; 1 is no guidance (the model's own)"),
    "guidance_interval": Key(
        interval, "LOW,HIGH of sigma/alpha between which guidance applies; LOW, has no upper end (the model's own)"
    ),
    "guidance_rescale": Key(number, "0 to 1: how much of the contrast added by guidance to undo (the model's own)"),
    "weak": Key(nonempty, "a worse model of the same kind, used by guidance in place of the negative prompt (none)"),
    "thresholding": Key(one_of("none", "static", "dynamic"), "how estimates are kept within a range (none)"),
    "thresholding_options": Key(options, "such as limit=4 for static or share=0.99,limit=4 for dynamic"),
    "init": Key(nonempty, "a source image, scaled and cropped to the size"),
    "strength": Key(
        fraction,
        "fraction of the steps to run on init: near 0 changes little, 1 nearly all (0.8; inpainting models: 1)",
    ),
    "fixed_steps": Key(yes_or_no, "true runs all steps, not a fraction, from the noise level of strength (false)"),
    "mask": Key(nonempty, "an image that is white where init is repainted"),
    "size": Key(height_by_width, "HEIGHTxWIDTH in pixels (the model's own)"),
    "clip_skip": Key(integer(0), "number of last layers of the text encoder to skip (0)"),
    "chunks": Key(integer(1), "how many times a prompt may fill the text encoder's context (1)"),
    "prompt_syntax": Key(
        one_of("plain", "a1111"),
        "a1111 reads (word:1.2), [word], BREAK and <lora:NAME:0.8> as AUTOMATIC1111's web UI does (plain)",
    ),
    "tile": Key(integer(0), "decode images in tiles of this many pixels, to save memory; 0 for no tiles (0)"),
    "noise": Key(
        one_of("ldm", "diffusers"), "generator that seeds refer to; diffusers is that of its CPU generator (ldm)"
    ),
    "prompts_file": Key(
        nonempty, "a .txt with one prompt per line; a .csv or .jsonl with prompt, negative, seed, guidance, n"
    ),
    "from": Key(nonempty, "a PNG of sample.py to reproduce; other keys and one prompt override its settings"),
    "out": Key(nonempty, "folder of 0000.png … and grid.png; existing images are kept (samples/<date>_<time>)"),
    "preview": Key(
        one_of("gif", "terminal"), "gif saves the estimates of all steps beside each image; terminal shows them"
    ),
    "device": Key(nonempty, "auto, cpu, cuda or cuda:N (auto)"),
    "precision": Key(
        one_of(AUTO, *DTYPES),
        "32, bf16, or 16, which keeps the first stage at 32; auto is bf16 if the processor supports it, else 32 (auto)",
    ),
    "offload": Key(one_of(*OFFLOAD_MODES), "what to keep off the GPU: nothing, idle networks, or all layers (none)"),
    "compile": Key(
        yes_or_no,
        "true compiles the network, which takes a minute at the first step and pays off for many images (false)",
    ),
    "batch_size": Key(integer(1), "images per batch; reduced when out of memory (8)"),
}
