"""The training step of Stable Diffusion 1.5 from cached moments, as DiffusionTraining does it, without Lightning."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmark.gpu import Line
from experiments.benchmark.gpu_stages.context import Context, Size, filled
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser, Network
from ldm.diffusion.loss import Objective
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from ldm.diffusion.time_sampling import Uniform
from ldm.diffusion.weighting import uniform as uniform_weighting
from ldm.nn.backbone import trainable
from ldm.nn.clip import TextTower
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.random import normal, uniform

VOCABULARY = 49408
DROPOUT, CLIP, DECAY = 0.1, 1.0, 0.9999


class Step:
    """A call is a step: noise, captions, forward and backward pass in bfloat16 autocast, clipping, AdamW and EMA."""

    def __init__(self, context: Context, batch: int, adapt: Callable[[UNet], object] | None = None) -> None:
        size, self.context, self.batch = context.size, context, batch
        self.unet: UNet = filled(lambda: UNet(**size.unet), context.device).train()
        if adapt is not None:
            adapt(self.unet)
            self.unet.to(context.device)
        self.tower: TextTower = filled(lambda: TextTower(**size.tower), context.device).requires_grad_(False)
        self.vae: VAE = filled(lambda: VAE(**size.vae), context.device).requires_grad_(False)
        self.schedule = scaled_linear()
        self.objective = Objective(Uniform(self.schedule), uniform_weighting())
        self.use(self.unet)
        self.weights = list(trainable(self.unet).values())
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.optimize()
        self.data = self._data(size)

    def use(self, network: Network) -> None:
        """Trains by calls of `network`, such as the compiled UNet."""
        self.denoiser = Denoiser(network, self.schedule, Prediction("eps"))

    def optimize(self, capturable: bool = False) -> None:
        """Starts with a new optimizer; only a `capturable` one can be part of a CUDA graph."""
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, fused=True, capturable=capturable)

    def _data(self, size: Size) -> dict[str, Tensor]:
        """Returns a batch on the device, with the empty caption's tokens."""
        moments = torch.randn(self.batch, 8, size.side, size.side)
        tokens = torch.randint(VOCABULARY - 1, (self.batch, 77))
        ids = torch.arange(self.batch)
        data = {"moments": moments.half(), "tokens": tokens, "id": ids, "draw": torch.zeros_like(ids)}
        data["empty"] = torch.full((1, 77), VOCABULARY - 1)
        return {name: tensor.to(self.context.device) for name, tensor in data.items()}

    def losses(self) -> Tensor:
        data = self.data
        dropped = uniform(0, "dropout", data["id"], data["draw"]) < DROPOUT
        with torch.no_grad():
            tokens = torch.where(dropped[:, None], data["empty"], data["tokens"])
            conditioning = Conditioning(text=self.tower(tokens))
            shape = (4, *data["moments"].shape[2:])
            x0 = self.vae.latents(data["moments"], normal(0, "posterior", data["id"], data["draw"], shape))
        return self.objective(self.denoiser, x0, conditioning, data)[1]

    def __call__(self) -> None:
        self.data["draw"] += 1
        with torch.autocast(self.context.device.type, torch.bfloat16):
            loss = self.losses().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.averages, [weight.detach() for weight in self.weights], 1 - DECAY)


def config(size: Size, batch: int, adapter: Line | None = None, checkpointing: bool = False) -> dict[str, Any]:
    """Returns the part of a resolved config that a plan reads, for the run that `Step` measures."""
    return {
        "training": {
            "backbone": {"_target_": "ldm.nn.unet.UNet", **size.unet, "checkpointing": checkpointing},
            "first_stage": {"weights": None, "config": size.vae},
            "text_encoder": {"weights": None, "config": size.tower},
            "size": [size.side * factor(size)] * 2,
        },
        "adapter": adapter,
        "data": {"batch_size": batch, "module": {"train": {"_target_": "ldm.data.latents.cache.CachedLatents"}}},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4, "fused": True},
        "ema": {"decay": DECAY},
        "trainer": {"precision": "bf16-mixed", "strategy": "auto", "devices": 1, "num_nodes": 1},
    }


def factor(size: Size) -> int:
    """Returns the pixels per latent, along a side."""
    with torch.device("meta"):
        return VAE(**size.vae).factor


def planned(size: Size, batch: int, adapter: Line | None = None, checkpointing: bool = False) -> Line:
    """Returns what debug=plan computes: bytes by purpose and FLOPs per image."""
    from ldm.planning.memory import memory, workspaces
    from ldm.planning.networks import plan_networks
    from ldm.planning.report import costs_of_a_batch

    setting = config(size, batch, adapter, checkpointing)
    networks, _ = plan_networks(setting)
    trained = networks[0].network
    held = memory(setting, trained, [one.network for one in networks[1:]], 1, False)
    costs = costs_of_a_batch(setting, networks)
    held |= {"activations": sum(cost.saved for cost in costs.values()), "workspaces": workspaces(trained)}
    flops = sum(cost.forward + cost.backward for cost in costs.values()) / batch
    return {"planned_bytes": held, "flops_per_image": flops}
