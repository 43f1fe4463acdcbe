"""How a pipeline draws: what goes for all pictures of a call."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypedDict

from ldm.pipeline.inputs import Between, ImageRequest

OPTIONED = ("sampler", "spacing", "thresholding")


@dataclass(frozen=True)
class Settings:
    """How to walk from noise to a picture of `size` (height, width).

    `sampler_options`, `spacing_options` and `thresholding_options` are arguments of the functions so named.
    A strength takes the last of the `steps`, or with `fixed_steps` as many, which are the finer.
    Guidance acts while sigma/alpha lies in `guidance_interval`, and `guidance_rescale` is a share, see `rescaled`.
    `clip_skip` leaves out the text encoder's last layers; a prompt may fill `chunks` times its context; with `tile`
    pictures are decoded one at a time, in tiles of that many pixels. `noise` says whose numbers a seed means.
    """

    size: tuple[int, int]
    sampler: str = "dpmpp_2m"
    spacing: str = "trailing"
    steps: int = 20
    fixed_steps: bool = False
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    spacing_options: Mapping[str, Any] = field(default_factory=dict)
    guidance: float = 2.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    thresholding: str = "none"
    thresholding_options: Mapping[str, Any] = field(default_factory=dict)
    clip_skip: int = 0
    chunks: int = 1
    tile: int = 0
    noise: str = "ldm"

    def changed(self, changes: Mapping[str, Any]) -> "Settings":
        """With those of the changes that are not None; another sampler, spacing or thresholding has its own options.

        Raises TypeError for what is no setting.
        """
        if unknown := changes.keys() - {one.name for one in fields(self)}:
            raise TypeError(
                f"there is no setting {min(unknown)}; there are {', '.join(SettingsOverrides.__annotations__)}"
            )
        given = {name: value for name, value in changes.items() if value is not None}
        for name in OPTIONED:
            if given.get(name, getattr(self, name)) != getattr(self, name):
                given.setdefault(f"{name}_options", {})
        return replace(self, **given)

    def record(self, item: ImageRequest, strength: float | None) -> dict[str, Any]:
        """All that decides a picture but for rounding, the model and the pictures it starts from, as plain data."""
        own = {"prompt": plain(item.prompt), "negative": item.negative, "seed": plain(item.seed)}
        drawn = asdict(self) | {"guidance": item.guidance, "size": list(self.size)}
        return own | drawn | ({} if strength is None else {"strength": strength})


class SettingsOverrides(TypedDict, total=False):
    """Settings of one call. Guidance is none of them, since it may differ from picture to picture."""

    size: tuple[int, int] | None
    sampler: str | None
    spacing: str | None
    steps: int | None
    fixed_steps: bool | None
    sampler_options: Mapping[str, Any] | None
    spacing_options: Mapping[str, Any] | None
    guidance_interval: tuple[float, float] | None
    guidance_rescale: float | None
    thresholding: str | None
    thresholding_options: Mapping[str, Any] | None
    clip_skip: int | None
    chunks: int | None
    tile: int | None
    noise: str | None


def batch_record(batch: Sequence[ImageRequest], position: int) -> dict[str, Any]:
    """The batch decides a picture's every bit: in another one convolutions round differently."""
    varied = {name: [getattr(one, name) for one in batch] for name in ("negative", "guidance")}
    varied = {name: values for name, values in varied.items() if len(set(values)) > 1}
    each = {"prompts": [plain(one.prompt) for one in batch], "seeds": [plain(one.seed) for one in batch]}
    return {"batch": each | {"position": position} | varied}


def plain(value: object) -> Any:
    """As JSON can hold it."""
    return asdict(value) if isinstance(value, Between) else value
