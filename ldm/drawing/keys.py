"""The settings of sample.py: how each is read from text, and what its help says."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ldm.pipeline.settings import MAX_PIXELS


@dataclass(frozen=True)
class Key:
    read: Callable[[str], Any]
    help: str


def integer(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
            raise ValueError(f"an integer of at least {least} and at most 18 digits")
        return int(text)

    return read


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


def low_and_high(text: str) -> tuple[float, float]:
    low, _, high = text.partition(",")
    try:
        return number(low), number(high)
    except ValueError as error:
        raise ValueError("LOW,HIGH of sigma/alpha, such as 0.3,5") from error


def height_by_width(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not match:
        raise ValueError("HEIGHTxWIDTH in pixels, such as 64x96")
    if int(match[1]) * int(match[2]) > MAX_PIXELS:
        raise ValueError(f"HEIGHTxWIDTH of at most {MAX_PIXELS:,} pixels, such as 1024x1024")
    return int(match[1]), int(match[2])


def one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return read


def yes_or_no(text: str) -> bool:
    return one_of("true", "false")(text) == "true"


def options(text: str) -> dict[str, Any]:
    """name=value,name=value; a value may be a list in brackets."""
    pairs = re.findall(r"(\w+)=(\[[^\]]*\]|[^,\[\]]+)(?:,|$)", text)
    if ",".join(f"{name}={value}" for name, value in pairs) != text:
        raise ValueError("name=value,name=value …, such as eta=0.5 or sigmas=[10,3,0.5]")
    return {name: _literal(value) for name, value in pairs}


def _literal(text: str) -> Any:
    """A number, truth value or list as JSON writes it, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def named(text: str) -> str:
    if not text:
        raise ValueError("a name or path")
    return text


KEYS = {
    "model": Key(named, "a run folder, a .ckpt, a .safetensors of ldm, or shapes (the default)"),
    "negative": Key(str, "what the pictures shall not show"),
    "seed": Key(integer(0), "of each prompt's first picture; the next ones count up (0)"),
    "n": Key(integer(1), "pictures a prompt (1)"),
    "steps": Key(integer(1), "more take longer and are finer (the model's own)"),
    "sampler": Key(named, "such as ddim, euler or dpmpp_2m; sampler=? lists all (the model's own)"),
    "spacing": Key(named, "where the steps lie, such as trailing, leading or karras; spacing=? lists all"),
    "sampler_options": Key(options, "such as eta=0.5 or order=3,variant=bh1; what there is, the refusal lists"),
    "spacing_options": Key(options, "such as rho=5 or, for spacing=custom, sigmas=[10,3,0.5]"),
    "final_sigma": Key(
        one_of("zero", "min"),
        "where sampling ends: at no noise, or at that of the schedule's first time (the model's own)",
    ),
    "guidance": Key(number, "how closely to follow the prompt; 1 is no guidance (the model's own)"),
    "guidance_interval": Key(low_and_high, "LOW,HIGH of sigma/alpha between which there is guidance (the model's own)"),
    "guidance_rescale": Key(number, "0 to 1: how much of the contrast that guidance adds is undone (the model's own)"),
    "weak": Key(named, "a worse model of the same kind: guidance leads away from it, not from negative (none)"),
    "thresholding": Key(one_of("none", "static", "dynamic"), "how estimates are kept within a range (none)"),
    "thresholding_options": Key(options, "such as limit=4 for static or share=0.99,limit=4 for dynamic"),
    "init": Key(named, "a picture to start from, scaled and cropped to the size"),
    "strength": Key(
        fraction, "share of the steps that change init: near 0 little, 1 nearly all (0.8; inpainting weights: 1)"
    ),
    "fixed_steps": Key(yes_or_no, "true takes all steps from where strength begins, instead of that share (false)"),
    "mask": Key(named, "a picture that is white where init is repainted"),
    "size": Key(height_by_width, "HEIGHTxWIDTH in pixels (the model's own)"),
    "clip_skip": Key(integer(0), "last layers of the text encoder that are left out (0)"),
    "chunks": Key(integer(1), "how many times the text encoder's context a prompt may fill (1)"),
    "tile": Key(integer(0), "pixels of the tiles in which pictures are decoded, to save memory; 0 for none (0)"),
    "noise": Key(
        one_of("ldm", "diffusers"), "whose numbers a seed means; diffusers' are those of its CPU generator (ldm)"
    ),
    "prompts_file": Key(
        named, "a .txt with a prompt a line; a .csv or .jsonl with prompt, negative, seed, guidance, n"
    ),
    "from": Key(named, "a PNG of sample.py, to draw it again; other keys and one prompt override what it says"),
    "out": Key(named, "folder for 0000.png … and grid.png; if some are there, the rest (samples/<date>_<time>)"),
    "preview": Key(
        one_of("gif", "terminal"), "gif keeps the estimates by step beside each picture; terminal shows them"
    ),
    "device": Key(named, "auto, cpu, cuda or cuda:N (auto)"),
    "precision": Key(
        one_of("auto", "32", "bf16", "16"),
        "32, bf16, or 16, which leaves the first stage at 32; auto is bf16 where the processor has it, else 32 (auto)",
    ),
    "offload": Key(
        one_of("none", "idle", "sequential"), "what waits beside the GPU: nothing, idle networks, layers (none)"
    ),
    "compile": Key(
        yes_or_no,
        "true compiles the network, which takes a minute at the first step and pays for many pictures (false)",
    ),
    "batch_size": Key(integer(1), "pictures at a time; fewer where memory does not suffice (8)"),
}
