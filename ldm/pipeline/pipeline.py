"""Prompts → pictures, from noise or from other pictures."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ldm.conditioning import Conditioning
from ldm.device import choose_device
from ldm.diffusion.denoiser import Denoise, Denoiser, Network
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule, from_config
from ldm.execution.compiling import compiled
from ldm.execution.cpu_packing import can_pack, pack
from ldm.execution.offload import Offload, in_batches
from ldm.image import from_uint8, to_uint8
from ldm.nn.backbone import Backbone, check_inputs, check_size
from ldm.nn.inpainting import INPAINTING, inpainting_hint
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.vae import VAE
from ldm.pipeline.input_warnings import remarks_of
from ldm.pipeline.inputs import Between, Each, Item, Picture, items_of
from ldm.pipeline.prompts import conditionings_of, guided
from ldm.pipeline.seed_noise import START, noise_of
from ldm.pipeline.settings import Changes, Settings, batch_record
from ldm.pipeline.source_images import STRENGTH, keeping, latent_mask, originals_of, paste, steps_of
from ldm.sampling.compatibility import Setup, check
from ldm.sampling.driver import sample, solver_of
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import spacing_of
from ldm.sampling.thresholding import thresholding_of
from ldm.weights.adapters.merging import Given as AdapterFile
from ldm.weights.adapters.merging import merge_files
from ldm.weights.adapters.reader import networks_of
from ldm.weights.adapters.textual_inversion import Given as EmbeddingFile
from ldm.weights.adapters.textual_inversion import add_embedding
from ldm.weights.find import DEFAULT
from ldm.weights.model import Model, read_model

PREVIEW = 16  # latents on a side, which take a sixteenth of the time of Stable Diffusion's 64
OnStep = Callable[[int, int], None]
OnEstimate = Callable[[int, int, Tensor], None]
OnRemark = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """Pictures uint8 (n, 3, h, w) on the CPU, and for each the settings (beside image and mask) to draw it again."""

    images: Tensor
    settings: list[dict[str, Any]]


class Pipeline:
    """Samples images from prompts.

    The networks have the dtype, and unless `offload` says otherwise the device, that they run in. `settings` are the
    defaults of each call. With a `weak` pipeline, of a worse model of the same data, guidance leads away from the weak
    network's estimate for the same prompt instead of from the negative prompt's. A network that reads the hint
    "inpainting" is given the mask and the latents of the masked image. Raises ValueError for parts that do not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        first_stage: VAE,
        text_encoder: TextEncoder,
        schedule: Schedule,
        prediction: Prediction,
        settings: Settings,
        time: str | None = None,
        weak: "Pipeline | None" = None,
        offload: Offload | None = None,
        compile: bool = False,
    ) -> None:
        check_inputs(backbone, first_stage.latent_channels, text_encoder.widths)
        self.backbone, self.first_stage, self.text_encoder = backbone, first_stage, text_encoder
        self.settings, self.weak = settings, weak
        self.offload = offload or Offload(backbone.device)
        self._run: Network = compiled(backbone, self.offload) if compile else backbone
        self.denoiser = Denoiser(self._network, schedule, prediction, time)
        self.inpaints = INPAINTING in backbone.reads
        check(Setup(schedule, prediction, time=self.denoiser.time))

    @classmethod
    def load(
        cls,
        path: str = DEFAULT,
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        offload: str = "none",
        weak: str | None = None,
        compile: bool = False,
        adapters: Sequence[AdapterFile] = (),
        embeddings: Sequence[EmbeddingFile] = (),
    ) -> "Pipeline":
        """The model at `path`, see `read_model`; in `dtype` but for a first stage in float16, where it would overflow.

        float32 is for numbers to compare; bfloat16 is sample.py's choice where the processor has it, and faster there.
        `offload` is a mode of `Offload`, `weak` the path of a worse model, and `compile` compiles the denoising
        network, see `compiled`. `adapters` are files, or pairs of a file and its weight, that are merged into the
        networks, see `merge_files`; `embeddings` are files of textual inversions, or pairs of a file and the token that
        stands for it. Nothing has gradients.
        """
        working = Offload(choose_device(device), offload)
        read = partial(read_model, dtype=dtype, device=working.home, channels_last=True)
        model = read(path, dtype=None) if adapters else read(path)  # so that merged weights are rounded once
        if adapters:
            merge_files(networks_of(model.backbone, model.text_encoder.network), adapters)
            model.backbone.to(dtype)
        for embedding in embeddings:
            add_embedding(model.text_encoder.network, embedding)
        stage = model.first_stage.network.to(working.home, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for layers in stage.children() if dtype != torch.float16 else ():  # its scale stays in float32
            layers.to(dtype)
        text = model.text_encoder.network.to(working.home, dtype)
        for frozen in stage, text:
            frozen.requires_grad_(False)

        def assembled(one: Model, weak: Pipeline | None = None) -> Pipeline:
            about = one.about["model"]
            schedule, prediction = from_config(about["schedule"]), Prediction(about["prediction"])
            settings = Settings(size=tuple(about["size"]), **about["sampling"])
            one.backbone.requires_grad_(False)
            if can_pack(working.device, dtype) and not compile:
                pack(one.backbone)
            parts = one.backbone, stage, text, schedule, prediction, settings, about["time"]
            return cls(*parts, weak, working, compile)

        if weak is None:
            return assembled(model)
        worse = read(weak)
        _check_weak(model, worse)
        return assembled(model, assembled(worse))

    @property
    def device(self) -> torch.device:
        return self.offload.device

    @torch.no_grad()
    def __call__(
        self,
        prompts: Each[str | Between[str]],
        negative: Each[str] = "",
        image: Each[Picture] | Tensor | None = None,
        mask: Each[Picture] | Tensor | None = None,
        strength: float | None = None,
        guidance: Each[float] | None = None,
        seeds: Each[int | Between[int]] | None = None,
        batch_size: int = 8,
        on_step: OnStep | None = None,
        on_estimate: OnEstimate | None = None,
        on_remark: OnRemark | None = None,
        cancelled: Callable[[], bool] | None = None,
        **changes: Unpack[Changes],
    ) -> Result:
        """One picture a prompt; the prompt and its seed decide it, in float32 to 1/255, at any batch size.

        With an `image` they start from it, scaled and cropped to the size, and take the last int(strength · steps)
        steps only (0.8 of them by default; all with inpainting weights). With a `mask` they differ from it only where
        that is white. Prompts, negatives, guidance scales, seeds, images and masks are one for all, or a list with one
        a picture; a prompt or seed may lie `Between` two. Seeds are 0, 1, … by default. `changes` are those of the
        `Settings`, such as steps=30 or sampler="ddim"; what is left out or None is the model's own, whose options go
        with its own sampler, spacing and thresholding only. Where memory does not suffice for `batch_size` pictures
        fewer are drawn at a time.

        `on_step(done, total)` counts the steps of all batches; `on_estimate(first, step, x0)` is given the estimates of
        a batch, whose first picture is that of the call, latents (b, z, h, w), see `small`; Cancelled is raised between
        two steps once `cancelled()` says so. `on_remark(text)`, or a warning, reports text that the text encoder cannot
        read, images that are scaled, and batches that are too large for the memory. Raises ValueError for what the
        model cannot draw with, MemoryError where one picture is too many.
        """
        settings = self.settings.changed(changes)
        items = items_of(prompts, negative, seeds, settings.guidance if guidance is None else guidance, image, mask)
        if image is None and strength is not None:
            raise ValueError(f"strength is {strength}, but there is no image to start from: give one, or no strength")
        if strength is None and image is not None:
            strength = 1.0 if self.inpaints else STRENGTH
        self._check(settings, batch_size)
        for remark in remarks_of(items, settings.size, settings.chunks, self.text_encoder):
            (on_remark or partial(warnings.warn, stacklevel=3))(remark)  # 3: the caller of no_grad's wrapper

        def draw(batch: list[Item], first: int, done: int, batches: int) -> Tensor:
            step = on_step and (lambda step, steps: on_step(done * steps + step + 1, batches * steps))
            estimate = partial(on_estimate, first) if on_estimate else None
            walk = partial(sample, on_step=step, on_preview=estimate, cancelled=cancelled)
            return self._draw(batch, settings, strength, walk)

        images, records = [], []
        for batch, drawn in in_batches(items, batch_size, draw, on_remark or partial(warnings.warn, stacklevel=4)):
            images.append(drawn)
            records += [settings.record(item, strength) | batch_record(batch, k) for k, item in enumerate(batch)]
        return Result(torch.cat(images), records)

    def _draw(
        self, items: list[Item], settings: Settings, strength: float | None, walk: Callable[..., Tensor]
    ) -> Tensor:
        """Noise, or a noisy picture → latents, step by step → pixels."""
        factor = self.first_stage.factor
        shape = (self.first_stage.latent_channels, *(length // factor for length in settings.size))
        noise = noise_of(settings.noise, [item.seed for item in items], shape, self.device)
        originals, masks = originals_of(items, settings.size, self.device)
        denoise, x0 = self._denoise(items, settings, originals, masks), None
        if originals is not None and not (self.inpaints and strength == 1):
            x0 = self._encode(from_uint8(originals), settings)
            if masks is not None and not self.inpaints:
                denoise = keeping(denoise, x0, latent_mask(masks, factor))
        grid = self._grid(settings, strength)
        x = grid.start(noise(START), x0)
        with self.offload.using(self.backbone, *([] if self.weak is None else [self.weak.backbone])):
            x = walk(solver_of(settings.sampler, settings.sampler_options), denoise, x, grid, noise)
        with self.offload.using(self.first_stage):
            drawn = to_uint8(self.first_stage.decode(x, settings.tile))
        return (drawn if originals is None or masks is None else paste(drawn, originals, masks)).cpu()

    def _denoise(
        self, items: list[Item], settings: Settings, originals: Tensor | None, masks: Tensor | None
    ) -> Denoise:
        """Prompts → the network, guided by them; inpainting weights see the mask too, or that all is repainted."""
        encode = partial(self.text_encoder.encode, chunks=settings.chunks, skip=settings.clip_skip, device=self.device)
        with self.offload.using(self.text_encoder):
            conditionings = conditionings_of(items, encode)
        if self.inpaints:
            if originals is None:
                originals = torch.zeros(len(items), 3, *settings.size, dtype=torch.uint8, device=self.device)
            if masks is None:
                masks = torch.ones(len(items), 1, *settings.size, device=self.device)
            encode_image = partial(self._encode, settings=settings)
            hint = inpainting_hint(from_uint8(originals), masks, self.first_stage.factor, encode_image)
            positive, negative = conditionings
            conditionings = positive.with_hint(INPAINTING, hint), negative.with_hint(INPAINTING, hint)
        weak = None if self.weak is None else self.weak.denoiser
        return guided(self.denoiser, weak, conditionings, items, settings)

    def _grid(self, settings: Settings, strength: float | None) -> Grid:
        """The whole walk, or its end where the strength of a change to a picture is given."""
        schedule, spacing = self.denoiser.schedule, spacing_of(settings.spacing, settings.spacing_options)
        whole, walked = steps_of(settings.steps, strength, settings.fixed_steps)
        return Grid.of(schedule, spacing(schedule, whole)[-walked:])

    def _encode(self, pictures: Tensor, settings: Settings) -> Tensor:
        with self.offload.using(self.first_stage):
            return self.first_stage.encode(pictures, tile=settings.tile)

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self._run(x.to(self.backbone.dtype), time, conditioning)

    @torch.no_grad()
    def small(self, latents: Tensor) -> Tensor:
        """Previews uint8 (b, 3, h, w): what the decoder makes of latents averaged to at most PREVIEW on a side."""
        square = -(-max(latents.shape[2:]) // PREVIEW)
        with self.offload.using(self.first_stage):
            return to_uint8(self.first_stage.decode(avg_pool2d(latents, square, ceil_mode=True))).cpu()

    def _check(self, settings: Settings, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be 1 or more")
        for backbone in (self.backbone, *([] if self.weak is None else [self.weak.backbone])):
            check_size(backbone, self.first_stage.factor, settings.size)
        if settings.chunks < 1:
            raise ValueError(f"chunks is {settings.chunks}, but must be 1 or more")
        self.text_encoder.check_skip(settings.clip_skip)
        self.first_stage.check_tile(settings.tile)
        thresholding_of(settings.thresholding, settings.thresholding_options)
        check(Setup(self.denoiser.schedule, self.denoiser.prediction, sampling=asdict(settings)))


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
        "conditioning": model.backbone.reads,
        "number of latent channels": model.backbone.latent_channels,
    }
