"""Prompts → pictures, from noise or from other pictures."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ldm import remarks
from ldm.diffusion.denoiser import Conditional, Denoise, Denoiser
from ldm.diffusion.guidance import autoguidance, classifier_free, times_of
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule, from_config
from ldm.editing import STRENGTH, keeping, latent_mask, originals_of, paste, small_mask, steps_of, unmasked
from ldm.image import from_uint8, to_uint8
from ldm.items import Between, Each, Item, Picture, ends, items_of
from ldm.lint import Setup, check
from ldm.memory import Offload, choose_device, in_batches
from ldm.nn.clip import TextTower
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.noise import START, noise_of
from ldm.sampling.driver import sample, solver_of
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import spacing_of
from ldm.sampling.thresholding import thresholding_of
from ldm.settings import Settings, plain
from ldm.weights.find import DEFAULT
from ldm.weights.model import Model, read_model

PREVIEW = 16  # latents on a side, which take a sixteenth of the time of Stable Diffusion's 64
OnStep = Callable[[int, int], None]
OnEstimate = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Result:
    """Pictures uint8 (n, 3, h, w) on the CPU, and for each the settings (beside image and mask) to draw it again."""

    images: Tensor
    settings: list[dict[str, Any]]


class Pipeline:
    """Draws prompts with networks that already are of the type that they shall run in.

    They are also where they shall run, unless `offload` says otherwise. `settings` are what a call uses unless it says
    otherwise. With a `weak` pipeline, of a worse model of the same data, guidance leads away from what its UNet gives
    for the same prompt, instead of from the negative one. A UNet of 2z + 1 channels is taken for inpainting weights:
    it sees the mask and the latents of what is kept. Raises ValueError for parts that do not fit.
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
        weak: "Pipeline | None" = None,
        offload: Offload | None = None,
    ) -> None:
        self.unet, self.first_stage, self.text_encoder = unet, first_stage, text_encoder
        self.tokenizer, self.settings, self.weak = tokenizer, settings, weak
        self.offload = offload or Offload(unet.conv_in.weight.device)
        self.denoiser = Denoiser(self._network, schedule, prediction, time)
        latents, channels = first_stage.latent_channels, unet.config["in_channels"]
        self.inpaints = channels == 2 * latents + 1
        check(
            Setup(
                schedule,
                prediction,
                time=self.denoiser.time,
                given=(text_encoder.config["width"], channels if self.inpaints else latents),
                taken=(unet.config["context_width"], channels),
            )
        )

    @classmethod
    def load(
        cls,
        path: str = DEFAULT,
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        offload: str = "none",
        weak: str | None = None,
    ) -> "Pipeline":
        """The model at `path`, see `read_model`; `offload` is a mode of `Offload`, `weak` the path of a worse model."""
        home: str | torch.device = choose_device(device) if offload == "none" else "cpu"
        models = [read_model(one, dtype, device=home, channels_last=True) for one in (path, weak) if one is not None]
        return cls.of(models[0], device, dtype, offload, *models[1:])

    @classmethod
    def of(
        cls,
        model: Model,
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        offload: str = "none",
        weak: Model | None = None,
    ) -> "Pipeline":
        """`model` for the device; its UNet and text encoder in `dtype`, its first stage in float32."""
        working = Offload(choose_device(device), offload)
        home = working.device if offload == "none" else torch.device("cpu")
        last = torch.channels_last
        stage = model.first_stage.network.to(home, memory_format=last)  # type: ignore[call-overload]
        text = model.text_encoder.network.to(home, dtype)

        def assembled(one: Model, weak: Pipeline | None) -> Pipeline:
            about = one.about["model"]
            return cls(
                unet=one.unet.to(home, dtype, memory_format=last),  # type: ignore[call-overload]
                first_stage=stage,
                text_encoder=text,
                tokenizer=model.text_encoder.tokenizer,
                schedule=from_config(about["schedule"]),
                prediction=Prediction(about["prediction"]),
                settings=Settings(size=tuple(about["size"]), **about["sampling"]),
                time=about["time"],
                weak=weak,
                offload=working,
            )

        if weak is None:
            return assembled(model, None)
        _check_weak(model, weak)
        return assembled(model, assembled(weak, None))

    @torch.no_grad()
    def __call__(
        self,
        prompts: Each[str | Between[str]],
        negative: Each[str] = "",
        image: Each[Picture] | Tensor | None = None,
        mask: Each[Picture] | Tensor | None = None,
        strength: float | None = None,
        steps: int | None = None,
        fixed_steps: bool | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        spacing_options: Mapping[str, Any] | None = None,
        guidance: Each[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        thresholding: str | None = None,
        thresholding_options: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        chunks: int | None = None,
        tile: int | None = None,
        noise: str | None = None,
        seeds: Each[int | Between[int]] | None = None,
        batch_size: int = 8,
        on_step: OnStep | None = None,
        on_estimate: OnEstimate | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Result:
        """One picture a prompt; the prompt and its seed decide it, to 1/255, at any batch size.

        With an `image` they start from it, scaled and cropped to the size, and take the last int(strength · steps)
        steps only (0.8 of them by default; all with inpainting weights). With a `mask` they differ from it only where
        that is white. Prompts, negatives, guidance scales, seeds, images and masks are one for all, or a list with one
        a picture; a prompt or seed may lie `Between` two. What is None is the model's own; its options go with its own
        sampler, spacing and thresholding only. Seeds are 0, 1, … by default. Where memory does not suffice for
        `batch_size` pictures fewer are drawn at a time.

        `on_step(done, total)` counts the steps of all batches; `on_estimate(first, step, x0)` is given the estimates of
        a batch, whose first picture is that of the call, latents (b, z, h, w), see `small`; Cancelled is raised between
        two steps once `cancelled()` says so. Warns of text that the text encoder cannot read and of pictures that are
        scaled. Raises ValueError for what the model cannot draw with, MemoryError where one picture is too many.
        """
        settings = self.settings.changed(
            {
                "size": size,
                "sampler": sampler,
                "spacing": spacing,
                "steps": steps,
                "fixed_steps": fixed_steps,
                "sampler_options": sampler_options,
                "spacing_options": spacing_options,
                "guidance_interval": guidance_interval,
                "guidance_rescale": guidance_rescale,
                "thresholding": thresholding,
                "thresholding_options": thresholding_options,
                "clip_skip": clip_skip,
                "chunks": chunks,
                "tile": tile,
                "noise": noise,
            }
        )
        items = items_of(prompts, negative, seeds, settings.guidance if guidance is None else guidance, image, mask)
        if image is None and strength is not None:
            raise ValueError(f"strength is {strength}, but there is no image to start from: give one, or no strength")
        if strength is None and image is not None:
            strength = 1.0 if self.inpaints else STRENGTH
        self._check(settings, batch_size)
        for remark in self._remarks(items, settings):
            warnings.warn(remark, stacklevel=3)  # 3: no_grad's wrapper lies between

        def draw(batch: list[Item], first: int, done: int, batches: int) -> Tensor:
            step = on_step and (lambda step, steps: on_step(done * steps + step + 1, batches * steps))
            estimate = partial(on_estimate, first) if on_estimate else None
            return self._draw(batch, settings, strength, step, estimate, cancelled)

        images, records = [], []
        for batch, drawn in in_batches(items, batch_size, draw):
            images.append(drawn)
            records += [settings.record(item, strength) | _batch_record(batch, k) for k, item in enumerate(batch)]
        return Result(torch.cat(images), records)

    def _remarks(self, items: list[Item], settings: Settings) -> list[str]:
        prompts, others, _ = ends([item.prompt for item in items])
        texts = list(dict.fromkeys(prompts + others + [item.negative for item in items]))
        found = remarks.of_text(self.tokenizer, self.text_encoder, texts, settings.chunks)
        return list(dict.fromkeys([*found, *remarks.of_sizes(items, settings.size)]))

    @property
    def device(self) -> torch.device:
        return self.offload.device

    @property
    def multiple(self) -> int:
        """Of which a picture's height and width must be multiples; the UNet itself takes latents of any size."""
        return self.first_stage.factor

    def _check(self, settings: Settings, batch_size: int) -> None:
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
        thresholding_of(settings.thresholding, settings.thresholding_options)
        check(Setup(self.denoiser.schedule, self.denoiser.prediction, sampling=asdict(settings)))

    def _grid(self, settings: Settings, strength: float | None) -> Grid:
        """The whole walk, or its end where the strength of a change to a picture is given."""
        schedule, spacing = self.denoiser.schedule, spacing_of(settings.spacing, settings.spacing_options)
        whole, walked = steps_of(settings.steps, strength, settings.fixed_steps)
        return Grid.of(schedule, spacing(schedule, whole)[-walked:])

    def _draw(
        self,
        items: list[Item],
        settings: Settings,
        strength: float | None,
        on_step: Callable[[int, int], object] | None,
        on_estimate: Callable[[int, Tensor], object] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Tensor:
        grid, factor = self._grid(settings, strength), self.multiple
        shape = (self.first_stage.latent_channels, settings.size[0] // factor, settings.size[1] // factor)
        noise = noise_of(settings.noise, [item.seed for item in items], shape, self.device)
        originals, masks = originals_of(items, settings.size, self.device)
        denoise, x0 = self._guided(items, settings, self._hint(len(items), originals, masks, settings)), None
        if originals is not None and not (self.inpaints and strength == 1):
            with self.offload.using(self.first_stage):
                x0 = self.first_stage.encode(from_uint8(originals), tile=settings.tile)
            if masks is not None and not self.inpaints:
                denoise = keeping(denoise, x0, latent_mask(masks, factor))
        x = grid.start(noise(START), x0)
        solver = solver_of(settings.sampler, settings.sampler_options)
        with self.offload.using(self.unet, *([] if self.weak is None else [self.weak.unet])):
            x = sample(solver, denoise, x, grid, noise, on_step, on_estimate, cancelled=cancelled)
        with self.offload.using(self.first_stage):
            drawn = to_uint8(self.first_stage.decode(x, settings.tile))
        return (drawn if originals is None or masks is None else paste(drawn, originals, masks)).cpu()

    def _hint(self, count: int, originals: Tensor | None, masks: Tensor | None, settings: Settings) -> Tensor | None:
        """What inpainting weights see beside x (b, 1 + z, h, w); without a mask all is repainted."""
        if not self.inpaints:
            return None
        if originals is None:
            originals = torch.zeros(count, 3, *settings.size, dtype=torch.uint8, device=self.device)
        if masks is None:
            masks = torch.ones(count, 1, *settings.size, device=self.device)
        with self.offload.using(self.first_stage):
            seen = self.first_stage.encode(unmasked(originals, masks), tile=settings.tile)
        return torch.cat((small_mask(masks, self.multiple), seen), dim=1)

    def _guided(self, items: list[Item], settings: Settings, hint: Tensor | None) -> Denoise:
        negatives = list(dict.fromkeys(item.negative for item in items))
        prompts, others, shares = ends([item.prompt for item in items])
        context = self._context(prompts + negatives, settings)  # (b + …, chunks·n, d)
        positive, scales = context[: len(items)], [item.guidance for item in items]
        if any(shares):
            share = torch.tensor(shares, device=self.device).view(-1, 1, 1)
            positive = torch.lerp(positive, self._context(others, settings), share.to(positive.dtype))
        scale = scales[0] if len(set(scales)) == 1 else torch.tensor(scales, device=self.device)
        interval = settings.guidance_interval and times_of(self.denoiser.schedule, settings.guidance_interval)
        denoiser = self._seeing(hint)
        if self.weak is None:
            negative = context[len(items) :][[negatives.index(item.negative) for item in items]]
            guided = classifier_free(denoiser, positive, negative, scale, interval, rescale=settings.guidance_rescale)
        else:
            strong, weak = (_bound(one, positive) for one in (denoiser, self.weak._seeing(hint)))
            guided = autoguidance(strong, weak, scale, interval, settings.guidance_rescale)
        return thresholding_of(settings.thresholding, settings.thresholding_options)(guided)

    def _seeing(self, hint: Tensor | None) -> Denoiser:
        if hint is None:
            return self.denoiser

        def network(x: Tensor, time: Tensor, context: Tensor) -> Tensor:
            return self._network(torch.cat((x, hint.repeat(len(x) // len(hint), 1, 1, 1)), dim=1), time, context)

        return Denoiser(network, self.denoiser.schedule, self.denoiser.prediction, self.denoiser.time)

    def _context(self, captions: list[str], settings: Settings) -> Tensor:
        tokens = self.tokenizer(captions, settings.chunks).to(self.device)  # (b, chunks·n)
        with self.offload.using(self.text_encoder):
            states = self.text_encoder(tokens.unflatten(1, (settings.chunks, -1)).flatten(0, 1), settings.clip_skip)
        return states.unflatten(0, (len(captions), -1)).flatten(1, 2)  # (b, chunks·n, d)

    def _network(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.unet(x.to(self.unet.conv_in.weight.dtype), time, context)

    @torch.no_grad()
    def small(self, latents: Tensor) -> Tensor:
        """Previews uint8 (b, 3, h, w): what the decoder makes of latents averaged to at most PREVIEW on a side."""
        square = -(-max(latents.shape[2:]) // PREVIEW)
        with self.offload.using(self.first_stage):
            return to_uint8(self.first_stage.decode(avg_pool2d(latents, square, ceil_mode=True))).cpu()


def _bound(denoiser: Conditional, context: Tensor) -> Denoise:
    return lambda x, t: denoiser(x, t, context)


def _batch_record(batch: list[Item], position: int) -> dict[str, Any]:
    """The batch decides a picture's every bit: in another one convolutions round differently."""
    varied = {name: [getattr(one, name) for one in batch] for name in ("negative", "guidance")}
    varied = {name: values for name, values in varied.items() if len(set(values)) > 1}
    each = {"prompts": [plain(one.prompt) for one in batch], "seeds": [plain(one.seed) for one in batch]}
    return {"batch": each | {"position": position} | varied}


def _check_weak(model: Model, weak: Model) -> None:
    """Raises ValueError for a weak model that does not know the same noisy latents and prompts."""
    for name, facts in _facts(model).items():
        if _facts(weak)[name] != facts:
            raise ValueError(
                f"the weak model {weak.source} has another {name} than {model.source}: give one that has the same"
            )


def _facts(model: Model) -> dict[str, Any]:
    about = model.about["model"]
    return {
        "schedule": about["schedule"],
        "first stage": about["first_stage"]["fingerprint"],
        "text encoder": about["text_encoder"]["fingerprint"],
        "number of input channels": model.unet.config["in_channels"],
    }
