"""Prompts → pictures, from noise or from other pictures."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ldm import remarks
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.guidance import classifier_free, times_of
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule, from_config
from ldm.editing import STRENGTH, keeping, latent_mask, originals_of, paste, steps_walked
from ldm.image import from_uint8, to_uint8
from ldm.items import Each, Item, Picture, items_of
from ldm.lint import Setup, contradictions
from ldm.nn.clip import TextTower
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.random import normal
from ldm.sampling.driver import sample, solver_of
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import spacing_of
from ldm.weights.find import DEFAULT
from ldm.weights.model import Model, read_model

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to walk from noise to a picture of `size` (height, width).

    `sampler_options` and `spacing_options` are arguments of the sampler's and the spacing's function.
    Guidance acts while sigma/alpha lies in `guidance_interval`, and `guidance_rescale` is a share, see `rescaled`.
    `clip_skip` leaves out the text encoder's last layers; a prompt may fill `chunks` times its context; with `tile`
    pictures are decoded one at a time, in tiles of that many pixels.
    """

    size: tuple[int, int]
    sampler: str = "dpmpp_2m"
    spacing: str = "trailing"
    steps: int = 20
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    spacing_options: Mapping[str, Any] = field(default_factory=dict)
    guidance: float = 2.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    clip_skip: int = 0
    chunks: int = 1
    tile: int = 0


