"""Schedules, spacings and single-step solvers compared with those of diffusers (see `trajectories`)."""

import sys
from functools import partial
from importlib import import_module
from types import ModuleType

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

from ldm.diffusion.schedule import EDM, Flow, cosine, linear, scaled_linear
from ldm.sampling.grid import Grid
from ldm.sampling.one_step import ddim, ddpm, dpmpp_sde, euler, euler_a, heun
from ldm.sampling.spacing import SPACINGS, karras, leading, linspace, log_snr, trailing
from tests.parity.trajectories import (
    ALPHA_BAR,
    DTYPES,
    EPS,
    SCHEDULE,
    SD,
    assert_same,
    brownian,
    fixed_noise,
    grid_to_index_0,
    noise_queue,
    ours,
    theirs,
    unscaled,
    with_sigmas,
    with_table,
)

# Spacings, and the equivalent settings of diffusers' Karras-style schedulers.
SPACED = [
    (trailing, 20, {"timestep_spacing": "trailing"}),
    (leading, 7, {"timestep_spacing": "leading", "steps_offset": 1}),
    (karras, 10, {"use_karras_sigmas": True}),
    (log_snr, 13, {"use_exponential_sigmas": True}),
]


@pytest.mark.parametrize(
    ("schedule", "name", "start", "end"),
    [
        (scaled_linear(), "scaled_linear", 0.00085, 0.012),
        (linear(), "linear", 0.0001, 0.02),
        (cosine(), "squaredcos_cap_v2", 0.0001, 0.02),
    ],
)
def test_schedules_match_diffusers(schedule, name, start, end):
    """The tolerance, 2e-5, is the rounding error of diffusers' float32 product of 1000 factors."""
    scheduler = DDPMScheduler(beta_start=start, beta_end=end, beta_schedule=name)
    alpha_bar = schedule.alpha(torch.arange(1000.0)).square().float()
    torch.testing.assert_close(alpha_bar, scheduler.alphas_cumprod, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 3, 10, 30])
@pytest.mark.parametrize("name", ["trailing", "leading", "linspace"])
def test_spacings_match_diffusers_ddim(name, steps):
    """With one step, linspace is index 0 in diffusers, which is almost without noise, but the last index in ldm."""
    scheduler = DDIMScheduler(**SD, steps_offset=1, timestep_spacing=name)
    scheduler.set_timesteps(steps)
    expected = [999] if (name, steps) == ("linspace", 1) else scheduler.timesteps.tolist()
    assert SPACINGS[name](SCHEDULE, steps).tolist() == expected


@pytest.mark.parametrize("steps", [1, 3, 10, 30])
@pytest.mark.parametrize("spacing", [leading, linspace])
def test_spacings_of_the_dpm_solver_classes_are_those_of_one_more_step(spacing, steps):
    scheduler = DPMSolverMultistepScheduler(**SD, steps_offset=1, timestep_spacing=spacing.__name__)
    scheduler.set_timesteps(steps)
    assert spacing(SCHEDULE, steps, extra=True).tolist() == scheduler.timesteps.tolist()


def test_linspace_of_the_karras_style_classes_is_not_rounded():
    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    torch.testing.assert_close(linspace(SCHEDULE, 7, rounded=False).float(), scheduler.timesteps)


def test_log_snr_matches_the_lu_spacing_of_diffusers():
    scheduler = with_table(DPMSolverMultistepScheduler(**SD, use_lu_lambdas=True))
    scheduler.set_timesteps(13)
    with_sigmas(scheduler, Grid.of(SCHEDULE, log_snr(SCHEDULE, 13)))  # asserts that the sigmas are equal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(("spacing", "steps"), [(trailing, 20), (leading, 7), (leading, 50)])
