"""Models with zero terminal SNR, described by a scheduler_config.json, compared with diffusers."""

from inspect import signature
from pathlib import Path

import diffusers
import pytest
import torch

from ldm.diffusion.schedule import from_config
from ldm.sampling.one_step import ddim
from ldm.sampling.spacing import trailing
from ldm.weights.diffusers.samplers import SAMPLERS
from ldm.weights.diffusers.scheduler import RESCALING, scheduler_from, scheduler_to
from tests.parity.trajectories import DTYPES, EPS, assert_same, grid_to_index_0, ours, theirs

CONFIG_FILE = Path("scheduler_config.json")
TABLE = {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}
MODEL = {"schedule": {"name": "zero_terminal_snr", "schedule": TABLE}, "prediction": "v", "time": "index"}


@pytest.mark.parametrize("name", sorted({name for name, _ in SAMPLERS.values()} - {"DPMSolverSDEScheduler"}))
def test_rescaling_is_exported_for_the_schedulers_that_support_it(name):
    """DPMSolverSDEScheduler, which does not support it, cannot be imported without torchsde."""
    assert ("rescale_betas_zero_snr" in signature(getattr(diffusers, name)).parameters) == (name in RESCALING)


@pytest.mark.parametrize("sampler", [ours for ours, (theirs, _) in SAMPLERS.items() if theirs in RESCALING])
def test_alpha_bar_matches_diffusers(sampler):
    """The last entry, which is 0 or, in some classes, 2^-24, is not compared."""
    config = scheduler_to(MODEL | {"sampling": {"sampler": sampler, "spacing": "trailing"}}, CONFIG_FILE)
    alpha_bar = getattr(diffusers, config["_class_name"]).from_config(config).alphas_cumprod[:-1]
    schedule = from_config(scheduler_from(config, CONFIG_FILE)[0])
    expected = schedule.alpha(torch.arange(999.0)).square().float()
    torch.testing.assert_close(alpha_bar, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [4, 20])
def test_ddim_from_pure_noise_matches_diffusers(steps, dtype):
    sampling = {"sampler": "ddim", "spacing": "trailing"}
    scheduler = diffusers.DDIMScheduler.from_config(scheduler_to(MODEL | {"sampling": sampling}, CONFIG_FILE))
    schedule = from_config(MODEL["schedule"])
    scheduler.alphas_cumprod = schedule.alpha(torch.arange(1000.0)).square()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    times, x = trailing(schedule, steps), EPS.to(dtype)
    assert_same(ours(ddim, grid_to_index_0(schedule, times), x, "v"), theirs(scheduler, x))
