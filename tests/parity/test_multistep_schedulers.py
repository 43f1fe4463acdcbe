"""Solvers that remember, against diffusers' (see `trajectories`)."""

from functools import partial

import pytest
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from ldm.diffusion.schedule import EDM
from ldm.sampling.grid import Grid
from ldm.sampling.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, unipc
from ldm.sampling.noise_multistep import deis, lms, pndm
from ldm.sampling.one_step import dpmpp_2s
from ldm.sampling.spacing import karras, leading, linspace, log_snr, trailing
from tests.parity.trajectories import (
    ALPHA_BAR,
    DTYPES,
    EPS,
    SCHEDULE,
    SD,
    assert_same,
    at_whole_times,
    drawn,
    exact,
    ours,
    queued,
    theirs,
    unscaled,
    walking,
    with_end,
)

# Spacings and the settings of diffusers' DPM-Solver, DEIS and UniPC classes that lay them out. On less than 15
# steps the order is lowered towards the end.
SPACED = [
    (trailing, 20, {"timestep_spacing": "trailing"}),
    (partial(leading, extra=True), 7, {"timestep_spacing": "leading", "steps_offset": 1}),
    (partial(linspace, extra=True), 15, {"timestep_spacing": "linspace"}),
    (karras, 10, {"use_karras_sigmas": True}),
]
every_spacing = pytest.mark.parametrize(("spacing", "steps", "settings"), SPACED)


