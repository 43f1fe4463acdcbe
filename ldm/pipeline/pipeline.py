"""Samples images from prompts: text-to-image, image-to-image and inpainting."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ldm.device import choose_device
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule, from_config
from ldm.execution.cpu_packing import can_pack, fold, pack
from ldm.execution.offload import Offload
from ldm.nn.backbone import Backbone
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.vae import VAE
from ldm.pipeline.batch import sample_batch
from ldm.pipeline.checks import check_settings, check_weak
from ldm.pipeline.emphasis import chunk_count
from ldm.pipeline.input_warnings import input_warnings
from ldm.pipeline.inputs import Between, ImageInput, ImageRequest, OneOrEach, image_requests, prompt_texts
from ldm.pipeline.loading import Contents, Source, added
from ldm.pipeline.loras import TaggedLora, TaggedRequest, read_tags
from ldm.pipeline.networks import Networks
from ldm.pipeline.precision import DTYPES, dtype_of
from ldm.pipeline.result import Result
from ldm.pipeline.settings import Settings, SettingsOverrides, batch_record, model_settings
from ldm.pipeline.source_images import STRENGTH
from ldm.pipeline.tagged_batches import tagged_batches
from ldm.sampling.driver import sample
from ldm.synonyms.calls import takes_synonyms
from ldm.weights.adapters.merging import Given as AdapterFile
from ldm.weights.adapters.textual_inversion import Given as EmbeddingFile
from ldm.weights.model import Model, read_model
from ldm.weights.recognise import DEFAULT

PREVIEW = 16  # latents per side; decoding them takes a sixteenth of the time of Stable Diffusion's 64
OnStep = Callable[[int, int], None]
OnEstimate = Callable[[int, int, Tensor], None]
OnWarning = Callable[[str], None]


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
        components = backbone, first_stage, text_encoder, schedule, prediction, time
        self.networks: Networks = Networks(*components, None if weak is None else weak.networks, offload, compile)
        self.settings, self._contents = settings, contents

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
        source, files = Source(path, dtype, offloading.idle_device), added(adapters, embeddings)
        contents, model = Contents(source, files, lora_dir), source.read(files)
        stage, text = model.first_stage.network, model.text_encoder.network
        if can_pack(offloading.device, dtype):
            fold(stage)

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
        check_weak(model, weak_model)
        return assemble(model, assemble(weak_model), contents)

    def use(self, adapters: Sequence[AdapterFile] = (), embeddings: Sequence[EmbeddingFile] = ()) -> None:
        """Replaces the adapters and textual inversions of `load`, as if the model had been loaded with these.

        Raises FileNotFoundError or ValueError for an unsuitable file, and then changes nothing.
        """
        if self._contents is None:
            raise ValueError("this pipeline was not loaded from a file, so that its adapters cannot be replaced")
        model = self._contents.replace(added(adapters, embeddings))
        if model is not None:
            self.networks.take(model)

    @property
    def outdated(self) -> bool:
        """Whether the model has changed on the disk since it was loaded."""
        return self._contents is not None and self._contents.outdated

    @property
    def backbone(self) -> Backbone:
        return self.networks.backbone

    @property
    def first_stage(self) -> VAE:
        return self.networks.first_stage

    @property
    def text_encoder(self) -> TextEncoder:
        return self.networks.text_encoder

    @property
    def denoiser(self) -> Denoiser:
        return self.networks.denoiser

    @property
    def offload(self) -> Offload:
        return self.networks.offload

    @property
    def device(self) -> torch.device:
        return self.networks.device

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
        if dtype not in (known := [dtype_of(precision) for precision in DTYPES]):
            raise ValueError(f"the dtype is {dtype}, but must be one of {', '.join(map(str, known))}")
        chosen = self.device if device is None else choose_device(str(device))
        self.networks.move(chosen, dtype)
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
            strength = 1.0 if self.networks.inpaints else STRENGTH
        warn_caller = on_warning or partial(warnings.warn, stacklevel=4)  # 4: the caller of both wrappers
        check_settings(self.networks, settings, batch_size, warn_caller)
        settings, tagged = self._parsed(settings, requests)
        plain = [one.plain for one in tagged]
        for message in input_warnings(
            plain, settings, self.text_encoder, self.settings.size, self.networks.weak is not None
        ):
            warn_caller(message)

        def work(batch: list[TaggedRequest], first: int, done: int, batches: int) -> Tensor:
            step = on_step and (lambda step, steps: on_step(done * steps + step + 1, batches * steps))
            estimate = partial(on_estimate, first) if on_estimate else None
            run_solver = partial(sample, on_step=step, on_preview=estimate, cancelled=cancelled)
            return sample_batch(self.networks, [one.plain for one in batch], settings, strength, run_solver)

        warn_batches = on_warning or partial(warnings.warn, stacklevel=6)  # 6: from within two generators
        images, records, size = [], [], batch_size
        for batch, generated, fitting in tagged_batches(tagged, batch_size, self._place, work, warn_batches):
            size = fitting
            images.append(generated)
            given = [one.request for one in batch]
            own = [settings.record(one.request, strength) | one.record for one in batch]
            records += [record | batch_record(given, k) for k, record in enumerate(own)]
        return Result(torch.cat(images), records, size)

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

    def _place(self, loras: tuple[TaggedLora, ...]) -> None:
        """Merges the LoRA that prompts name into the networks, in place of those of earlier prompts."""
        model = None if self._contents is None else self._contents.tagged(loras)
        if model is not None:
            self.networks.take(model)

    @torch.no_grad()
    def decode_preview(self, latents: Tensor) -> Tensor:
        """Decodes latents, average-pooled to at most PREVIEW per side, to small images, uint8 (b, 3, h, w)."""
        kernel = -(-max(latents.shape[2:]) // PREVIEW)
        return self.networks.decode(avg_pool2d(latents, kernel, ceil_mode=True)).cpu()