def test_ddim_matches_diffusers(prediction, spacing, steps, dtype):
    kind = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction]
    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": kind}
    scheduler = with_table(DDIMScheduler(**SD, **settings, timestep_spacing=spacing.__name__))
    scheduler.final_alpha_cumprod = ALPHA_BAR[0]
    scheduler.set_timesteps(steps)
    times, x = spacing(SCHEDULE, steps), EPS.to(dtype)
    assert_same(ours(ddim, grid_to_index_0(SCHEDULE, times), x, prediction), theirs(scheduler, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("variance", "variance_type"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
@pytest.mark.parametrize(("spacing", "steps"), [(leading, 20), (trailing, 10)])
def test_ddpm_matches_diffusers(monkeypatch, spacing, steps, variance, variance_type, dtype):
    """Both use the same noise. diffusers' fixed_large also adds noise in the last step, which is not compared, because
    algorithm 2 of Ho et al. adds none there."""
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise_queue(dtype))
    settings = {"clip_sample": False, "steps_offset": 1, "variance_type": variance_type}
    scheduler = with_table(DDPMScheduler(**SD, **settings, timestep_spacing=spacing.__name__))
    scheduler.one = scheduler.one.double()
    scheduler.set_timesteps(steps)
    x, grid = EPS.to(dtype), Grid.of(SCHEDULE, spacing(SCHEDULE, steps))
    actual, expected = ours(partial(ddpm, variance=variance), grid, x, noise=fixed_noise(dtype)), theirs(scheduler, x)
    last = None if variance == "posterior" else -1
    assert_same(actual[:last], expected[:last])


@pytest.mark.parametrize(("spacing", "steps", "settings"), SPACED)
def test_euler_matches_diffusers(spacing, steps, settings):
    scheduler = with_table(EulerDiscreteScheduler(**SD, **settings))
    scheduler.set_timesteps(steps)
    grid = Grid.of(SCHEDULE, spacing(SCHEDULE, steps))
    start = grid.start(EPS)
    expected = theirs(with_sigmas(scheduler, grid), start / grid.points[0].alpha)
    assert_same(unscaled(ours(euler, grid, start), grid), expected)


@pytest.mark.parametrize(("spacing", "steps", "settings"), SPACED[:2])
def test_euler_ancestral_matches_diffusers(monkeypatch, spacing, steps, settings):
    module = "diffusers.schedulers.scheduling_euler_ancestral_discrete"
    monkeypatch.setattr(f"{module}.randn_tensor", noise_queue())
    scheduler = with_table(EulerAncestralDiscreteScheduler(**SD, **settings))
    scheduler.set_timesteps(steps)
    grid = Grid.of(SCHEDULE, spacing(SCHEDULE, steps))
    start = grid.start(EPS)
    expected = theirs(with_sigmas(scheduler, grid), start / grid.points[0].alpha)
    assert_same(unscaled(ours(euler_a, grid, start, noise=fixed_noise()), grid), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spacing", "steps", "settings"), SPACED)
def test_heun_matches_diffusers(spacing, steps, settings, dtype):
    scheduler = with_table(HeunDiscreteScheduler(**SD, **settings))
    scheduler.set_timesteps(steps)
    grid = Grid.of(SCHEDULE, spacing(SCHEDULE, steps))
    start = grid.start(EPS.to(dtype))
    expected = theirs(with_sigmas(scheduler, grid, twice=True), start / grid.points[0].alpha)
    assert_same(unscaled(ours(heun, grid, start), grid), expected[1::2] + expected[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spacing", "steps", "settings"), SPACED)
def test_dpmpp_sde_matches_diffusers(monkeypatch, spacing, steps, settings, dtype):
    """An empty module replaces torchsde, which diffusers needs only to generate noise."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    module = import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    scheduler = with_table(module.DPMSolverSDEScheduler(**SD, **settings))
    scheduler.set_timesteps(steps)
    grid = Grid.of(SCHEDULE, spacing(SCHEDULE, steps))
    start, path = grid.start(EPS.to(dtype)), brownian(grid)
    scheduler.noise_sampler = lambda a, b: path(a, b).to(dtype)
    expected = theirs(with_sigmas(scheduler, grid, twice=True), start / grid.points[0].alpha)
    assert_same(unscaled(ours(dpmpp_sde, grid, start, noise=fixed_noise(dtype)), grid), expected[1::2] + expected[-1:])


@pytest.mark.parametrize("steps", [5, 18])
def test_euler_on_the_edm_schedule_matches_diffusers(steps):
    """With sigma_data = 1 diffusers' preconditioning is v-prediction on the variance-preserving path."""
    scheduler = EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction")
    scheduler.set_timesteps(steps)
    schedule = EDM()
    grid = Grid.of(schedule, karras(schedule, steps))
    start = grid.start(EPS)
    expected = theirs(with_sigmas(scheduler, grid), start / grid.points[0].alpha)
    assert_same(unscaled(ours(euler, grid, start, "v", time="log_sigma"), grid), expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 20])
def test_euler_on_the_flow_schedule_matches_diffusers(shift, steps):
    """The sigmas are those of Flux, which end at 1/steps like `trailing`; diffusers' default ends at 1/1000."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=trailing(Flow(), steps).tolist())
    schedule = Flow(shift)
    grid = Grid.of(schedule, trailing(schedule, steps))
    assert_same(ours(euler, grid, EPS, "flow"), theirs(scheduler, EPS))


@pytest.mark.parametrize("steps", [4, 20])
def test_heun_on_the_flow_schedule_matches_diffusers(steps):
    """The times are those of diffusers, because its class does not accept sigmas."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    times = torch.unique_consecutive(scheduler.timesteps.double()) / 1000
    expected = theirs(scheduler, EPS)
    grid = Grid.of(Flow(), times)
    solver = partial(heun, path="flow")
    assert_same(ours(solver, grid, EPS, "flow"), expected[1::2] + expected[-1:])