@dataclass(frozen=True)
class Result:
    """Pictures uint8 (n, 3, h, w) on the CPU, and for each the settings (beside image and mask) to draw it again."""

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
        _refuse(
            contradictions(
                Setup(
                    schedule,
                    prediction,
                    time=self.denoiser.time,
                    given=(text_encoder.config["width"], first_stage.latent_channels),
                    taken=(unet.config["context_width"], unet.config["in_channels"]),
                )
            )
        )

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
        prompts: Each[str],
        negative: Each[str] = "",
        image: Each[Picture] | Tensor | None = None,
        mask: Each[Picture] | Tensor | None = None,
        strength: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        spacing_options: Mapping[str, Any] | None = None,
        guidance: Each[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        chunks: int | None = None,
        tile: int | None = None,
        seeds: Each[int] | None = None,
        batch_size: int = 8,
        on_step: OnStep | None = None,
    ) -> Result:
        """One picture a prompt; the prompt and its seed decide it, to 1/255, at any batch size.

        With an `image` they start from it, scaled and cropped to the size, and take the last int(strength · steps)
        steps only (0.8 of them by default). With a `mask` they differ from it only where that is white.
        Prompts, negatives, guidance scales, seeds, images and masks are one for all, or a list with one a picture.
        What is None is the model's own; its options go with its own sampler and spacing only. Seeds are 0, 1, … by
        default. `on_step(done, total)` counts the steps of all batches. Warns of text that the text encoder cannot
        read and of pictures that are scaled. Raises ValueError for what the model cannot draw with.
        """
        if sampler_options is None and sampler not in (None, self.settings.sampler):
            sampler_options = {}
        if spacing_options is None and spacing not in (None, self.settings.spacing):
            spacing_options = {}
        chosen = dict(
            steps=steps,
            sampler=sampler,
            spacing=spacing,
            sampler_options=sampler_options,
            spacing_options=spacing_options,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            size=size,
            clip_skip=clip_skip,
            chunks=chunks,
            tile=tile,
        )
        settings = replace(self.settings, **{k: v for k, v in chosen.items() if v is not None})  # type: ignore[arg-type]
        items = items_of(prompts, negative, seeds, settings.guidance if guidance is None else guidance, image, mask)
        if image is None and strength is not None:
            raise ValueError(f"strength is {strength}, but there is no image to start from: give one, or no strength")
        strength = STRENGTH if strength is None and image is not None else strength
        self._check(items, settings, batch_size)
        for remark in self._remarks(items, settings):
            warnings.warn(remark, stacklevel=3)  # 3: no_grad's wrapper lies between
        grid = self._grid(settings, strength)
        starts = range(0, len(items), batch_size)
        walked = len(grid.points) - 1
        images, told = [], []
        for index, start in enumerate(starts):
            batch = items[start : start + batch_size]
            images.append(self._draw(batch, settings, grid, _counter(on_step, index * walked, walked * len(starts))))
            told += [_record(settings, strength, batch, position) for position in range(len(batch))]
        return Result(torch.cat(images), told)

    def _remarks(self, items: list[Item], settings: Settings) -> list[str]:
        texts = list(dict.fromkeys([item.prompt for item in items] + [item.negative for item in items]))
        found = remarks.of_text(self.tokenizer, self.text_encoder, texts, settings.chunks)
        return list(dict.fromkeys([*found, *remarks.of_sizes(items, settings.size)]))

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def multiple(self) -> int:
        """Of which a picture's height and width must be multiples; the UNet itself takes latents of any size."""
        return self.first_stage.factor

    def _check(self, items: list[Item], settings: Settings, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be 1 or more")
        height, width = settings.size
        if height < 1 or width < 1 or height % self.multiple or width % self.multiple:
            raise ValueError(
                f"size is {height}x{width}, but this model draws heights and widths that are multiples of "
                f"{self.multiple}"
            )
        if settings.chunks < 1:
            raise ValueError(f"chunks is {settings.chunks}, but must be 1 or more")
        self.text_encoder.layers(settings.clip_skip)
        self.first_stage.check_tile(settings.tile)
        _refuse(
            contradictions(
                Setup(
                    self.denoiser.schedule,
                    self.denoiser.prediction,
                    sampler=settings.sampler,
                    spacing=settings.spacing,
                    steps=settings.steps,
                    sampler_options=settings.sampler_options,
                    spacing_options=settings.spacing_options,
                    guidance=next((item.guidance for item in items if item.guidance != 1), 1.0),
                    interval=settings.guidance_interval,
                )
            )
        )

    def _grid(self, settings: Settings, strength: float | None) -> Grid:
        """The whole walk, or its end where the strength of a change to a picture is given."""
        schedule = self.denoiser.schedule
        times = spacing_of(settings.spacing, settings.spacing_options)(schedule, settings.steps)
        return Grid.of(schedule, times if strength is None else times[-steps_walked(len(times), strength) :])

    def _draw(self, items: list[Item], settings: Settings, grid: Grid, on_step: OnStep | None) -> Tensor:
        ids = torch.tensor([item.seed for item in items], device=self.device)
        factor = self.first_stage.factor
        shape = (self.first_stage.latent_channels, settings.size[0] // factor, settings.size[1] // factor)

        def noise(draw: int) -> Tensor:
            return normal(0, "step noise", ids, draw, shape)

        denoise, x0 = self._guided(items, settings), None
        originals, masks = originals_of(items, settings.size, self.device)
        if originals is not None:
            x0 = self.first_stage.encode(from_uint8(originals), tile=settings.tile)
            denoise = denoise if masks is None else keeping(denoise, x0, latent_mask(masks, factor))
        x = grid.start(normal(0, "initial noise", ids, 0, shape), x0)
        x = sample(solver_of(settings.sampler, settings.sampler_options), denoise, x, grid, noise, on_step)
        drawn = to_uint8(self.first_stage.decode(x, settings.tile))
        return (drawn if originals is None or masks is None else paste(drawn, originals, masks)).cpu()

    def _guided(self, items: list[Item], settings: Settings) -> Denoise:
        negatives = list(dict.fromkeys(item.negative for item in items))
        context = self._context([*(item.prompt for item in items), *negatives], settings)  # (b + …, chunks·n, d)
        negative = context[len(items) :][[negatives.index(item.negative) for item in items]]
        scales = [item.guidance for item in items]
        scale = scales[0] if len(set(scales)) == 1 else torch.tensor(scales, device=self.device)
        interval = settings.guidance_interval and times_of(self.denoiser.schedule, settings.guidance_interval)
        return classifier_free(
            self.denoiser, context[: len(items)], negative, scale, interval, rescale=settings.guidance_rescale
        )

    def _context(self, captions: list[str], settings: Settings) -> Tensor:
        tokens = self.tokenizer(captions, settings.chunks).to(self.device)  # (b, chunks·n)
        states = self.text_encoder(tokens.unflatten(1, (settings.chunks, -1)).flatten(0, 1), settings.clip_skip)
        return states.unflatten(0, (len(captions), -1)).flatten(1, 2)  # (b, chunks·n, d)

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


def _record(settings: Settings, strength: float | None, batch: list[Item], position: int) -> dict[str, Any]:
    """Names the batch too: in another one convolutions round differently, so not every bit comes again."""
    item = batch[position]
    varied = {name: [getattr(one, name) for one in batch] for name in ("negative", "guidance")}
    varied = {name: values for name, values in varied.items() if len(set(values)) > 1}
    beside = {"prompts": [one.prompt for one in batch], "seeds": [one.seed for one in batch], "position": position}
    own = {"prompt": item.prompt, "negative": item.negative, "seed": item.seed}
    drawn = asdict(settings) | {"guidance": item.guidance, "size": list(settings.size)}
    return own | drawn | ({"strength": strength} if strength else {}) | {"batch": beside | varied}


def _counter(on_step: OnStep | None, done: int, total: int) -> OnStep | None:
    return None if on_step is None else lambda step, _steps: on_step(done + step + 1, total)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))
