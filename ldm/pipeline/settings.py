"""The sampling settings of a pipeline, shared by all images of a call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, TypedDict

from ldm.errors import shortened
from ldm.pipeline.inputs import Between, ImageRequest, as_python
from ldm.pipeline.limits import MAX_COUNT, MAX_NUMBER, MAX_PIXELS

NUMBER = f"a number below {MAX_NUMBER:g}"
COUNT = f"an integer of at most {MAX_COUNT:,}"
SIZE = f"a height and a width, of at most {MAX_PIXELS:,} pixels together"
EXPECTED: dict[str, Callable[[Any], bool]] = {
    SIZE: lambda value: (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(map(_is_count, value))
        and value[0] * value[1] <= MAX_PIXELS
    ),
    "a name": lambda value: isinstance(value, str),
    COUNT: lambda value: _is_count(value),  # its range is checked where it is used
    "true or false": lambda value: isinstance(value, bool),
    NUMBER: lambda value: _is_number(value),
    "a mapping of options": lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
}
TYPES = {
    "size": SIZE,
    "sampler": "a name",
    "spacing": "a name",
    "final_sigma": "a name",
    "thresholding": "a name",
    "noise": "a name",
    "steps": COUNT,
    "chunks": COUNT,
    "clip_skip": COUNT,
    "tile": COUNT,
    "fixed_steps": "true or false",
    "guidance": NUMBER,
    "guidance_rescale": NUMBER,
    "sampler_options": "a mapping of options",
    "spacing_options": "a mapping of options",
    "thresholding_options": "a mapping of options",
}
# Arguments of a call that are not settings, for suggestions.
PER_IMAGE = ("prompts", "negative", "image", "mask", "strength", "guidance", "seeds", "batch_size")
HAVE_OPTIONS = ("sampler", "spacing", "thresholding")  # settings that name a function, with a setting for its options


@dataclass(frozen=True)
class Settings:
    """How to sample images of `size` (height, width).

    `sampler_options`, `spacing_options` and `thresholding_options` are keyword arguments of the chosen functions.
    Sampling ends at the clean image, or with final_sigma="min" at the noise of the schedule's first time. With a
    strength below 1, sampling runs the last int(strength · `steps`) steps; with `fixed_steps` it runs `steps`
    steps, spaced more finely, over the same range of noise. Guidance applies while sigma/alpha is in
    `guidance_interval`; `guidance_rescale` is a fraction, see `rescaled`. `clip_skip` omits the last layers of the text
    encoder; a prompt may fill its context `chunks` times. `prompt_syntax` is "plain" or "a1111", which reads emphasis,
    BREAK and LoRA tags as AUTOMATIC1111's web UI does, in as many chunks as the longest prompt of the call needs. With
    `tile`, images are decoded one at a time in tiles of that many pixels. `noise` selects the generator of seeds, see
    `ldm.pipeline.seed_noise.GENERATORS`.
    """

    size: tuple[int, int]
    sampler: str = "dpmpp_2m"
    spacing: str = "trailing"
    steps: int = 20
    fixed_steps: bool = False
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    spacing_options: Mapping[str, Any] = field(default_factory=dict)
    final_sigma: str = "zero"
    guidance: float = 2.0
    guidance_interval: tuple[float, float | None] | None = None
    guidance_rescale: float = 0.0
    thresholding: str = "none"
    thresholding_options: Mapping[str, Any] = field(default_factory=dict)
    clip_skip: int = 0
    chunks: int = 1
    prompt_syntax: str = "plain"
    tile: int = 0
    noise: str = "ldm"

    def __post_init__(self) -> None:
        for name, expected in TYPES.items():
            if not EXPECTED[expected](value := getattr(self, name)):
                raise ValueError(f"{name} is {shortened(value)}, but must be {expected}")

    def overridden(self, overrides: Mapping[str, Any]) -> "Settings":
        """Returns a copy with all overrides that are not None.

        Another sampler, spacing or thresholding starts from its own default options. Raises TypeError for unknown
        names.
        """
        if unknown := overrides.keys() - {setting.name for setting in fields(self)}:
            known = [*SettingsOverrides.__annotations__]
            near = get_close_matches(name := min(unknown), [*known, *PER_IMAGE], n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise TypeError(f"there is no setting {name}; {hint}")
        given = {name: as_python(value) for name, value in overrides.items() if value is not None}
        for name in HAVE_OPTIONS:
            if given.get(name, getattr(self, name)) != getattr(self, name):
                given.setdefault(f"{name}_options", {})
        return replace(self, **given)

    def record(self, request: ImageRequest, strength: float | None) -> dict[str, Any]:
        """Returns as JSON data everything that determines an image up to rounding, except model and source images."""
        own = {"prompt": as_json(request.prompt), "negative": request.negative, "seed": as_json(request.seed)}
        shared = asdict(self) | {"guidance": request.guidance, "size": list(self.size)}
        return own | shared | ({} if strength is None else {"strength": strength})


def model_settings(model: Mapping[str, Any], source: object) -> Settings:
    """Returns the default sampling settings in a model's file. Raises ValueError if they are invalid."""
    sampling = model["sampling"]
    if unknown := sampling.keys() - {setting.name for setting in fields(Settings) if setting.name != "size"}:
        raise ValueError(
            f"{source} says to sample with {min(unknown, key=str)}, which is no setting of this version of ldm"
        )
    try:
        return Settings(size=tuple(model["size"]), **sampling)
    except ValueError as error:
        raise ValueError(f"{source} does not say how to sample from it: {error}") from error


class SettingsOverrides(TypedDict, total=False):
    """Settings of one call. Guidance is not among them, because it may differ from image to image."""

    size: tuple[int, int] | None
    sampler: str | None
    spacing: str | None
    steps: int | None
    fixed_steps: bool | None
    sampler_options: Mapping[str, Any] | None
    spacing_options: Mapping[str, Any] | None
    final_sigma: str | None
    guidance_interval: tuple[float, float | None] | None
    guidance_rescale: float | None
    thresholding: str | None
    thresholding_options: Mapping[str, Any] | None
    clip_skip: int | None
    chunks: int | None
    prompt_syntax: str | None
    tile: int | None
    noise: str | None


def batch_record(batch: Sequence[ImageRequest], position: int) -> dict[str, Any]:
    """Records the batch of an image, which fixes its exact bits: convolutions round differently in another batch."""
    varied = {name: [getattr(request, name) for request in batch] for name in ("negative", "guidance")}
    varied = {name: values for name, values in varied.items() if len(set(values)) > 1}
    prompts, seeds = ([as_json(getattr(request, name)) for request in batch] for name in ("prompt", "seed"))
    return {"batch": {"prompts": prompts, "seeds": seeds, "position": position} | varied}


def as_json(value: object) -> Any:
    """Returns `value` in a form that JSON can represent."""
    return asdict(value) if isinstance(value, Between) else value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_COUNT


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER
