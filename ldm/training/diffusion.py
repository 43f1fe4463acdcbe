"""Trains a denoising network, and optionally the text encoder, in the latent space of a frozen first stage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.targets import low_rank_layers
from ldm.adapters.text import TextualInversion
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser, Network
from ldm.diffusion.loss import Objective
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.time_sampling import TimeSampler
from ldm.diffusion.weighting import Weighting
from ldm.execution.fsdp import shard
from ldm.image import from_uint8
from ldm.nn.backbone import Backbone, check_inputs, check_size, trainable
from ldm.nn.inpainting import INPAINTING, inpainting_hint
from ldm.nn.text_encoder import TextEncoder, tokens_of
from ldm.nn.vae import VAE
from ldm.random import normal, uniform
from ldm.training.masks import random_masks
from ldm.training.optim import Curve, MakeOptimizer, with_curve
from ldm.training.step_means import StepMeans
from ldm.weights.adapters.export import exported
from ldm.weights.native import fingerprint
from ldm.weights.parts import Frozen

Batch = dict[str, Any]
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # the modes that run the network as CUDA graphs
MAX_SIZES = 64  # of images, for each of which the network is compiled; torch stops compiling after 8 by default
PREFIX = "backbone."  # prefix of the network's weights in checkpoints
TEXT_PREFIX = "trained_text."  # prefix of the text encoder's weights, if it is trained
OLD_PREFIX = "unet."  # prefix of the network's weights in version 0.1


@dataclass(frozen=True)
class ExportedFile:
    """A file that a run exports: its name, its tensors, and its metadata (at least "kind" and "config")."""

    name: str
    state: dict[str, Tensor]
    about: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)  # for other tools


class DiffusionTraining(LightningModule):
    """Encodes a batch to latents, adds noise, and trains the network on the prediction target.

    A batch contains "image" uint8 (b, 3, h, w) or cached "moments" (b, 2z, h, w), with "caption", "id" and "draw",
    optionally the captions' "tokens" (b, n) or the text encoder's "states" (b, n, d), a loss "mask" uint8 (b, 1, h, w),
    and in training "stratum" (b, 2) and the "weight" (b,) of each sample's loss. All randomness is keyed by
    (seed, stream, id, draw). `adapter` is the adapter applied to the network, and `base` describes its starting weights
    ("weights", "fingerprint"). With a `text_encoder_lr` the text encoder, or the subset of its weights that an adapter
    selects, is trained at this learning rate. `compile` is one of COMPILE_MODES; `compute` is the dtype that
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
        compute: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"training.caption_dropout must be in [0, 1), not {caption_dropout}")
        if adapter is not None and base is None:
            raise ValueError("an adapter needs the weights of a trained model: give training.start=MODEL")
        check_inputs(backbone, first_stage.network.latent_channels, text_encoder.network.widths)
        check_size(backbone, first_stage.network.factor, size, "training.size")
        self.backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.base, self.adapter = base, adapter
        self.networks = (first_stage.network, text_encoder.network)  # a plain tuple keeps them out of the checkpoint
        self.trains_text = trains_text_encoder(adapter, text_encoder_lr)
        self.text_encoder_lr = text_encoder_lr
        self.frozen = list(self.networks[: 1 if self.trains_text else 2])
        for network in self.frozen:
            network.requires_grad_(False).eval()
        if self.trains_text:
            self.trained_text = text_encoder.network
        self.sources = {"first_stage": first_stage.source, "text_encoder": text_encoder.source}
        self.schedule, self.prediction = schedule, prediction
        self.denoiser = Denoiser(compiled(self.backbone, compile), schedule, prediction, time)
        self.objective = Objective(times, weighting, stratified, offset_noise, huber, seed)
        self.make_optimizer, self.curve, self.compile_mode = optimizer, lr, compile
        self.sampling, self.size = sampling, size
        self.caption_dropout, self.seed = caption_dropout, seed
        self.compute = None if compute is None else getattr(torch, compute)
        self.means = StepMeans()

    @property
    def first_stage(self) -> VAE:
        return self.networks[0]

    @property
    def text_encoder(self) -> TextEncoder:
        return self.networks[1]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns the weights that are trained, averaged, saved and exported, by name."""
        return trainable(self.backbone) | self.trainable_text()

    def trainable_text(self) -> dict[str, nn.Parameter]:
        """Returns the weights of the text encoder that are trained, by name."""
        return {TEXT_PREFIX + name: weight for name, weight in trainable(self.text_encoder).items()}

    @property
    def tokenize(self) -> Callable[[list[str]], Tensor]:
        """Maps captions to tokens (b, n). It holds no network, so that it can be sent to a data loader's workers."""
        return partial(tokens_of, self.text_encoder.tokenizers)

    def setup(self, stage: str) -> None:
        if self.compile_mode in CUDA_GRAPHS and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                f"training.compile={self.compile_mode} keeps gradients in the memory of CUDA graphs, which each batch "
                "overwrites, so that they cannot be accumulated: choose training.compile=default, or set "
                "data.global_batch to data.batch_size x the number of GPUs"
            )
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

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """Samples scaled latents (b, z, h, w) from the posterior."""
        moments = batch["moments"] if "moments" in batch else self.first_stage.moments(as_float(batch["image"]))
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = normal(self.seed, "posterior", batch["id"], batch["draw"], shape)
        return self.first_stage.latents(moments, noise)

    @cached_property
    def unconditional(self) -> Conditioning:
        """The conditioning of the empty caption for a single sample."""
        with torch.inference_mode(False), torch.no_grad():  # validation may be the first caller
            return self.text_encoder.encode([""], device=self.device)

    @cached_property
    def empty_tokens(self) -> Tensor:
        """The tokens (1, n) of the empty caption."""
        with torch.inference_mode(False):
            return self.tokenize([""]).to(self.device)

    def conditioning(self, batch: Batch, dropped: Tensor | None = None) -> Conditioning:
        """Returns the network's conditioning; the captions where `dropped` (b,) is true count as empty."""
        if "states" in batch:
            cached = Conditioning(text=batch["states"].to(self.unconditional.get("text").dtype))
            return cached if dropped is None else cached.dropped(dropped, self.unconditional)
        tokens = batch["tokens"] if "tokens" in batch else self.tokenize(batch["caption"])
        tokens = tokens.to(self.device)
        if dropped is not None:
            tokens = torch.where(dropped[:, None], self.empty_tokens, tokens)
        with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
            return self.text_encoder.encode(tokens, device=self.device)

    @torch.no_grad()
    def hint(self, batch: Batch) -> Tensor:
        """Returns random masks and the latents of the masked images, for an inpainting network."""
        images = as_float(batch["image"])
        masks = random_masks(self.seed, batch["id"], batch["draw"], (images.shape[2], images.shape[3]))
        return inpainting_hint(images, masks, self.first_stage.factor, self.first_stage.encode)

    def losses(self, batch: Batch, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns times and losses, each (b,); the captions where `dropped` (b,) is true count as empty."""
        conditioning = self.conditioning(batch, dropped)
        if INPAINTING in self.backbone.reads:
            conditioning = conditioning.with_hint(INPAINTING, self.hint(batch))
        return self.objective(self.denoiser, self.latents(batch), conditioning, batch)

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

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.means.log(self)

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
        fingerprint = self.sources["first_stage"]["fingerprint"]
        path = {"schedule": self.schedule.config, "prediction": self.prediction.name}
        return {**path, **self.objective.about, "first_stage": fingerprint}

    def exported_files(self) -> list[ExportedFile]:
        """Returns the files that a finished run exports."""
        about, frozen = self.about(), self._frozen()
        if isinstance(self.adapter, TextualInversion):
            (vectors,) = self.adapter.trained(self.text_encoder)
            return [ExportedFile("embedding", {self.adapter.token: vectors}, {**about, "kind": "embedding"})]
        state = {name: tensor for name, tensor in self.backbone.state_dict().items() if PREFIX + name not in frozen}
        if layers := low_rank_layers(self.backbone):
            towers = {tower: low_rank_layers(tower) for tower in self.text_encoder.towers}
            return [ExportedFile(about["kind"], *exported(state, layers, about, self._facts(), towers))]
        if not self.trains_text:
            return [ExportedFile(about["kind"], state, about)]
        (tower,), (tokenizer,) = self.text_encoder.towers, self.text_encoder.tokenizers
        text = tower.state_dict()
        model = about["model"] | {
            "text_encoder": {"weights": "./text_tower.safetensors", "fingerprint": fingerprint(text)}
        }
        text_about = {"kind": "text_tower", "config": tower.config, "pad": tokenizer.pad}
        return [
            ExportedFile("text_tower", text, text_about),
            ExportedFile(about["kind"], state, about | {"model": model}),
        ]

    def _facts(self) -> dict[str, str]:
        """Returns training metadata under the names that kohya's trainer uses."""
        group = self.trainer.optimizers[0].param_groups[0]
        rate = {"ss_learning_rate": str(group["initial_lr"]), "ss_optimizer": type(self.trainer.optimizers[0]).__name__}
        if self.text_encoder_lr is not None:
            rate["ss_text_encoder_lr"] = str(self.text_encoder_lr)
        return {"ss_steps": str(self.trainer.global_step), "ss_seed": str(self.seed), **rate}

    def about(self) -> dict[str, Any]:
        """Returns the model as plain data: everything that sampling needs besides the trained weights."""
        model = {
            "schedule": self.schedule.config,
            "prediction": self.prediction.name,
            "time": self.denoiser.time,
            **self.sources,
            "size": list(self.size),
            "sampling": self.sampling,
        }
        if self.adapter is None or self.base is None:
            return {"kind": self.backbone.kind, "config": self.backbone.config, "model": model}
        network = {"kind": self.backbone.kind, "config": self.backbone.config}
        base = {**self.base, "network": network}
        return {"kind": "adapter", "config": self.adapter.config, "base": base, "model": model}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = self._frozen()
        checkpoint["state_dict"] = {k: tensor for k, tensor in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint["ldm"] = self.about()
        if self.trains_text:
            checkpoint["ldm"]["model"]["text_encoder"] = {**self.sources["text_encoder"], "trained": True}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "ldm" not in checkpoint:
            raise ValueError("the checkpoint is not from a diffusion run: give resume= the last.ckpt of one")
        ours, theirs = _decisive(self.about()), _decisive(checkpoint["ldm"])
        names = dict.fromkeys([*ours, *theirs])
        changed = [f"{n} {theirs.get(n)} → {ours.get(n)}" for n in names if theirs.get(n) != ours.get(n)]
        if changed:
            raise ValueError(
                f"the checkpoint contains a different model than this config builds ({'; '.join(changed)}): resume "
                "with the settings, and the version of ldm, that it was trained with"
            )
        saved = {_renamed(name): tensor for name, tensor in checkpoint["state_dict"].items()}
        own = self.state_dict()
        checkpoint["state_dict"] = {name: own[name] for name in self._frozen()} | saved

    def _frozen(self) -> list[str]:
        """Returns the state dict names of frozen weights and of the text encoder's buffers."""
        own = [PREFIX + name for name, weight in self.backbone.named_parameters() if not weight.requires_grad]
        text = self.text_encoder.state_dict(prefix=TEXT_PREFIX) if self.trains_text else {}
        return own + [name for name in text if name not in self.trainable_text()]


def trains_text_encoder(adapter: Adapter | None, text_encoder_lr: float | None) -> bool:
    """Returns whether the text encoder is trained. Raises ValueError for an invalid learning rate."""
    inversion = isinstance(adapter, TextualInversion)
    if text_encoder_lr is not None and (inversion or not text_encoder_lr > 0):
        remedy = (
            "leave it out, because optimizer.lr is that of the new token" if inversion else "give a positive number"
        )
        raise ValueError(f"training.text_encoder_lr is {text_encoder_lr}: {remedy}")
    return inversion or text_encoder_lr is not None


def _renamed(name: str) -> str:
    """Returns the current state dict name of a checkpoint's tensor, also for checkpoints of version 0.1."""
    return PREFIX + name.removeprefix(OLD_PREFIX) if name.startswith(OLD_PREFIX) else name


def _decisive(about: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that must not change when a run resumes: networks, adapter and prediction."""
    model = about["model"]
    parts = {name: model[name]["fingerprint"] for name in ("first_stage", "text_encoder")}
    diffusion = {name: model[name] for name in ("schedule", "prediction", "time")}
    base = {"base": about["base"]["fingerprint"]} if "base" in about else {}
    return {"kind": about["kind"], **about["config"], **base, **diffusion, **parts}


def log_validation(module: LightningModule, dataloader_idx: int, values: dict[str, Tensor]) -> None:
    """Logs the means of per-sample values (b,) as val/SET/NAME, averaged over the set and over ranks."""
    name = list(module.trainer.datamodule.val)[dataloader_idx]  # type: ignore[attr-defined]
    for key, value in values.items():
        module.log(
            f"val/{name}/{key}",
            value.float().mean(),
            batch_size=len(value),
            sync_dist=True,
            add_dataloader_idx=False,
        )


def compiled(backbone: Backbone, mode: str | None) -> Network:
    """Compiles the network for calls with gradients, once for each size of images.

    Validation and sampling, whose shapes vary, call the uncompiled network. `mode` is one of COMPILE_MODES, or None
    for no compilation.
    """
    if mode is None:
        return backbone
    if mode not in COMPILE_MODES:
        raise ValueError(
            f"training.compile={mode} is not a mode of torch.compile: choose {', '.join(COMPILE_MODES)} or null"
        )
    fast = torch.compile(backbone, mode=mode, dynamic=False, recompile_limit=MAX_SIZES)  # type: ignore[call-overload]
    return lambda *inputs: (fast if torch.is_grad_enabled() else backbone)(*inputs)


def as_float(image: Tensor) -> Tensor:
    """Converts uint8 (b, 3, h, w) to float in [-1, 1], in channels-last layout."""
    return from_uint8(image).contiguous(memory_format=torch.channels_last)
