"""Multistep solvers compared with those of diffusers (see `trajectories`)."""

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
    at_integer_times,
    fixed_noise,
    grid_to_index_0,
    noise_queue,
    ours,
    theirs,
    unscaled,
    with_sigmas,
    with_table,
)

# Spacings, and the equivalent settings of diffusers' DPM-Solver, DEIS and UniPC classes. With fewer than 15 steps the
# order is lowered towards the end.
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
    ],
)
def test_dpmpp_multistep_solvers_match_diffusers(monkeypatch, spacing, steps, settings, solver, more):
    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.randn_tensor", noise_queue())
    scheduler = with_table(DPMSolverMultistepScheduler(**SD, **settings, **more))
    scheduler.set_timesteps(steps)
    grid = Grid.of(SCHEDULE, spacing(SCHEDULE, steps))
    actual = ours(solver, grid, EPS, noise=fixed_noise(), model=at_integer_times)
    assert_same(actual, theirs(with_sigmas(scheduler, grid), EPS))


@every_spacing
def test_dpmpp_3m_sde_with_the_curvature_of_diffusers_matches_it(monkeypatch, spacing, steps, settings):
    """ldm lowers the order in the last steps for any number of steps, diffusers only for fewer than 15."""
    solver = partial(dpmpp_3m_sde, curvature="diffusers", lower_order_final=steps < 15)
    more = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"}
    test_dpmpp_multistep_solvers_match_diffusers(monkeypatch, spacing, steps, settings, solver, more)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_dpmpp_2m_matches_diffusers_for_other_prediction_types(prediction):
    kind = {"v": "v_prediction", "x0": "sample"}[prediction]
    scheduler = with_table(DPMSolverMultistepScheduler(**SD, timestep_spacing="trailing", prediction_type=kind))
    scheduler.set_timesteps(20)
    grid = Grid.of(SCHEDULE, trailing(SCHEDULE, 20))
    assert_same(ours(dpmpp_2m, grid, EPS, prediction), theirs(with_sigmas(scheduler, grid), EPS))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("steps", [5, 18])
def test_dpmpp_on_the_edm_schedule_matches_diffusers(order, steps):
    settings = {"sigma_data": 1.0, "prediction_type": "v_prediction", "solver_order": order}
    scheduler = EDMDPMSolverMultistepScheduler(**settings)
    scheduler.set_timesteps(steps)
    schedule = EDM()
    grid = Grid.of(schedule, karras(schedule, steps))
    start = grid.start(EPS)
    expected = theirs(with_sigmas(scheduler, grid), start / grid.points[0].alpha)
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
def test_dpmpp_2s_on_grid_matches_diffusers(spacing, steps, settings, dtype):
    scheduler = with_table(DPMSolverSinglestepScheduler(**SD, **settings))
    scheduler.set_timesteps(steps)
    grid, x = Grid.of(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    solver = partial(dpmpp_2s, on_grid=True)
    assert_same(ours(solver, grid, x, model=at_integer_times), theirs(with_sigmas(scheduler, grid), x))


@pytest.mark.parametrize("dtype", DTYPES)
@every_spacing
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_matches_diffusers(spacing, steps, settings, order, dtype):
    scheduler = with_table(UniPCMultistepScheduler(**SD, **settings, solver_order=order))
    scheduler.set_timesteps(steps)
    grid, x = Grid.of(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    solver = partial(unipc, order=order)
    assert_same(ours(solver, grid, x, model=at_integer_times), theirs(with_sigmas(scheduler, grid), x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spacing", "steps", "settings"), SPACED[:3])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_bh1_matches_diffusers(spacing, steps, settings, order, dtype):
    """The grid ends at index 0, because diffusers' bh1 multiplies infinity by 0 in the step to the clean end."""
    more = {"solver_order": order, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}
    scheduler = with_table(UniPCMultistepScheduler(**SD, **settings, **more))
    scheduler.set_timesteps(steps)
    grid, x = grid_to_index_0(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    solver = partial(unipc, order=order, variant="bh1")
    assert_same(ours(solver, grid, x), theirs(with_sigmas(scheduler, grid), x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unip_matches_diffusers(dtype):
    scheduler = with_table(UniPCMultistepScheduler(**SD, timestep_spacing="trailing", disable_corrector=[*range(20)]))
    scheduler.set_timesteps(20)
    grid, x = Grid.of(SCHEDULE, trailing(SCHEDULE, 20)), EPS.to(dtype)
    assert_same(ours(partial(unipc, corrector=False), grid, x), theirs(with_sigmas(scheduler, grid), x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spacing", "steps", "settings"), SPACED[:3])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_matches_diffusers(spacing, steps, settings, order, dtype):
    """diffusers' DEIS ends at index 0, and uses log(sigma/alpha) instead of the time of the paper."""
    scheduler = with_table(DEISMultistepScheduler(**SD, **settings, solver_order=order))
    scheduler.set_timesteps(steps)
    grid, x = grid_to_index_0(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    solver = partial(deis, order=order, variable="log_ratio")
    assert_same(ours(solver, grid, x), theirs(with_sigmas(scheduler, grid), x))


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
def test_lms_matches_diffusers(spacing, steps, settings, dtype):
    scheduler = with_table(LMSDiscreteScheduler(**SD, **settings))
    scheduler.set_timesteps(steps)
    grid = Grid.of(SCHEDULE, spacing(SCHEDULE, steps))
    start = grid.start(EPS.to(dtype))
    expected = theirs(with_sigmas(scheduler, grid), start / grid.points[0].alpha)
    assert_same(unscaled(ours(lms, grid, start), grid), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("spacing", [leading, trailing])
def test_pndm_matches_diffusers_as_used_by_stable_diffusion(spacing, steps, dtype):
    """skip_prk_steps calls the network twice at the second time; the first call belongs to ldm's first step."""
    scheduler = with_table(PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1, timestep_spacing=spacing.__name__))
    scheduler.final_alpha_cumprod = ALPHA_BAR[0]
    scheduler.set_timesteps(steps)
    grid, x = grid_to_index_0(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    assert_same(ours(partial(pndm, prk=False), grid, x), theirs(scheduler, x)[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("spacing", [leading, trailing])
def test_pndm_with_runge_kutta_steps_matches_diffusers(spacing, steps, dtype):
    scheduler = with_table(PNDMScheduler(**SD, steps_offset=1, timestep_spacing=spacing.__name__))
    scheduler.final_alpha_cumprod = ALPHA_BAR[0]
    scheduler.set_timesteps(steps)
    grid, x = grid_to_index_0(SCHEDULE, spacing(SCHEDULE, steps)), EPS.to(dtype)
    expected = theirs(scheduler, x)  # three steps of four calls each, then one call per step
    assert_same(ours(pndm, grid, x), expected[3:12:4] + expected[12:])
