"""Generates and measures images at the end of a run, and writes metrics.json."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from ldm.callbacks.images.sampling import SampledModule, SampleImages, image_sampler
from ldm.callbacks.monitoring.metrics import FILE, final_metrics, recorded_provenance, training_provenance
from ldm.data.latents.cache import undecoded
from ldm.data.sources.shapes import held_out_prompts
from ldm.files import write_json
from ldm.image import grid, save_png, to_pil
from ldm.metrics.clip_score import ClipSimilarity
from ldm.metrics.features import Features
from ldm.metrics.measure import ImageMetrics, counting, report
from ldm.metrics.noise_loss import NoiseLoss, encoded, noise_loss, sample_count
from ldm.metrics.provenance import Provenance, text_hash
from ldm.metrics.reference import Reference, data_about, image_batches, reference
from ldm.metrics.summary import table
from ldm.progress import Progress

TILES = 16  # images that `ldm compare` shows side by side


class Evaluation(Callback):
    """After training, generates and measures images, writes metrics.json and samples/final.png, and prints a table.

    With `composition` the prompts are shapes captions that were held out from training, and each image is checked
    against its caption; otherwise they are the captions of `reference`. FID, KID, precision and recall compare with
    the first `count` images of `reference`, whose features are cached in the file `cache` if given. The i-th prompt is
    sampled with seed + i; prompts=0 skips the evaluation. `clip` computes the CLIP score; the first `validation` images
    of `reference` give the loss by noise level; `resamples` and `infinity` are passed to `distances`. metrics.json
    includes the values of the Metrics callback, which writes the file if there is no evaluation.
    """

    def __init__(
        self,
        folder: str | Path,
        reference: Dataset[dict[str, Any]],
        features: Features,
        prompts: int = 512,
        count: int = 2048,
        composition: bool = True,
        batch_size: int = 64,
        seed: int = 0,
        clip: ClipSimilarity | None = None,
        validation: int = 0,
        resamples: int = 0,
        infinity: bool = False,
        cache: str | Path | None = None,
    ) -> None:
        self.folder, self.reference = Path(folder), reference
        self.image_metrics = ImageMetrics(features, clip, composition, resamples, infinity)
        self.prompts, self.batch_size, self.seed = prompts, batch_size, seed
        self.count = min(count, len(reference))  # type: ignore[arg-type]
        self.validation, self.cache = validation, cache

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._evaluate(trainer, module)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Evaluates a run that was stopped between its last step and its evaluation, and is now resumed."""
        if self._measured_step() != trainer.global_step:
            self._evaluate(trainer, module.to(trainer.strategy.root_device))

    def _measured_step(self) -> int | None:
        """Returns the step whose images metrics.json is about, if any."""
        provenance = recorded_provenance(self.folder)
        has_images = provenance.get("prompts", True) is not None  # None if Metrics wrote the file
        return provenance.get("steps") if has_images else None

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.prompts or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        captions, model = self.captions(), cast(SampledModule, module)
        with image_sampler(trainer, module) as sample:
            images, metrics = self._generate(sample, module, captions)
            count = sample_count(self.validation, len(self.reference))  # type: ignore[arg-type]
            samples = encoded(model, self._reference_samples(count), self.batch_size, module.device)
            curve = noise_loss(model.denoiser, samples) if count else None
        self.image_metrics.to(module.device)
        pictures = image_batches(self.reference, self.count, self.batch_size)
        real = reference(self.cache, self.image_metrics.features, pictures, data_about(self.reference, self.count))
        starts = range(0, len(images), self.batch_size)
        rows = [
            self.image_metrics.rows(images[i : i + self.batch_size], captions[i : i + self.batch_size]) for i in starts
        ]
        values = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
        metrics |= self.image_metrics.compute(values, captions, list(images.shape[2:]), real) | final_metrics(trainer)
        provenance = self._provenance(trainer, model, captions, real, curve)
        contents = report(metrics, provenance, curve)
        self._write(images, captions, contents)
        files = f"{self.folder / FILE}, {self.folder / 'samples' / 'final.png'}"
        print(table(metrics, len(images), len(real.ids), files, contents["warnings"]))

    def captions(self) -> list[str]:
        """Returns the prompts: `prompts` held-out captions, or at most that many captions of the reference."""
        if self.image_metrics.composition:
            return held_out_prompts(self.prompts)
        samples = undecoded(self.reference)
        return [samples[i]["caption"] for i in range(min(self.prompts, len(samples)))]

    def _generate(
        self, sample: SampleImages, module: LightningModule, captions: list[str]
    ) -> tuple[Tensor, dict[str, float]]:
        """Returns uint8 images (n, 3, h, w), the sampling time in seconds, and the network calls per image (NFE)."""
        progress, images = Progress(len(captions), "images", "sampling: "), []
        started = time.monotonic()
        with counting(cast(SampledModule, module).backbone) as calls:
            for start in range(0, len(captions), self.batch_size):
                prompts = captions[start : start + self.batch_size]
                images.append(sample(prompts, [self.seed + start + i for i in range(len(prompts))]).cpu())
                progress.step(len(prompts))
        seconds = time.monotonic() - started
        return torch.cat(images), {"sampling_seconds": seconds, "nfe": calls[0] / len(captions)}

    def _reference_samples(self, count: int) -> Iterator[dict[str, Any]]:
        return (self.reference[i] for i in range(min(count, len(self.reference))))  # type: ignore[arg-type]

    def _provenance(
        self, trainer: Trainer, model: SampledModule, captions: list[str], real: Reference, curve: NoiseLoss | None
    ) -> dict[str, Any]:
        data = {**real.about["data"], "sha256": real.about["sha256"], "size": real.about["size"]}
        return Provenance(
            feature_network=self.image_metrics.features.about,
            feature_width=self.image_metrics.features.num_features,
            reference=data,
            prompts={
                "count": len(captions),
                "from": "ldm.data.shapes.held_out_prompts"
                if self.image_metrics.composition
                else "captions of the reference",
                "sha256": text_hash(captions),
                "seeds": [self.seed, self.seed + len(captions) - 1],
            },
            sampling={**model.sampling, "size": list(model.size)},
            size=list(model.size),
            seed=model.seed,
            clip=None if self.image_metrics.clip is None else self.image_metrics.clip.fingerprint,
            validation=None if curve is None else curve.about | {"data": data["sha256"]},
            **training_provenance(trainer),
        ).plain()

    def _write(self, images: Tensor, captions: list[str], contents: dict[str, Any]) -> None:
        write_json(self.folder / FILE, contents)
        sheet = grid(to_pil(images[:64]), captions[:64])
        save_png(sheet, self.folder / "samples" / "final.png", contents["provenance"])
        chosen = images[: max(4, min(TILES, 4096 // images.shape[3]))]
        about = {"captions": captions[: len(chosen)], "seed": self.seed, "size": list(images.shape[2:])}
        save_png(to_pil(torch.cat(list(chosen), dim=2))[0], self.folder / "samples" / "tiles.png", about)
