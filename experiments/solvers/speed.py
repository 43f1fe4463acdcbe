"""Measures the cost of a sampling step without the network, for ldm and diffusers in one process."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from ldm.sampling.driver import SAMPLERS, sample
from ldm.sampling.grid import Grid, Solver
from ldm.sampling.spacing import trailing

SHAPE = 8, 4, 64, 64
STEPS, ROUNDS = 20, 15
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
MULTISTEP = "DPMSolverMultistepScheduler"
# By sampler: the options that make it equal to diffusers', the scheduler there, and its settings.
PEERS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "ddpm": ({}, "DDPMScheduler", {"clip_sample": False}),
    "ddim": ({}, "DDIMScheduler", {"clip_sample": False}),
    "euler": ({}, "EulerDiscreteScheduler", {}),
    "euler_a": ({}, "EulerAncestralDiscreteScheduler", {}),
    "heun": ({}, "HeunDiscreteScheduler", {}),
    "lms": ({}, "LMSDiscreteScheduler", {}),
    "pndm": ({"prk": False}, "PNDMScheduler", {"skip_prk_steps": True}),
    "dpmpp_2s": ({"on_grid": True}, "DPMSolverSinglestepScheduler", {"timestep_spacing": None}),
    "dpmpp_2m": ({}, MULTISTEP, {}),
    "dpmpp_3m": ({"curvature": "half"}, MULTISTEP, {"solver_order": 3}),
    "dpmpp_2m_sde": ({}, MULTISTEP, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m_sde": ({"curvature": "diffusers"}, MULTISTEP, {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": ({}, "UniPCMultistepScheduler", {}),
    "deis": ({"order": 2, "variable": "log_ratio"}, "DEISMultistepScheduler", {}),
}


def speeds() -> dict[str, dict[str, float]]:
    """Returns microseconds per step by sampler: ours, diffusers' and their ratio, as medians of interleaved rounds."""
    out = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, (options, scheduler, settings) in PEERS.items():
        runs = ours(partial(SAMPLERS[name], **options), out), theirs(scheduler, settings, out)
        rounds = [[_timed(run) for run in runs] for _ in range(ROUNDS)]
        mine, peer = (1e6 * statistics.median(times) / STEPS for times in zip(*rounds, strict=True))
        found[name] = {"ours": mine, "diffusers": peer, "ratio": mine / peer}
    return found


def ours(solver: Solver, out: Tensor) -> Callable[[], object]:
    """Returns a sampling run with a free network, including the conversion from eps to x0 and the driver."""
    schedule = scaled_linear()
    denoiser = Denoiser(lambda x, time, conditioning: out, schedule, Prediction("eps"))
    grid = Grid.of(schedule, trailing(schedule, STEPS))
    x = grid.start(out)
    return lambda: sample(solver, lambda x, t: denoiser(x, t, Conditioning()), x, grid, lambda draw: torch.randn(SHAPE))


def theirs(name: str, settings: dict[str, Any], out: Tensor) -> Callable[[], object]:
    kept = {key: value for key, value in {**SD, **settings}.items() if value is not None}
    scheduler = getattr(diffusers, name)(**kept)

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(STEPS)
        x = out * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    return run


def _timed(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


if __name__ == "__main__":
    for name, times in speeds().items():
        print(f"{name:14}{times['ours']:8.0f}{times['diffusers']:8.0f}{times['ratio']:8.2f}")
