"""Prompts → pictures."""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule, from_config
from ldm.image import to_uint8
from ldm.lint import contradictions
from ldm.nn.clip import TextTower
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.random import normal
from ldm.sampling.driver import SAMPLERS, sample
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import SPACINGS
from ldm.weights.model import DEFAULT, Model, read_model

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """How to walk from noise to a picture of `size` (height, width)."""

    size: tuple[int, int]
    sampler: str = "dpmpp_2m"
    spacing: str = "trailing"
    steps: int = 20
    guidance: float = 2.0


@dataclass(frozen=True)
class Result:
    """Pictures uint8 (n, 3, h, w) on the CPU, and for each the settings that suffice to draw it again."""

    images: Tensor
    settings: list[dict[str, Any]]


class Pipeline:
    """Draws prompts with networks that already are where, and of the type, that they shall run in.

    `settings` are what a call uses unless it says otherwise. Raises ValueError for parts that do not fit.
    """

    def __init__(
        self,
        unet: UNet,
        first_stage: VAE,
        text_encoder: TextTower,
        tokenizer: Tokenizer,
        schedule: Schedule,
        prediction: Prediction,
        settings: Settings,
        time: str | None = None,
    ) -> None:
        self.unet, self.first_stage, self.text_encoder = unet, first_stage, text_encoder
        self.tokenizer, self.settings = tokenizer, settings
        self.denoiser = Denoiser(self._network, schedule, prediction, time)
        _refuse(contradictions(schedule, prediction, time=self.denoiser.time))
        _refuse(_misfits(unet, first_stage, text_encoder))

    @classmethod
    def load(cls, path: str = DEFAULT, device: str = "auto", dtype: torch.dtype = torch.float32) -> "Pipeline":
        """The model at `path`, see `read_model`."""
        return cls.of(read_model(path), device, dtype)

    @classmethod
    def of(cls, model: Model, device: str = "auto", dtype: torch.dtype = torch.float32) -> "Pipeline":
        """`model`, moved to the device; its UNet and text encoder in `dtype`, its first stage in float32."""
        about, where = model.about["model"], choose_device(device)
        last = torch.channels_last
        return cls(
            unet=model.unet.to(where, dtype, memory_format=last),  # type: ignore[call-overload]
            first_stage=model.first_stage.network.to(where, memory_format=last),  # type: ignore[call-overload]
            text_encoder=model.text_encoder.network.to(where, dtype),
            tokenizer=model.text_encoder.tokenizer,
            schedule=from_config(about["schedule"]),
            prediction=Prediction(about["prediction"]),
            settings=Settings(size=tuple(about["size"]), **about["sampling"]),
            time=about["time"],
        )

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        negative: str = "",
        steps: int | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int = 8,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Result:
        """One picture a prompt; the prompt and its seed decide it, to 1/255, at any batch size.

        Seeds are 0, 1, … by default. `on_step(done, total)` counts the steps of all batches. Warns of text
        that the text encoder cannot read. Raises ValueError for settings that the model cannot draw with.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        chosen = dict(steps=steps, sampler=sampler, spacing=spacing, guidance=guidance, size=size)
        settings = replace(self.settings, **{k: v for k, v in chosen.items() if v is not None})  # type: ignore[arg-type]
        self._check(prompts, seeds, settings, batch_size)
        for remark in self.remarks([*prompts, negative]):
            warnings.warn(remark, stacklevel=3)  # 3: no_grad's wrapper lies between
        starts = range(0, len(prompts), batch_size)
        total = settings.steps * len(starts)
        images, told = [], []
        for index, start in enumerate(starts):
            batch = prompts[start : start + batch_size], seeds[start : start + batch_size]
            step = _counter(on_step, index * settings.steps, total)
            images.append(self._draw(*batch, negative, settings, step))
            told += [_record(settings, negative, *batch, position) for position in range(len(batch[0]))]
        return Result(torch.cat(images), told)

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """What of the prompts the text encoder will not read: ends that are too long, and unknown words."""
        found = []
        for prompt in dict.fromkeys(prompts):
            if cut := self.tokenizer.cut(prompt):
                found.append(
                    f"the prompt {_short(prompt)} is longer than the {self.tokenizer.context} tokens that "
                    f"the text encoder reads; this end was cut off: {cut!r}"
                )
            if unknown := [word for word in _words(prompt) if self._unknown(word)]:
                found.append(
                    f"the text encoder does not know {', '.join(map(repr, unknown))} in {_short(prompt)}; "
                    "the model was not trained on such words"
                )
        return found

    def _unknown(self, word: str) -> bool:
        tokens = self.tokenizer([word]).to(self.device)
        special = {self.tokenizer.begin, self.tokenizer.end, self.tokenizer.pad}
        return bool(set(self.text_encoder.unknown_tokens(tokens)) - special)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def multiple(self) -> int:
        """Of which a picture's height and width must be multiples."""
        return int(self.first_stage.factor * 2 ** (len(self.unet.config["multipliers"]) - 1))

    def _check(self, prompts: list[str], seeds: list[int], settings: Settings, batch_size: int) -> None:
        if not prompts or len(seeds) != len(prompts):
            raise ValueError(f"expected prompts and a seed for each, got {len(prompts)} and {len(seeds)}")
        if min(seeds) < 0 or max(seeds) > MAX_SEED:
            raise ValueError(f"a seed is {min(seeds)} or {max(seeds)}, but must lie between 0 and {MAX_SEED}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be 1 or more")
        for name, value, known in (
            ("sampler", settings.sampler, SAMPLERS),
            ("spacing", settings.spacing, SPACINGS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(known)}")
        height, width = settings.size
        if height < 1 or width < 1 or height % self.multiple or width % self.multiple:
            raise ValueError(
                f"size is {height}x{width}, but this model draws heights and widths that are multiples of "
                f"{self.multiple}"
            )
        schedule, prediction = self.denoiser.schedule, self.denoiser.prediction
        _refuse(contradictions(schedule, prediction, spacing=settings.spacing))

    def _draw(self, prompts: list[str], seeds: list[int], negative: str, settings: Settings, on_step: Any) -> Tensor:
        context = self._context([*prompts, negative])  # (b + 1, n, d)
        positive, negatives = context[:-1], context[-1:].expand_as(context[:-1])
        denoise = classifier_free(self.denoiser, positive, negatives, settings.guidance)
        schedule = self.denoiser.schedule
        grid = Grid.of(schedule, SPACINGS[settings.spacing](schedule, settings.steps))
        ids = torch.tensor(seeds, device=self.device)
        factor = self.first_stage.factor
        shape = (self.first_stage.latent_channels, settings.size[0] // factor, settings.size[1] // factor)

        def noise(step: int) -> Tensor:
            return normal(0, "step noise", ids, step, shape)

        x = grid.start(normal(0, "initial noise", ids, 0, shape))
        x = sample(SAMPLERS[settings.sampler], denoise, x, grid, noise, on_step)
        return to_uint8(self.first_stage.decode(x)).cpu()

    def _context(self, captions: list[str]) -> Tensor:
        return self.text_encoder(self.tokenizer(captions).to(self.device))

    def _network(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.unet(x.to(self.unet.conv_in.weight.dtype), time, context)


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device is {name!r}, but must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name} here ({torch.cuda.device_count()} GPUs): use device=cpu")
    return device


def _record(settings: Settings, negative: str, prompts: list[str], seeds: list[int], position: int) -> dict[str, Any]:
    """Names the batch too: in another one convolutions round differently, so not every bit comes again."""
    batch = {"prompts": prompts, "seeds": seeds, "position": position}
    own = {"prompt": prompts[position], "negative": negative, "seed": seeds[position]}
    return own | asdict(settings) | {"size": list(settings.size), "batch": batch}


def _counter(
    on_step: Callable[[int, int], None] | None, done: int, total: int
) -> Callable[[int, int, Tensor], None] | None:
    return on_step and (lambda step, _steps, _x0: on_step(done + step + 1, total))


def _misfits(unet: UNet, first_stage: VAE, text_encoder: TextTower) -> list[str]:
    pairs = {
        "the text encoder's width and the UNet's context_width": (
            text_encoder.config["width"],
            unet.config["context_width"],
        ),
        "the first stage's latent channels and the UNet's in_channels": (
            first_stage.latent_channels,
            unet.config["in_channels"],
        ),
    }
    return [f"{what} are {a} and {b}, but must be equal" for what, (a, b) in pairs.items() if a != b]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"\w+|[^\w\s]+", text)))


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 1] + "…")
