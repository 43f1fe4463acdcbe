"""Training of the denoising UNet, between a frozen first stage and a frozen text encoder."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser, Network
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.time_sampling import TimeSampler
from ldm.diffusion.weighting import Weighting
from ldm.image import from_uint8
from ldm.nn.attention import Attention
from ldm.nn.clip import TextTower
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.random import normal, uniform
from ldm.sharding import shard
from ldm.training.objective import Objective
from ldm.training.optim import Curve, MakeOptimizer, with_curve
from ldm.training.step_means import StepMeans
from ldm.weights.find import find
from ldm.weights.native import fill
from ldm.weights.parts import FirstStage, TextEncoder

Batch = dict[str, Any]
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Part:
    """A trained network, the file name it goes by, and what the file says of it (at least "kind" and "config")."""

    name: str
    network: nn.Module
    about: dict[str, Any]


class DiffusionTraining(LightningModule):
    """Moves a batch to latents, adds noise, and asks the UNet for the prediction.

    The batch holds "image" uint8 (b, 3, h, w) or ready "moments" (b, 2z, h, w), with "caption", "id" and "draw",
    perhaps the captions' "tokens" (b, n) or the text encoder's "states" (b, n, d), and in training "stratum" (b, 2).
    All randomness is keyed by (seed, stream, id, draw). `start` is a model whose UNet's weights to start from;
    `compile` one of COMPILE_MODES; `compute` the type that strategy=fsdp casts float32 weights to; `times`,
    `weighting`, `stratified`, `offset_noise` and `huber` are those of the Objective.
    """

    def __init__(
        self,
        unet: UNet,
        first_stage: FirstStage,
        text_encoder: TextEncoder,
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
        start: str | None = None,
        compile: str | None = None,
        compute: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"training.caption_dropout must be in [0, 1), not {caption_dropout}")
        check_widths(unet, first_stage, text_encoder)
        if start is not None:
            stored = find(start).network("unet").load()
            fill(unet, stored.state_dict(), start)
            check_meaning(unet, stored, start)
        self.unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.frozen = [first_stage.network, text_encoder.network]  # a plain list: they stay out of the checkpoint
        for network in self.frozen:
            network.requires_grad_(False).eval()
        self.sources = {"first_stage": first_stage.source, "text_encoder": text_encoder.source}
        self.tokenizer = text_encoder.tokenizer
        self.schedule, self.prediction = schedule, prediction
        self.denoiser = Denoiser(compiled(self.unet, compile), schedule, prediction, time)
        self.objective = Objective(times, weighting, stratified, offset_noise, huber, seed)
        self.make_optimizer, self.curve = optimizer, lr
        self.sampling, self.size = sampling, size
        self.caption_dropout, self.seed = caption_dropout, seed
        self.compute = None if compute is None else getattr(torch, compute)
        self.means = StepMeans()

    @property
    def first_stage(self) -> VAE:
        return self.frozen[0]  # type: ignore[return-value]

    @property
    def text_encoder(self) -> TextTower:
        return self.frozen[1]  # type: ignore[return-value]

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.unet, self.compute)
        elif self.compute is not None:
            raise ValueError(
                "precision=bf16-true keeps float32 weights only with strategy=fsdp; choose it, or precision=bf16-mixed"
            )

    def on_fit_start(self) -> None:  # not in setup, when the module is still on the CPU
        for network in self.frozen:
            network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return with_curve(self.make_optimizer, self.unet.parameters(), self.curve, self.trainer)

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """Scaled latents (b, z, h, w), drawn from the posterior."""
        moments = batch["moments"] if "moments" in batch else self.first_stage.moments(as_float(batch["image"]))
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = normal(self.seed, "posterior", batch["id"], batch["draw"], shape)
        return self.first_stage.latents(moments, noise)

    @cached_property
    def nothing(self) -> Tensor:
        """The context (1, n, d) of the empty caption."""
        with torch.inference_mode(False), torch.no_grad():  # validation may ask first
            return self.text_encoder(self.tokenizer([""]).to(self.device))

    @torch.no_grad()
    def context(self, captions: list[str], tokens: Tensor | None = None, states: Tensor | None = None) -> Tensor:
        """What the UNet reads of the captions (b, n, d).

        `tokens` (b, n), or else `states` (b, n, d) from a cache, are theirs before some were dropped.
        """
        if states is not None:
            blank = torch.tensor([not caption for caption in captions], device=states.device)
            return torch.where(blank[:, None, None], self.nothing, states.to(self.nothing.dtype))
        if tokens is None:
            tokens = self.tokenizer(captions).to(self.device)
        else:
            blank = torch.tensor([not caption for caption in captions], device=tokens.device)
            tokens = torch.where(blank[:, None], self.tokenizer([""]).to(tokens.device), tokens)
        return self.text_encoder(tokens)

    def losses(self, batch: Batch, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Times and losses, each (b,)."""
        context = self.context(captions, batch.get("tokens"), batch.get("states"))
        return self.objective(self.denoiser, self.latents(batch), context, batch)

    def training_step(self, batch: Batch, _: int) -> dict[str, Tensor]:
        dropped = uniform(self.seed, "dropout", batch["id"], batch["draw"]) < self.caption_dropout
        captions = ["" if drop else text for drop, text in zip(dropped.tolist(), batch["caption"], strict=True)]
        times, losses = self.losses(batch, captions)
        loss = losses.mean()
        self.means.add(loss=loss)
        return {"loss": loss, **self._by_noise(times, losses)}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.means.log(self)

    def validation_step(self, batch: Batch, _: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Fixed times and noise for each sample, so that two runs' curves can be compared point by point."""
        batch = {**batch, "draw": torch.zeros_like(batch["id"])}
        times, losses = self.losses(batch, batch["caption"])
        log_validation(self, dataloader_idx, {"loss": losses})
        return self._by_noise(times, losses)

    def _by_noise(self, times: Tensor, losses: Tensor) -> dict[str, Tensor]:
        """What LossByNoise reads, each (b,)."""
        return {"log_snr": self.schedule.log_snr(times), "losses": losses.detach()}

    @property
    def ruler(self) -> dict[str, Any]:
        """What decides the meaning of validation losses besides the data: the objective, and the latents' scale."""
        fingerprint = self.sources["first_stage"]["fingerprint"]
        path = {"schedule": self.schedule.config, "prediction": self.prediction.name}
        return {**path, **self.objective.about, "first_stage": fingerprint}

    def parts(self) -> list[Part]:
        return [Part("unet", self.unet, self.about())]

    def about(self) -> dict[str, Any]:
        """The model as plain data: with the UNet's weights, all that sampling needs to know."""
        return {
            "kind": "unet",
            "config": self.unet.config,
            "model": {
                "schedule": self.schedule.config,
                "prediction": self.prediction.name,
                "time": self.denoiser.time,
                **self.sources,
                "size": list(self.size),
                "sampling": self.sampling,
            },
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ldm"] = self.about()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "ldm" not in checkpoint:
            raise ValueError("the checkpoint is not one of a diffusion run; give resume= the last.ckpt of one")
        ours, theirs = _decisive(self.about()), _decisive(checkpoint["ldm"])
        changed = [f"{key} {theirs.get(key)} → {value}" for key, value in ours.items() if theirs.get(key) != value]
        if changed:
            raise ValueError(
                f"the checkpoint holds another model than this config builds ({'; '.join(changed)}); "
                "resume with what it was trained with"
            )


def _decisive(about: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same for a run to go on: the UNet, what it predicts, and what it reads and writes."""
    model = about["model"]
    parts = {name: model[name]["fingerprint"] for name in ("first_stage", "text_encoder")}
    return {**about["config"], **{name: model[name] for name in ("schedule", "prediction", "time")}, **parts}


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


def compiled(unet: UNet, mode: str | None) -> Network:
    """The UNet, compiled where gradients are kept: there shapes stay the same, so that it is compiled once.

    Validation and drawing, whose shapes change, call it as it is. `mode` is one of COMPILE_MODES, None for none.
    """
    if mode is None:
        return unet
    if mode not in COMPILE_MODES:
        raise ValueError(f"training.compile={mode} is no mode of torch's; choose {', '.join(COMPILE_MODES)} or null")
    fast = torch.compile(unet, mode=mode, dynamic=False)
    return lambda *inputs: (fast if torch.is_grad_enabled() else unet)(*inputs)


def check_widths(unet: UNet, first_stage: FirstStage, text_encoder: TextEncoder) -> None:
    """Raises ValueError where the UNet does not take what the frozen parts give it."""
    width, needed = text_encoder.network.config["width"], unet.config["context_width"]
    if width != needed:
        raise ValueError(
            f"text_encoder gives a context of width {width}, but the UNet takes model.context_width={needed}; "
            "make them equal"
        )
    channels, needed = first_stage.network.latent_channels, unet.config["in_channels"]
    if channels != needed:
        raise ValueError(
            f"first_stage makes {channels} latent channels, but the UNet takes model.in_channels={needed}; "
            "make them equal"
        )


def check_meaning(unet: UNet, stored: nn.Module, source: str) -> None:
    """Raises ValueError where the weights of `stored` fit and yet mean something else in `unet`."""
    kinds: dict[str, tuple[type[nn.Module], str]] = {
        "groups": (nn.GroupNorm, "num_groups"),
        "heads": (Attention, "heads"),
    }
    for key, (kind, name) in kinds.items():
        ours, theirs = ([getattr(m, name) for m in part.modules() if isinstance(m, kind)] for part in (unet, stored))
        if ours != theirs:
            raise ValueError(
                f"training.start={source} was trained with {key} {theirs[0]}, and model.{key} is {ours[0]}: "
                "make them equal"
            )


def as_float(image: Tensor) -> Tensor:
    """uint8 (b, 3, h, w) → [-1, 1], laid out as convolutions like it best."""
    return from_uint8(image).contiguous(memory_format=torch.channels_last)
