"""Compares dpmpp_3m_sde with k-diffusion's and diffusers' rules on normal data of known standard deviation."""

from itertools import pairwise
from math import exp, expm1

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from ldm.sampling.compatibility import MAX_WIDTH, VISIBLE_WIDTH, Setup, cautions, contradictions
from ldm.sampling.driver import get_solver
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import get_spacing
from tests.parity.trajectories import SD

SCHEDULE = scaled_linear()
SPREAD = 1.0  # standard deviation of the data, as of Stable Diffusion's latents
SHAPE = (1, 1, 128, 128)  # 16,384 numbers, whose standard deviation has an error of 0.6 %


def denoised(x: Tensor, sigma: float) -> Tensor:
    """Returns the exact denoiser's output in the scaling of k-diffusion, x0 + sigma·eps."""
    return x * (SPREAD**2 / (SPREAD**2 + sigma**2))


def noise(draw: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(draw + 1))


def width_of_ldm(spacing: str, steps: int, **options: bool) -> float:
    grid = Grid.of(SCHEDULE, get_spacing(spacing, options)(SCHEDULE, steps))
    setup = Setup(SCHEDULE, Prediction("eps"))

    def denoise(x: Tensor, t: float) -> Tensor:
        point = setup.at(t)
        return denoised(x / point.alpha, point.ratio)

    *_, last = get_solver("dpmpp_3m_sde")(denoise, grid.start(noise(-1)), grid, noise)
    return float(last.x.std()) / SPREAD


def width_of_k_diffusion(spacing: str, steps: int) -> float:
    """k-diffusion's sample_dpmpp_3m_sde at eta = 1, with independent noise in place of a Brownian path's increments."""
    grid = Grid.of(SCHEDULE, get_spacing(spacing)(SCHEDULE, steps))
    sigmas = [point.ratio for point in grid.points]
    x = noise(-1) * sigmas[0]
    earlier: list[tuple[Tensor, float]] = []
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        now = denoised(x, sigma)
        if following == 0:
            return float(now.std()) / SPREAD
        h = -torch.tensor(following / sigma, dtype=torch.float64).log().item()
        h_eta = 2 * h
        x = exp(-h_eta) * x + -expm1(-h_eta) * now
        if len(earlier) > 1:
            (d1, h1), (d2, h2) = earlier[:2]
            r0, r1 = h1 / h, h2 / h
            first, second = (now - d1) / r0, (d1 - d2) / r1
            slope = first + (first - second) * r0 / (r0 + r1)
            curve = (first - second) / (r0 + r1)
            phi_2 = expm1(-h_eta) / h_eta + 1
            x = x + phi_2 * slope - (phi_2 / h_eta - 0.5) * curve
        elif earlier:
            [(d1, h1)] = earlier
            x = x + (expm1(-h_eta) / h_eta + 1) * (now - d1) / (h1 / h)
        x = x + noise(step) * following * (-expm1(-2 * h)) ** 0.5
        earlier = [(now, h), *earlier[:1]]
    raise AssertionError("the grid ends at sigma = 0")


def width_of_diffusers(spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> float:
    draws = iter(range(1000))
    module = "diffusers.schedulers.scheduling_dpmsolver_multistep.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: noise(next(draws)).float())
    scheduler = DPMSolverMultistepScheduler(
        **SD, solver_order=3, algorithm_type="sde-dpmsolver++", solver_type="heun", timestep_spacing=spacing,
        steps_offset=1, prediction_type="sample",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    x = noise(-1).float()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        scaled = x * (1 + sigma**2) ** 0.5  # x0 + sigma·eps
        x = scheduler.step(denoised(scaled, sigma), t, x).prev_sample
    return float(x.std()) / SPREAD


SPACED = [(spacing, steps) for spacing in ("leading", "linspace") for steps in (15, 20, 30)]


@pytest.mark.parametrize(("spacing", "steps"), SPACED)
def test_the_default_rule_is_more_accurate_than_that_of_k_diffusion(spacing, steps):
    assert 0 < width_of_ldm(spacing, steps) - 1 < 0.75 * (width_of_k_diffusion(spacing, steps) - 1)


@pytest.mark.parametrize(("spacing", "steps"), SPACED)
def test_the_default_rule_is_more_accurate_than_that_of_diffusers(spacing, steps, monkeypatch):
    """Uses diffusers' grid, whose last call is at index 1000 / (steps + 1), where all rules are nearly exact."""
    theirs = width_of_diffusers(spacing, steps, monkeypatch)
    assert abs(width_of_ldm(spacing, steps, extra=True) - 1) < 0.75 * abs(theirs - 1)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_an_additional_step_never_makes_samples_worse(spacing):
    widths = [width_of_ldm(spacing, steps) for steps in range(11, 24)]
    assert all(more <= less + 0.02 for less, more in pairwise(widths))  # 0.02 allows for sampling error


def test_other_rules_are_refused_or_warned_about_when_their_error_is_visible():
    def setup(steps: int, **options: object) -> Setup:
        sampling = {"sampler": "dpmpp_3m_sde", "spacing": "leading", "steps": steps, "sampler_options": options}
        return Setup(SCHEDULE, Prediction("eps"), sampling=sampling)

    assert VISIBLE_WIDTH < width_of_k_diffusion("leading", 20) < MAX_WIDTH
    [refusal] = contradictions(setup(20, curvature="half", lower_order_final=False))
    assert "times that of the data; use sampler=dpmpp_2m" in refusal
    [caution] = cautions(setup(30))
    assert "adds visible noise" in caution and contradictions(setup(30)) == []
    assert cautions(setup(100)) == []
