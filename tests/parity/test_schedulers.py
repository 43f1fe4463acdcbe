"""Whole trajectories against diffusers' schedulers, on Stable Diffusion's settings and on flow.

diffusers keeps its alpha-bar as a float32 product, of which 1 - alpha-bar has few digits left at the first
indices. The tests give it our float64 product rounded once, so that what is compared is the solvers.
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow, cosine, linear, scaled_linear
from ldm.sampling.driver import no_noise
from ldm.sampling.grid import Grid
from ldm.sampling.multistep import dpmpp_2m
from ldm.sampling.one_step import ddim, ddpm, euler, heun
from ldm.sampling.spacing import leading, linspace, trailing

SCHEDULE = scaled_linear()
ALPHA_BAR = SCHEDULE.log_snr(torch.arange(1000.0)).sigmoid().float()
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EPS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 12
CONTEXT = torch.zeros(2, 1, 1)


def network(x, time, context):
    """A small random network that depends on the time."""
    return x * 0.8 + torch.tanh(torch.conv2d(x, WEIGHT, padding=1) * (1 + time.view(-1, 1, 1, 1) / 1000))


def ours(solver, grid, x, prediction="eps", schedule=SCHEDULE, noise=no_noise):
    """The state after each step."""
    denoiser = Denoiser(network, schedule, Prediction(prediction))
    return [state.x for state in solver(lambda x, t: denoiser(x, t, CONTEXT), x, grid, noise)]


def theirs(scheduler, x, noise=None):
    """The sample after each call of the network, in the scheduler's own scaling."""
    states = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t.expand(2).float(), CONTEXT), t, x, return_dict=False)[0]
        states.append(x)
    return states


def exact(scheduler):
    scheduler.alphas_cumprod = ALPHA_BAR
    return scheduler


def assert_same(actual, expected):
    """To 1e-5 of the largest number of each state."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-5 * float(e.abs().max()))


@pytest.mark.parametrize(
    ("schedule", "name", "start", "end"),
    [
        (scaled_linear(), "scaled_linear", 0.00085, 0.012),
        (linear(), "linear", 0.0001, 0.02),
        (cosine(), "squaredcos_cap_v2", 0.0001, 0.02),
    ],
)
def test_schedules(schedule, name, start, end):
    """To 2e-5, the rounding of diffusers' float32 product of a thousand factors."""
    scheduler = DDPMScheduler(beta_start=start, beta_end=end, beta_schedule=name)
    alpha_bar = schedule.alpha(torch.arange(1000.0)).square().float()
    torch.testing.assert_close(alpha_bar, scheduler.alphas_cumprod, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 3, 10, 30])
@pytest.mark.parametrize("spacing", [trailing, leading, linspace])
def test_spacings(spacing, steps):
    """DDIM's; diffusers' linspace of one step is index 0, which is no noise at all, ours the last index."""
    scheduler = DDIMScheduler(**SD, steps_offset=1, timestep_spacing=spacing.__name__)
    scheduler.set_timesteps(steps)
    expected = [999] if (spacing, steps) == (linspace, 1) else scheduler.timesteps.tolist()
    assert spacing(SCHEDULE, steps).tolist() == expected


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("spacing", [trailing, leading])
def test_ddim(prediction, spacing):
    """With SD's set_alpha_to_one=False the walk ends at index 0 instead of the clean end."""
    kind = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction]
    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": kind}
    scheduler = DDIMScheduler(**SD, **settings, timestep_spacing=spacing.__name__)
    exact(scheduler).final_alpha_cumprod = ALPHA_BAR[0]
    scheduler.set_timesteps(20)
    grid = Grid.of(SCHEDULE, torch.cat((spacing(SCHEDULE, 20), torch.zeros(1))), clean=False)
    assert_same(ours(ddim, grid, EPS, prediction), theirs(scheduler, EPS))


def test_ddpm(monkeypatch):
    """The same noise is given to both; diffusers calls for it in order."""
    noises = torch.randn(20, *EPS.shape, generator=torch.Generator().manual_seed(2))
    queue = iter(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **settings: next(queue))
    scheduler = DDPMScheduler(**SD, clip_sample=False, steps_offset=1, timestep_spacing="leading")
    scheduler.alphas_cumprod = ALPHA_BAR
    scheduler.set_timesteps(20)
    grid = Grid.of(SCHEDULE, leading(SCHEDULE, 20))
    assert_same(ours(ddpm, grid, EPS, noise=lambda step: noises[step]), theirs(scheduler, EPS))


@pytest.mark.parametrize("spacing", [trailing, leading])
def test_euler(spacing):
    """Its state is x / alpha. Between indices, where its `linspace` lies, diffusers interpolates sigma,
    not log-SNR; these two spacings stay on indices."""
    scheduler = exact(EulerDiscreteScheduler(**SD, steps_offset=1, timestep_spacing=spacing.__name__))
    scheduler.set_timesteps(20)
    grid = Grid.of(SCHEDULE, spacing(SCHEDULE, 20))
    start = grid.start(EPS)
    expected = theirs(scheduler, start / grid.points[0].alpha)
    scaled = [x / point.alpha for x, point in zip(ours(euler, grid, start), grid.points[1:], strict=True)]
    assert_same(scaled, expected)


def test_heun_tends_to_the_same_end():
    """diffusers takes Karras et al.'s variables, x / alpha against sigma / alpha, where ours adds sigma to
    both alphas: the two differ at finite steps, and by less the more steps there are."""

    def gap(steps):
        times = linspace(SCHEDULE, steps)
        scheduler = exact(HeunDiscreteScheduler(**SD))
        scheduler.set_timesteps(timesteps=times.long().tolist())
        grid = Grid.of(SCHEDULE, times)
        end = theirs(scheduler, grid.start(EPS) / grid.points[0].alpha)[-1]
        return float((ours(heun, grid, grid.start(EPS))[-1] - end).abs().mean() / end.abs().mean())

    assert gap(100) < 0.1 * gap(25) < 0.01


def test_dpmpp_2m():
    """diffusers' `leading` and `linspace` of this class are not those of its other classes; `trailing` is."""
    scheduler = exact(DPMSolverMultistepScheduler(**SD, timestep_spacing="trailing"))
    scheduler.alpha_t, scheduler.sigma_t = ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt()
    scheduler.set_timesteps(20)
    grid = Grid.of(SCHEDULE, trailing(SCHEDULE, 20))
    assert_same(ours(dpmpp_2m, grid, EPS), theirs(scheduler, EPS))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(shift):
    """diffusers' default sigmas end at 1/1000; Flux's, used here, at 1/steps, as `trailing` does."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=trailing(Flow(), 20).tolist())
    schedule = Flow(shift)
    grid = Grid.of(schedule, trailing(schedule, 20))
    assert_same(ours(euler, grid, EPS, "flow", schedule), theirs(scheduler, EPS))


def test_flow_heun():
    """diffusers takes no sigmas of one's own here, so the walk is along its own times."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(20)
    times = torch.unique_consecutive(scheduler.timesteps.double()) / 1000
    expected = theirs(scheduler, EPS)
    grid = Grid.of(Flow(), times)
    assert_same(ours(heun, grid, EPS, "flow", Flow()), expected[1::2] + expected[-1:])
