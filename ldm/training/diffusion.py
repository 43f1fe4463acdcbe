"""Trains a denoising network, and optionally the text encoder, in the latent space of a frozen first stage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.text import TextualInversion
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import Objective
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule, check_config
from ldm.diffusion.time_sampling import TimeSampler
from ldm.diffusion.weighting import Weighting
from ldm.execution.fsdp import shard
from ldm.execution.fused_norms import fuse_norms
from ldm.nn.backbone import Backbone, check_inputs, check_size, trainable
from ldm.nn.inpainting import INPAINTING
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.vae import VAE
from ldm.random import uniform
from ldm.training.batch import Batch
from ldm.training.checkpoint import complete_checkpoint, reduce_checkpoint
from ldm.training.compiling import check_accumulation, compiled
from ldm.training.export import ExportedFile, model_files
from ldm.training.inputs import BatchEncoder
from ldm.training.optim import Curve, MakeOptimizer, with_curve
from ldm.training.trained_model import TrainedModel, trains_text_encoder
from ldm.training.training_module import TrainingModule
from ldm.training.validation import log_validation
from ldm.weights.parts import Frozen


class DiffusionTraining(TrainingModule):
    """Encodes a batch to latents, adds noise, and trains the network on the prediction target.

    A batch contains "image" uint8 (b, 3, h, w) or cached "moments" (b, 2z, h, w), with "caption", "id" and "draw",
    optionally the captions' "tokens" (b, n) or the text encoder's "states" (b, n, d), a loss "mask" uint8 (b, 1, h, w),
    and in training "stratum" (b, 2) and the "weight" (b,) of each sample's loss. All randomness is keyed by
    (seed, stream, id, draw). `adapter` is the adapter applied to the network, and `base` describes its starting weights
    ("weights", "fingerprint"). With a `text_encoder_lr` the text encoder, or the subset of its weights that an adapter
    selects, is trained at this learning rate. `compile` is a mode of `compiled`; `compute` is the dtype that
    strategy=fsdp casts float32 weights to; `times`, `weighting`, `stratified`, `offset_noise` and `huber` are passed to
    the Objective.
    """

    def __init__(
        self,
        backbone: Backbone,
        first_stage: Frozen[VAE],
        text_encoder: Frozen[TextEncoder],
        schedule: Schedule,
        prediction: Prediction,
        weighting: Weighting,
        times: TimeSampler,
        optimizer: MakeOptimizer,
        lr: Curve,
        sampling: dict[str, Any],
        size: tuple[int, int],
        caption_dropout: float = 0.1,
        stratified: bool = False,
        offset_noise: float = 0.0,
        huber: float | None = None,
        time: str | None = None,
        base: dict[str, str] | None = None,
        adapter: Adapter | None = None,
        text_encoder_lr: float | None = None,
        compile: str | None = None,
        fused_norms: bool = False,
        compute: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"training.caption_dropout must be in [0, 1), not {caption_dropout}")
        if adapter is not None and base is None:
            raise ValueError("an adapter needs the weights of a trained model: give training.start=MODEL")
        if fused_norms and compile is not None:
            raise ValueError("training.fused_norms is for networks that are not compiled: set training.compile=null")
        check_config(schedule)
        check_inputs(backbone, first_stage.network.latent_channels, text_encoder.network.widths)
        check_size(backbone, first_stage.network.factor, size, "training.size")
        self.backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.adapter, self.text_encoder_lr = adapter, text_encoder_lr
        self.trains_text = trains_text_encoder(adapter, text_encoder_lr)
        networks = first_stage.network, text_encoder.network
        self.inputs = BatchEncoder(*networks, backbone.reads, seed, self.trains_text)
        self.frozen = list(networks[: 1 if self.trains_text else 2])  # a plain list keeps them out of the checkpoint
        for network in self.frozen:
            network.requires_grad_(False).eval()
        if self.trains_text:
            self.trained_text = text_encoder.network
        self.schedule, self.prediction = schedule, prediction
        self.denoiser = Denoiser(compiled(self.backbone, compile), schedule, prediction, time)
        self.objective = Objective(times, weighting, stratified, offset_noise, huber, seed)
        self.make_optimizer, self.curve, self.compile_mode = optimizer, lr, compile
        self.fused_norms = fused_norms
        self.sampling, self.size = sampling, size
        self.caption_dropout, self.seed = caption_dropout, seed
        self.compute = None if compute is None else getattr(torch, compute)
        sources = {"first_stage": first_stage.source, "text_encoder": text_encoder.source}
        trained = self.backbone, text_encoder.network, sources, schedule, prediction, self.denoiser.time, size, sampling
        self.model = TrainedModel(*trained, adapter, base, self.trains_text)

    @property
    def first_stage(self) -> VAE:
        return self.inputs.first_stage

    @property
    def text_encoder(self) -> TextEncoder:
        return self.inputs.text_encoder

    @property
    def tokenize(self) -> Callable[[list[str]], Tensor]:
        """Maps captions to tokens (b, n)."""
        return self.inputs.tokenize

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns the weights that are trained, averaged, saved and exported, by name."""
        return self.model.trainable()

    def trainable_text(self) -> dict[str, nn.Parameter]:
        """Returns the weights of the text encoder that are trained, by name."""
        return self.model.trainable_text()

    def setup(self, stage: str) -> None:
        check_accumulation(self.compile_mode, self.trainer.accumulate_grad_batches)
        if self.fused_norms:
            fuse_norms(self.backbone, self.trainer.strategy.root_device)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for sample in () if data is None else data.samples_of_each_size():
            self.check_sample(sample)

    def configure_model(self) -> None:
        device = self.trainer.strategy.root_device  # where Lightning moves its own networks only after this
        for network in self.frozen:
            network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        if sharded and self.trains_text:
            raise ValueError("strategy=fsdp does not shard the text encoder, which is trained: choose strategy=ddp")
        if sharded:
            shard(self.backbone, self.compute)
        elif self.compute is not None:
            raise ValueError(
                "precision=bf16-true keeps float32 weights only with strategy=fsdp; choose it, or precision=bf16-mixed"
            )

    def check_sample(self, sample: dict[str, Any]) -> None:
        """Raises ValueError if the network cannot be trained on the sample."""
        if self.trains_text and "states" in sample:
            raise ValueError(
                "the data set contains the text encoder's states, but the text encoder is trained: choose data=small, "
                "data=folder or data=latents"
            )
        if isinstance(self.adapter, TextualInversion):
            self.adapter.check_caption(self.text_encoder, sample["caption"])
        factor = self.first_stage.factor
        size = sample["image"].shape[1:] if "image" in sample else [factor * n for n in sample["moments"].shape[1:]]
        check_size(self.backbone, factor, size, "the size of an image in data")
        if INPAINTING in self.backbone.reads and "image" not in sample:
            raise ValueError(
                "an inpainting network is trained on images that are masked before they are encoded, but this data set "
                "contains latents: choose data=folder, data=shards or data=shapes_online"
            )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        own, text = list(trainable(self.backbone).values()), list(self.trainable_text().values())
        if not (own and text):
            return with_curve(self.make_optimizer, own or text, self.curve, self.trainer)
        groups: list[dict[str, Any]] = [{"params": own}, {"params": text, "lr": self.text_encoder_lr}]
        return with_curve(self.make_optimizer, groups, self.curve, self.trainer)

    def conditioning(self, batch: Batch, dropped: Tensor | None = None) -> Conditioning:
        """Returns the network's conditioning; the captions where `dropped` (b,) is true count as empty."""
        return self.inputs(batch, dropped)[1]

    def losses(self, batch: Batch, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns times and losses, each (b,); the captions where `dropped` (b,) is true count as empty."""
        latents, conditioning = self.inputs(batch, dropped)
        return self.objective(self.denoiser, latents, conditioning, batch)

    def training_step(self, batch: Batch, _: int) -> dict[str, Tensor]:
        dropped = uniform(self.seed, "dropout", batch["id"], batch["draw"]) < self.caption_dropout
        with self._adapter_dropout(batch):
            times, losses = self.losses(batch, dropped)
        loss = (losses * batch["weight"]).mean() if "weight" in batch else losses.mean()
        self.means.add(loss=loss)
        return {"loss": loss, **self._by_noise(times, losses)}

    @contextmanager
    def _adapter_dropout(self, batch: Batch) -> Iterator[None]:
        """Seeds torch's global random state, from which an adapter's dropout samples, with the batch's first sample."""
        if self.adapter is None or not self.adapter.config.get("dropout"):
            yield
            return
        sample, draw = batch["first"] if "first" in batch else (int(batch["id"][0]), int(batch["draw"][0]))
        key = uniform(self.seed, "adapter dropout", torch.tensor([sample]), draw)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(key * 2**32))
            yield

    def validation_step(self, batch: Batch, _: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Uses fixed times and noise for each sample, so that the curves of two runs can be compared point by point."""
        batch = {**batch, "draw": torch.zeros_like(batch["id"])}
        times, losses = self.losses(batch)
        log_validation(self, dataloader_idx, {"loss": losses})
        return self._by_noise(times, losses)

    def _by_noise(self, times: Tensor, losses: Tensor) -> dict[str, Tensor]:
        """Returns the outputs that LossByNoise reads, each (b,)."""
        return {"log_snr": self.schedule.log_snr(times), "losses": losses.detach()}

    @property
    def validation_meaning(self) -> dict[str, Any]:
        """The settings besides the data on which validation losses depend: the objective and the latents' scale."""
        fingerprint = self.model.sources["first_stage"]["fingerprint"]
        path = {"schedule": self.schedule.config, "prediction": self.prediction.name}
        return {**path, **self.objective.about, "first_stage": fingerprint}

    def exported_files(self) -> list[ExportedFile]:
        """Returns the files that a finished run exports."""
        return model_files(self.model, self._facts)

    def _facts(self) -> dict[str, str]:
        """Returns training metadata under the names that kohya's trainer uses."""
        group = self.trainer.optimizers[0].param_groups[0]
        rate = {"ss_learning_rate": str(group["initial_lr"]), "ss_optimizer": type(self.trainer.optimizers[0]).__name__}
        if self.text_encoder_lr is not None:
            rate["ss_text_encoder_lr"] = str(self.text_encoder_lr)
        return {"ss_steps": str(self.trainer.global_step), "ss_seed": str(self.seed), **rate}

    def about(self) -> dict[str, Any]:
        """Returns the model as plain data: everything that sampling needs besides the trained weights."""
        return self.model.about()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        reduce_checkpoint(checkpoint, self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        complete_checkpoint(checkpoint, self.model, self.state_dict())