@every_spacing
@pytest.mark.parametrize(
    ("solver", "more"),
    [
        (dpmpp_2m, {}),
        (partial(dpmpp_2m, rule="heun"), {"solver_type": "heun"}),
        (partial(dpmpp_3m, rule="midpoint", curvature="half"), {"solver_order": 3}),
        (partial(dpmpp_3m, curvature="half"), {"solver_order": 3, "solver_type": "heun"}),
        (dpmpp_2m_sde, {"algorithm_type": "sde-dpmsolver++"}),
        (partial(dpmpp_2m_sde, rule="heun"), {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
        (
            partial(dpmpp_3m_sde, curvature="diffusers"),
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"},
        ),
    ],
)
def test_dpm_solver_multistep(monkeypatch, spacing, steps, settings, solver, more):
    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.randn_tensor", queued())
    scheduler = exact(DPMSolverMultistepScheduler(**SD, **settings, **more))
    scheduler.set_timesteps(steps)
    grid = Grid.of(SCHEDULE, spacing(SCHEDULE, steps))
    actual = ours(solver, grid, EPS, noise=drawn(), model=at_whole_times)
    assert_same(actual, theirs(walking(scheduler, grid), EPS))


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_dpm_solver_multistep_of_other_predictions(prediction):
    kind = {"v": "v_prediction", "x0": "sample"}[prediction]
    scheduler = exact(DPMSolverMultistepScheduler(**SD, timestep_spacing="trailing", prediction_type=kind))
    scheduler.set_timesteps(20)
    grid = Grid.of(SCHEDULE, trailing(SCHEDULE, 20))
    assert_same(ours(dpmpp_2m, grid, EPS, prediction), theirs(walking(scheduler, grid), EPS))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("steps", [5, 18])
def test_edm_dpm_solver_multistep(order, steps):
    settings = {"sigma_data": 1.0, "prediction_type": "v_prediction", "solver_order": order}
    scheduler = EDMDPMSolverMultistepScheduler(**settings)
    scheduler.set_timesteps(steps)
    schedule = EDM()
    grid = Grid.of(schedule, karras(schedule, steps))
    start = grid.start(EPS)
    expected = theirs(walking(scheduler, grid), start / grid.points[0].alpha)
    solver = dpmpp_2m if order == 2 else partial(dpmpp_3m, rule="midpoint", curvature="half")
    assert_same(unscaled(ours(solver, grid, start, "v", time="log_sigma"), grid), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("spacing", "steps", "settings"),
    [
        (partial(linspace, extra=True), 10, {}),
        (partial(linspace, extra=True), 7, {}),
        (karras, 15, {"use_karras_sigmas": True}),
    ],
)
def test_dpm_solver_singlestep(spacing, steps, settings, dtype):
    scheduler = exact(DPMSolverSinglestepScheduler(**SD, **settings))
    scheduler.set_timesteps(steps)
    grid, x = Grid.of(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    solver = partial(dpmpp_2s, on_grid=True)
    assert_same(ours(solver, grid, x, model=at_whole_times), theirs(walking(scheduler, grid), x))


@pytest.mark.parametrize("dtype", DTYPES)
@every_spacing
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(spacing, steps, settings, order, dtype):
    scheduler = exact(UniPCMultistepScheduler(**SD, **settings, solver_order=order))
    scheduler.set_timesteps(steps)
    grid, x = Grid.of(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    solver = partial(unipc, order=order)
    assert_same(ours(solver, grid, x, model=at_whole_times), theirs(walking(scheduler, grid), x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spacing", "steps", "settings"), SPACED[:3])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_of_the_other_variant(spacing, steps, settings, order, dtype):
    """To index 0, since to the clean end diffusers' bh1 multiplies infinity by 0."""
    more = {"solver_order": order, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}
    scheduler = exact(UniPCMultistepScheduler(**SD, **settings, **more))
    scheduler.set_timesteps(steps)
    grid, x = with_end(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    solver = partial(unipc, order=order, variant="bh1")
    assert_same(ours(solver, grid, x), theirs(walking(scheduler, grid), x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unip(dtype):
    scheduler = exact(UniPCMultistepScheduler(**SD, timestep_spacing="trailing", disable_corrector=[*range(20)]))
    scheduler.set_timesteps(20)
    grid, x = Grid.of(SCHEDULE, trailing(SCHEDULE, 20)), EPS.to(dtype)
    assert_same(ours(partial(unipc, corrector=False), grid, x), theirs(walking(scheduler, grid), x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spacing", "steps", "settings"), SPACED[:3])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(spacing, steps, settings, order, dtype):
    """diffusers' ends at index 0, and has log(sigma/alpha) for the paper's time."""
    scheduler = exact(DEISMultistepScheduler(**SD, **settings, solver_order=order))
    scheduler.set_timesteps(steps)
    grid, x = with_end(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    solver = partial(deis, order=order, variable="log_ratio")
    assert_same(ours(solver, grid, x), theirs(walking(scheduler, grid), x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("spacing", "steps", "settings"),
    [
        (trailing, 20, {"timestep_spacing": "trailing"}),
        (leading, 7, {"timestep_spacing": "leading", "steps_offset": 1}),
        (karras, 10, {"use_karras_sigmas": True}),
        (log_snr, 13, {"use_exponential_sigmas": True}),
    ],
)
def test_lms(spacing, steps, settings, dtype):
    scheduler = exact(LMSDiscreteScheduler(**SD, **settings))
    scheduler.set_timesteps(steps)
    grid = Grid.of(SCHEDULE, spacing(SCHEDULE, steps))
    start = grid.start(EPS.to(dtype))
    expected = theirs(walking(scheduler, grid), start / grid.points[0].alpha)
    assert_same(unscaled(ours(lms, grid, start), grid), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("spacing", [leading, trailing])
def test_pndm_as_stable_diffusion_runs_it(spacing, steps, dtype):
    """skip_prk_steps calls the network twice at the second time; the first of the two is our first step's."""
    scheduler = exact(PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1, timestep_spacing=spacing.__name__))
    scheduler.final_alpha_cumprod = ALPHA_BAR[0]
    scheduler.set_timesteps(steps)
    grid, x = with_end(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    assert_same(ours(partial(pndm, prk=False), grid, x), theirs(scheduler, x)[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("spacing", [leading, trailing])
def test_pndm_with_runge_kutta_steps(spacing, steps, dtype):
    scheduler = exact(PNDMScheduler(**SD, steps_offset=1, timestep_spacing=spacing.__name__))
    scheduler.final_alpha_cumprod = ALPHA_BAR[0]
    scheduler.set_timesteps(steps)
    grid, x = with_end(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    expected = theirs(scheduler, x)  # three steps of four calls each, then one a step
    assert_same(ours(pndm, grid, x), expected[3:12:4] + expected[12:])
