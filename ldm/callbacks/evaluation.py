"""The pictures and numbers that a run ends with."""

import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from ldm.callbacks.ema import EMA
from ldm.callbacks.sampling import Draw, Trained, drawing, find
from ldm.callbacks.throughput import Throughput
from ldm.data.shapes import held_out_prompts, parse
from ldm.files import write_json
from ldm.image import from_uint8, grid, save_png, to_pil
from ldm.metrics.clip_score import ClipScore, ClipSimilarity
from ldm.metrics.composition import accuracy
from ldm.metrics.distances import distances
from ldm.metrics.features import Features
from ldm.metrics.inception import CLASSES, Inception
from ldm.metrics.inception_score import InceptionScore
from ldm.metrics.noise_loss import NoiseLoss, noise_loss
from ldm.metrics.provenance import Provenance, picture_hash, text_hash
from ldm.metrics.reference import Reference, reference
from ldm.progress import Progress, clock

NEIGHBOURS = 3  # of precision and recall
TILES = 16  # pictures that `ldm compare` puts side by side


class Evaluation(Callback):
    """After training: draws and measures pictures, writes metrics.json and samples/final.png, prints a table.

    With `composition` the prompts are captions of shapes that training never showed, and each picture is
    checked against its own; else they are the captions of `reference`. FID, KID, precision and recall are against
    the first `count` pictures of `reference`, whose features are kept in the file `cache` if one is given.
    The i-th prompt is drawn with seed + i. prompts=0: no evaluation. `clip` measures how pictures fit captions;
    the first `validation` pictures of `reference` give the loss by noise level; `resamples` and `infinity` are
    those of `distances`.
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
        self.folder, self.reference, self.features = Path(folder), reference, features
        self.prompts, self.composition, self.batch_size, self.seed = prompts, composition, batch_size, seed
        self.count = min(count, len(reference))  # type: ignore[arg-type]
        self.clip, self.validation, self.cache = clip, validation, cache
        self.resamples, self.infinity = resamples, infinity

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._evaluate(trainer, module)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """For a run resumed after its last step, which was stopped before it had been evaluated."""
        if not (self.folder / "metrics.json").exists():
            self._evaluate(trainer, module.to(trainer.strategy.root_device))

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.prompts or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        captions = self.captions()
        with drawing(trainer, module) as draw:
            images, metrics = self._draw(draw, module, captions)
            curve = self._noise_loss(cast(Trained, module)) if self.validation else None
        if self.composition:
            metrics |= composition(images, captions)
        self.features.to(module.device)
        real = reference(self.cache, self.features, self._real(), self._data())
        metrics |= self._distances(images, real)
        if self.clip is not None:
            metrics["clip_score"] = self._clip_score(self.clip.to(module.device), images, captions)
        if curve is not None:
            metrics["noise_loss"] = sum(curve.means) / len(curve.means)
        if (speed := find(trainer, Throughput)) and speed.seconds:
            metrics["images_per_second"] = speed.images / speed.seconds
            metrics["training_seconds"] = speed.seconds
        provenance = self._provenance(trainer, module, captions, real, curve)
        self._write(images, captions, metrics, provenance, curve)
        print(table(metrics, len(images), len(real.ids), self.folder))

    def captions(self) -> list[str]:
        """What is drawn: as many prompts as asked for, or as the reference has captions."""
        if self.composition:
            return held_out_prompts(self.prompts)
        return [sample["caption"] for sample in self._samples(self.prompts)]

    def _draw(self, draw: Draw, module: LightningModule, captions: list[str]) -> tuple[Tensor, dict[str, float]]:
        """Pictures, the seconds that they took, and how often the network was called for each (NFE)."""
        progress, images, calls = Progress(len(captions), "pictures", "sampling: "), [], [0]

        def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
            calls[0] += len(inputs[0])

        counting = cast(Trained, module).unet.register_forward_pre_hook(count)
        began = time.monotonic()
        for start in range(0, len(captions), self.batch_size):
            prompts = captions[start : start + self.batch_size]
            images.append(draw(prompts, [self.seed + start + i for i in range(len(prompts))]).cpu())
            progress.step(len(prompts))
        seconds = time.monotonic() - began
        counting.remove()
        return torch.cat(images), {"sampling_seconds": seconds, "nfe": calls[0] / len(captions)}

    @torch.no_grad()
    def _noise_loss(self, model: Trained) -> NoiseLoss:
        """On the means of the first stage's posteriors, with the weights and in the precision that draw."""
        device = model.unet.conv_in.weight.device

        def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            samples = list(self._samples(self.validation))
            for start in range(0, len(samples), self.batch_size):
                part = samples[start : start + self.batch_size]
                moments = model.first_stage.moments(from_uint8(torch.stack([s["image"] for s in part]).to(device)))
                x0 = model.first_stage.latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))
                tokens = model.tokenizer([s["caption"] for s in part]).to(device)
                yield x0, model.text_encoder(tokens), torch.arange(start, start + len(part), device=device)

        return noise_loss(model.denoiser, batches())

    def _distances(self, images: Tensor, real: Reference) -> dict[str, float]:
        """Alone in this process: the other ranks do not measure."""
        if min(len(images), len(real.ids)) <= NEIGHBOURS:
            warnings.warn(
                f"no FID, KID, precision or recall from {len(images)} generated and {len(real.ids)} real pictures: "
                f"they need {NEIGHBOURS + 1} a side",
                stacklevel=2,
            )
            return {}
        if list(images.shape[2:]) != real.about["size"]:
            warnings.warn(
                f"the generated pictures are {list(images.shape[2:])}, the reference {real.about['size']} pixels high "
                "and wide: both are resized for the features, so the distances measure that too",
                stacklevel=2,
            )
        metrics = distances(self.features.num_features, NEIGHBOURS, self.resamples, self.infinity, sync=False)
        metrics.update(real.features, real=True, ids=real.ids)
        score = InceptionScore(CLASSES, sync=False)
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size].to(self.features.mean.device)
            found = self.features(batch)
            metrics.update(found.cpu(), real=False, ids=torch.arange(start, start + len(batch)))
            if isinstance(self.features.network, Inception):
                score.update(self.features.network.logits(found).cpu())
        values = metrics.compute() | ({"inception_score": score.compute()} if score.count else {})
        return {name: float(value) for name, value in values.items()}

    def _clip_score(self, clip: ClipSimilarity, images: Tensor, captions: list[str]) -> float:
        score = ClipScore(sync=False)
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            score.update(clip(images[part].to(clip.device), captions[part]).cpu())
        return float(score.compute())

    def _samples(self, count: int) -> Iterator[dict[str, Any]]:
        return (self.reference[i] for i in range(min(count, len(self.reference))))  # type: ignore[arg-type]

    def _real(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The reference pictures and their ids in batches."""
        images: list[Tensor] = []
        for index, sample in enumerate(self._samples(self.count)):
            images.append(sample["image"])
            if len(images) == self.batch_size or index == self.count - 1:
                yield torch.stack(images), torch.arange(index + 1 - len(images), index + 1)
                images = []

    def _data(self) -> dict[str, Any]:
        """The first pictures tell data sets of the same kind and count apart."""
        first = torch.stack([sample["image"] for sample in self._samples(4)])
        return {"data": type(self.reference).__name__, "count": self.count, "begins": f"{picture_hash(first):064x}"}

    def _provenance(
        self, trainer: Trainer, module: LightningModule, captions: list[str], real: Reference, curve: NoiseLoss | None
    ) -> dict[str, Any]:
        model, ema = cast(Trained, module), find(trainer, EMA)
        data = {**self._data(), "sha256": real.about["sha256"], "size": real.about["size"]}
        return Provenance(
            feature_network=self.features.about,
            reference=data,
            prompts={
                "count": len(captions),
                "from": "ldm.data.shapes.held_out_prompts" if self.composition else "captions of the reference",
                "sha256": text_hash(captions),
                "seeds": [self.seed, self.seed + len(captions) - 1],
            },
            sampling={**model.sampling, "size": list(model.size)},
            size=list(model.size),
            ema=None if ema is None else {"decay": ema.decay, "warmup": ema.warmup, "updates": ema.updates},
            steps=trainer.global_step,
            seed=model.seed,
            ranks=trainer.world_size,
            dtype=str(trainer.precision),
            device=torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else "cpu",
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            clip=None if self.clip is None else self.clip.fingerprint,
            validation=None if curve is None else curve.about | {"data": data["sha256"]},
        ).plain()

    def _write(
        self,
        images: Tensor,
        captions: list[str],
        metrics: dict[str, float],
        provenance: dict[str, Any],
        curve: NoiseLoss | None,
    ) -> None:
        report: dict[str, Any] = {"metrics": metrics, "provenance": provenance}
        if curve is not None:
            errors = {"mean": curve.means, "standard_error": curve.standard_errors}
            report["curves"] = {"noise_loss": {"log_snr": list(curve.levels), **errors}}
        write_json(self.folder / "metrics.json", report)
        sheet = grid(to_pil(images[:64]), captions[:64])
        save_png(sheet, self.folder / "samples" / "final.png", provenance)
        chosen = images[: max(4, min(TILES, 4096 // images.shape[3]))]
        about = {"captions": captions[: len(chosen)], "seed": self.seed, "size": list(images.shape[2:])}
        save_png(to_pil(torch.cat(list(chosen), dim=2))[0], self.folder / "samples" / "tiles.png", about)


def composition(images: Tensor, captions: list[str]) -> dict[str, float]:
    """Accuracy over all prompts, by attribute, and for prompts without and with an unseen pair apart."""
    scores: dict[str, float] = {}
    unseen = [parse(caption).split == "unseen" for caption in captions]
    for split, wanted in (("seen", False), ("unseen", True)):
        if chosen := [i for i, has_pair in enumerate(unseen) if has_pair == wanted]:
            shares = accuracy(images[chosen], [captions[i] for i in chosen])
            for part, share in shares.items():
                name = part if part == "accuracy" else f"accuracy_{part}"
                scores[name] = scores.get(name, 0.0) + share * len(chosen) / len(captions)
            scores[f"accuracy_{split}"] = shares["accuracy"]
    return scores


def table(metrics: dict[str, float], drawn: int, real: int, folder: Path) -> str:
    """What a run prints last: one measurement a line, in aligned columns."""
    rows = [
        (name.replace("accuracy_", "  "), f"{value:.1%}") for name, value in metrics.items() if name.startswith("acc")
    ]
    if "fid" in metrics:
        rows.append(("FID", f"{metrics['fid']:.4g} ({drawn} drawn, {real} real pictures)"))
    if "training_seconds" in metrics:
        speed = f"{metrics['images_per_second']:.4g} images/s"
        rows.append(("training", f"{clock(metrics['training_seconds'])} at {speed}"))
    rows.append(("sampling", f"{clock(metrics['sampling_seconds'])} for {drawn} pictures"))
    rows.append(("files", f"{folder / 'metrics.json'}, {folder / 'samples' / 'final.png'}"))
    return "\n".join(f"{name:<14}{value}" for name, value in rows)
