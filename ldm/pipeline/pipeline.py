"""Samples images from prompts: text-to-image, image-to-image and inpainting."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ldm.conditioning import Conditioning
from ldm.device import DTYPES, choose_device
from ldm.diffusion.denoiser import Denoise, Denoiser, Network
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule, from_config
from ldm.execution.compiling import compiled
from ldm.execution.cpu_packing import can_pack, pack, unpack
from ldm.execution.offload import Offload, in_batches
from ldm.image import from_uint8, to_pil, to_uint8
from ldm.nn.backbone import Backbone, check_inputs, check_size
from ldm.nn.inpainting import INPAINTING, inpainting_hint
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.vae import VAE
from ldm.pipeline.emphasis import chunk_count
from ldm.pipeline.input_warnings import input_warnings
from ldm.pipeline.inputs import Between, ImageInput, ImageRequest, OneOrEach, image_requests, prompt_texts
from ldm.pipeline.loading import Added, Contents, Source, place_frozen
from ldm.pipeline.loras import TaggedRequest, read_tags
from ldm.pipeline.prompts import SYNTAXES, encode_prompts, guided, prompt_encoder
from ldm.pipeline.seed_noise import INITIAL, seed_noise
from ldm.pipeline.settings import Settings, SettingsOverrides, batch_record, model_settings
from ldm.pipeline.source_images import STRENGTH, keep_unmasked, latent_mask, paste, source_tensors, step_counts
from ldm.sampling.compatibility import Setup, check
from ldm.sampling.driver import get_solver, sample
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import get_spacing
from ldm.sampling.thresholding import get_thresholding
from ldm.synonyms.calls import takes_synonyms
from ldm.weights.adapters.merging import Given as AdapterFile
from ldm.weights.adapters.textual_inversion import Given as EmbeddingFile
from ldm.weights.model import Model, read_model
from ldm.weights.recognise import DEFAULT

PREVIEW = 16  # latents per side; decoding them takes a sixteenth of the time of Stable Diffusion's 64
OnStep = Callable[[int, int], None]
OnEstimate = Callable[[int, int, Tensor], None]
OnWarning = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """Images, uint8 (n, 3, h, w) on the CPU, and the settings that reproduce each, given the same image and mask.

    `batch_size` is as requested, or smaller if a batch was out of memory.
    """

    images: Tensor
    settings: list[dict[str, Any]]
    batch_size: int

    @property
    def pil(self) -> list[Image.Image]:
        """The images as PIL images."""
        return to_pil(self.images)

    def __repr__(self) -> str:
        count, _, height, width = self.images.shape
        return f"Result({count} image{'s' if count > 1 else ''} of {height}x{width})"


class Pipeline:
    """Samples images from prompts.

    The networks must already have the dtype and, without `offload`, the device that they run in. `settings` are the
    defaults of each call. With a `weak` pipeline, of a worse model of the same data, guidance extrapolates away from
    the weak network's estimate for the same prompt instead of the estimate for the negative prompt (autoguidance). A
    network that reads the hint "inpainting" is given the mask and the latents of the masked image. `contents` reads the
    networks again when adapters change. Raises ValueError for incompatible components.
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
        contents: Contents | None = None,
    ) -> None:
        check_inputs(backbone, first_stage.latent_channels, text_encoder.widths)
        self.backbone, self.first_stage, self.text_encoder = backbone, first_stage, text_encoder
        self.settings, self.weak = settings, weak
        self.offload = offload or Offload(backbone.device)
        self._run: Network = compiled(backbone, self.offload) if compile else backbone
        self.denoiser = Denoiser(self._network, schedule, prediction, time)
        self.inpaints, self._contents = INPAINTING in backbone.reads, contents
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
        lora_dir: str | Path | None = None,
    ) -> "Pipeline":
        """Loads the model at `path`, see `read_model`, in `dtype`, without gradients.

        With float16 the first stage stays in float32, because it would overflow. float32 makes metrics comparable;
        bfloat16, which sample.py chooses where the processor supports it, is faster there. `offload` is a mode of
        `Offload`, `weak` the path of a worse model, and `compile` compiles the denoising network, see `compiled`.
        `adapters` are files, or pairs of a file and its weight, to merge into the networks, see `merge_files`;
        `embeddings` are files of textual inversions, or pairs of a file and the token that stands for it. With
        prompt_syntax="a1111", tags in prompts such as <lora:NAME:0.8> name files in `lora_dir`, see `LoraFolder`.
        """
        offloading = Offload(choose_device(device), offload)
        source, added = Source(path, dtype, offloading.idle_device), Added(tuple(adapters), tuple(embeddings))
        contents, model = Contents(source, added, lora_dir), source.read(added)
        stage, text = model.first_stage.network, model.text_encoder.network

        def assemble(model: Model, weak: Pipeline | None = None, contents: Contents | None = None) -> Pipeline:
            about = model.about["model"]
            schedule, prediction = from_config(about["schedule"]), Prediction(about["prediction"])
            settings = model_settings(about, model.source)
            if can_pack(offloading.device, dtype) and not compile:
                pack(model.backbone)
            components = model.backbone, stage, text, schedule, prediction, settings, about["time"]
            return cls(*components, weak, offloading, compile, contents)

        if weak is None:
            return assemble(model, None, contents)
        weak_model = read_model(weak, dtype, device=offloading.idle_device, channels_last=True)
        weak_model.backbone.requires_grad_(False)
        _check_weak(model, weak_model)
        return assemble(model, assemble(weak_model), contents)

    def use(self, adapters: Sequence[AdapterFile] = (), embeddings: Sequence[EmbeddingFile] = ()) -> None:
        """Replaces the adapters and textual inversions of `load`, as if the model had been loaded with these.

        Raises FileNotFoundError or ValueError for an unsuitable file, and then changes nothing.
        """
        if self._contents is None:
            raise ValueError("this pipeline was not loaded from a file, so that its adapters cannot be replaced")
        self._take(self._contents.replace(Added(tuple(adapters), tuple(embeddings))))

    @property
    def outdated(self) -> bool:
        """Whether the model has changed on the disk since it was loaded."""
        return self._contents is not None and self._contents.outdated

    def _take(self, model: Model | None) -> None:
        """Takes over the weights of a model; the denoising network stays the same object, packed or compiled."""
        if model is not None:
            self.backbone.load_state_dict(model.backbone.state_dict())
            self.text_encoder = model.text_encoder.network

    @property
    def device(self) -> torch.device:
        return self.offload.device

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "Pipeline":
        """Moves the networks to the device, casts them to the dtype, and returns the pipeline itself.

        Like torch's `to`, it takes a device, a dtype or both. Casting to a shorter dtype loses digits for good; with
        float16 the first stage is kept in float32. Raises ValueError for devices and dtypes that are not available.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        dtype = self.backbone.dtype if dtype is None else dtype
        if dtype not in DTYPES.values():
            raise ValueError(f"the dtype is {dtype}, but must be one of {', '.join(map(str, DTYPES.values()))}")
        chosen = self.device if device is None else choose_device(str(device))
        self.offload = Offload(chosen, self.offload.mode)
        place_frozen(self.first_stage, self.text_encoder, self.offload.idle_device, dtype)
        for pipeline in (self, *([] if self.weak is None else [self.weak])):
            pipeline.offload = self.offload
            unpack(pipeline.backbone)
            pipeline.backbone.to(self.offload.idle_device, dtype)
            if can_pack(self.device, dtype) and pipeline._run is pipeline.backbone:
                pack(pipeline.backbone)
        if self._contents is not None:
            self._contents.move(self.offload.idle_device, dtype)
        return self

    def __repr__(self) -> str:
        settings, count = self.settings, sum(tensor.numel() for tensor in self.backbone.state_dict().values())
        height, width = settings.size
        dtype = str(self.backbone.dtype).removeprefix("torch.")
        return (
            f"Pipeline({type(self.backbone).__name__} of {count / 1e6:.1f} M parameters, {height}x{width}, "
            f"{dtype} on {self.device}, schedule={self.denoiser.schedule.name}, "
            f"prediction={self.denoiser.prediction.name}, sampler={settings.sampler}, steps={settings.steps}, "
            f"guidance={settings.guidance:g})"
        )

    @takes_synonyms
    @torch.no_grad()
    def __call__(
        self,
        prompts: OneOrEach[str | Between[str]],
        negative: OneOrEach[str] = "",
        image: OneOrEach[ImageInput] | Tensor | None = None,
        mask: OneOrEach[ImageInput] | Tensor | None = None,
        strength: float | None = None,
        guidance: OneOrEach[float] | None = None,
        seeds: OneOrEach[int | Between[int]] | None = None,
        batch_size: int = 8,
        on_step: OnStep | None = None,
        on_estimate: OnEstimate | None = None,
        on_warning: OnWarning | None = None,
        cancelled: Callable[[], bool] | None = None,
        **overrides: Unpack[SettingsOverrides],
    ) -> Result:
        """Samples one image per prompt. Prompt and seed determine it, in float32 to 1/255, at any batch size.

        With an `image`, sampling starts from it, scaled and cropped to the size, and runs only the last
        int(strength · steps) steps (strength 0.8 by default, 1 with inpainting weights). With a `mask`, the result
        differs from the image only where the mask is white. Prompts, negatives, guidance scales, seeds, images and
        masks are one value for all images or a list with one for each; a prompt or seed may be `Between` two. Seeds
        default to 0, 1, …. `overrides` are fields of `Settings`, such as steps=30 or sampler="ddim"; those left out or
        None are the model's own, whose options apply only with its own sampler, spacing and thresholding. Names of
        diffusers, such as num_inference_steps, are taken for these with a warning. Out of memory, smaller batches than
        `batch_size` are sampled.

        `on_step(done, total)` counts the steps of all batches. `on_estimate(first, step, x0)` receives the estimates of
        a batch, latents (b, z, h, w), see `decode_preview`; `first` is the index of its first image. Once `cancelled()`
        returns True, Cancelled is raised between two steps. `on_warning(text)`, by default `warnings.warn`, reports
        text that the text encoder cannot read, resized images, and batches that are out of memory. Raises ValueError
        for inputs that the model cannot use, and MemoryError if a single image is out of memory.
        """
        settings = self.settings.overridden(overrides)
        guidance = settings.guidance if guidance is None else guidance
        requests = image_requests(prompts, negative, seeds, guidance, image, mask)
        if image is None and strength is not None:
            raise ValueError(f"strength is {strength}, but there is no image to start from: give one, or no strength")
        if strength is None and image is not None:
            strength = 1.0 if self.inpaints else STRENGTH
        warn_caller = on_warning or partial(warnings.warn, stacklevel=4)  # 4: the caller of both wrappers
        self._check(settings, batch_size, warn_caller)
        settings, tagged = self._parsed(settings, requests)
        plain = [one.plain for one in tagged]
        for message in input_warnings(plain, settings, self.text_encoder, self.settings.size):
            warn_caller(message)

        def sample_batch(batch: list[TaggedRequest], first: int, done: int, batches: int) -> Tensor:
            step = on_step and (lambda step, steps: on_step(done * steps + step + 1, batches * steps))
            estimate = partial(on_estimate, first) if on_estimate else None
            run_solver = partial(sample, on_step=step, on_preview=estimate, cancelled=cancelled)
            return self._sample([one.plain for one in batch], settings, strength, run_solver)

        warn_batches = on_warning or partial(warnings.warn, stacklevel=6)  # 6: from within two generators
        images, records, size = [], [], batch_size
        for batch, generated, fitting in self._batches(tagged, batch_size, sample_batch, warn_batches):
            size = fitting
            images.append(generated)
            given = [one.request for one in batch]
            own = [settings.record(one.request, strength) | one.record for one in batch]
            records += [record | batch_record(given, k) for k, record in enumerate(own)]
        return Result(torch.cat(images), records, size)

    def _batches(
        self,
        tagged: list[TaggedRequest],
        size: int,
        work: Callable[[list[TaggedRequest], int, int, int], Tensor],
        warn: OnWarning,
    ) -> Iterator[tuple[list[TaggedRequest], Tensor, int]]:
        """Yields batches as `in_batches` does, and the batch size; all images of a batch have the same LoRA."""
        runs = [[*run] for _, run in groupby(tagged, lambda one: one.loras)]
        first = before = 0
        for number, run in enumerate(runs):
            self._take(None if self._contents is None else self._contents.tagged(run[0].loras))
            after = sum(-(-len(later) // size) for later in runs[number + 1 :])

            def placed(batch: list[TaggedRequest], start: int, done: int, batches: int) -> Tensor:
                return work(batch, first + start, before + done, before + batches + after)  # noqa: B023

            for count, (batch, images) in enumerate(in_batches(run, size, placed, warn), start=before + 1):
                if count == before + 1 and len(batch) < min(size, len(run)):
                    size = len(batch)  # because more were out of memory
                yield batch, images, size
            first, before = first + len(run), count

    def _sample(
        self,
        requests: list[ImageRequest],
        settings: Settings,
        strength: float | None,
        run_solver: Callable[..., Tensor],
    ) -> Tensor:
        """Samples latents from noise or a noised source image, and decodes them to pixels."""
        factor = self.first_stage.factor
        shape = (self.first_stage.latent_channels, *(length // factor for length in settings.size))
        noise = seed_noise(settings.noise, [request.seed for request in requests], shape, self.device)
        originals, masks = source_tensors(requests, settings.size, self.device)
        denoise, x0 = self._denoise(requests, settings, originals, masks), None
        if originals is not None and not (self.inpaints and strength == 1):
            x0 = self._encode(from_uint8(originals), settings)
            if masks is not None and not self.inpaints:
                denoise = keep_unmasked(denoise, x0, latent_mask(masks, factor))
        grid = self._grid(settings, strength)
        x = grid.start(noise(INITIAL), x0)
        with self.offload.using(self.backbone, *([] if self.weak is None else [self.weak.backbone])):
            x = run_solver(get_solver(settings.sampler, settings.sampler_options), denoise, x, grid, noise)
        with self.offload.using(self.first_stage):
            images = to_uint8(self.first_stage.decode(x, settings.tile))
        return (images if originals is None or masks is None else paste(images, originals, masks)).cpu()

    def _denoise(
        self, requests: list[ImageRequest], settings: Settings, originals: Tensor | None, masks: Tensor | None
    ) -> Denoise:
        """Returns the guided denoiser; inpainting weights also see the mask, or one that repaints everything."""
        encode = prompt_encoder(self.text_encoder, settings, self.device)
        with self.offload.using(self.text_encoder):
            conditionings = encode_prompts(requests, encode)
        if self.inpaints:
            if originals is None:
                originals = torch.zeros(len(requests), 3, *settings.size, dtype=torch.uint8, device=self.device)
            if masks is None:
                masks = torch.ones(len(requests), 1, *settings.size, device=self.device)
            encode_image = partial(self._encode, settings=settings)
            hint = inpainting_hint(from_uint8(originals), masks, self.first_stage.factor, encode_image)
            positive, negative = conditionings
            conditionings = positive.with_hint(INPAINTING, hint), negative.with_hint(INPAINTING, hint)
        weak = None if self.weak is None else self.weak.denoiser
        return guided(self.denoiser, weak, conditionings, requests, settings)

    def records(
        self, requests: Sequence[ImageRequest], strength: float | None, **overrides: Unpack[SettingsOverrides]
    ) -> list[dict[str, Any]]:
        """Returns the settings that a call with these images would record for each, except those of its batch."""
        settings, tagged = self._parsed(self.settings.overridden(overrides), requests)
        return [settings.record(one.request, strength) | one.record for one in tagged]

    def _parsed(self, settings: Settings, requests: Sequence[ImageRequest]) -> tuple[Settings, list[TaggedRequest]]:
        """Reads the tags of prompts and makes room for the longest prompt, if the syntax of the prompts asks for it."""
        if settings.prompt_syntax == "plain":
            return settings, [TaggedRequest(request, request) for request in requests]
        tagged = read_tags(requests, None if self._contents is None else self._contents.lora_folder)
        count = chunk_count(self.text_encoder, prompt_texts([one.plain for one in tagged]))
        return replace(settings, chunks=max(settings.chunks, count)), tagged

    def _grid(self, settings: Settings, strength: float | None) -> Grid:
        """Returns the grid from pure noise or, given the strength of image-to-image, its last steps."""
        schedule, spacing = self.denoiser.schedule, get_spacing(settings.spacing, settings.spacing_options)
        total, run = step_counts(settings.steps, strength, settings.fixed_steps)
        return Grid.to_final(schedule, spacing(schedule, total)[-run:], settings.final_sigma)

    def _encode(self, images: Tensor, settings: Settings) -> Tensor:
        with self.offload.using(self.first_stage):
            return self.first_stage.encode(images, tile=settings.tile)

    def _network(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self._run(x.to(self.backbone.dtype), time, conditioning)

    @torch.no_grad()
    def decode_preview(self, latents: Tensor) -> Tensor:
        """Decodes latents, average-pooled to at most PREVIEW per side, to small images, uint8 (b, 3, h, w)."""
        kernel = -(-max(latents.shape[2:]) // PREVIEW)
        with self.offload.using(self.first_stage):
            return to_uint8(self.first_stage.decode(avg_pool2d(latents, kernel, ceil_mode=True))).cpu()

    def _check(self, settings: Settings, batch_size: int, warn: OnWarning) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be 1 or more")
        for backbone in (self.backbone, *([] if self.weak is None else [self.weak.backbone])):
            check_size(backbone, self.first_stage.factor, settings.size)
        if settings.chunks < 1:
            raise ValueError(f"chunks is {settings.chunks}, but must be 1 or more")
        if settings.prompt_syntax not in SYNTAXES:
            raise ValueError(f"prompt_syntax is {settings.prompt_syntax!r}, but must be one of {', '.join(SYNTAXES)}")
        self.text_encoder.check_skip(settings.clip_skip)
        self.first_stage.check_tile(settings.tile)
        get_thresholding(settings.thresholding, settings.thresholding_options)
        check(Setup(self.denoiser.schedule, self.denoiser.prediction, sampling=asdict(settings)), warn)


def _check_weak(model: Model, weak: Model) -> None:
    """Raises ValueError for a weak model with other noisy latents or another conditioning."""
    weak_inputs = _inputs(weak)
    for name, expected in _inputs(model).items():
        if weak_inputs[name] != expected:
            raise ValueError(
                f"the weak model {weak.source} has another {name} than {model.source}: give one that has the same"
            )


def _inputs(model: Model) -> dict[str, Any]:
    about = model.about["model"]
    return {
        "schedule": about["schedule"],
        "first stage": about["first_stage"]["fingerprint"],
        "text encoder": about["text_encoder"]["fingerprint"],
        "conditioning": model.backbone.reads,
        "number of latent channels": model.backbone.latent_channels,
    }
