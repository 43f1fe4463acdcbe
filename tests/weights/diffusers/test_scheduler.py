from pathlib import Path
from typing import Any

import pytest

from ldm.weights.diffusers.samplers import SAMPLERS
from ldm.weights.diffusers.scheduler import RESCALING, scheduler_from, scheduler_to
from ldm.weights.diffusers.scheduler_fields import FIELDS

HERE = Path("scheduler_config.json")
# As published with runwayml/stable-diffusion-v1-5.
PNDM = {
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
SCHEDULE = {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}


def test_the_scheduler_of_sd15_is_plms_ending_at_the_noise_of_the_first_time() -> None:
    sampling = {"sampler": "pndm", "spacing": "leading", "sampler_options": {"prk": False}, "final_sigma": "min"}
    assert scheduler_from(PNDM, HERE) == (SCHEDULE, "eps", sampling)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_samplers_and_predictions_survive_a_round_trip(sampler: str, prediction: str) -> None:
    model = {"schedule": SCHEDULE, "prediction": prediction, "time": "index"}
    sampling = {"sampler": sampler, "spacing": "trailing"}
    schedule, read, back = scheduler_from(scheduler_to(model | {"sampling": sampling}, HERE), HERE)
    spacing = "linspace" if sampler == "dpmpp_2s" else "trailing"  # diffusers' Singlestep has no timestep_spacing
    expected = {"sampler": "heun" if sampler == "edm" else sampler, "spacing": spacing}
    assert (schedule, read, back | expected) == (SCHEDULE, prediction, back)


OPTIONS: list[dict[str, Any]] = [
    {"sampler": "pndm", "sampler_options": {"prk": False}},
    {"sampler": "ddim", "final_sigma": "min"},
    {"sampler": "ddpm", "sampler_options": {"variance": "beta"}},
    {"sampler": "dpmpp_2m", "sampler_options": {"rule": "heun", "lower_order_final": False}, "final_sigma": "min"},
    {"sampler": "dpmpp_2m_sde", "sampler_options": {"rule": "heun"}},
    {"sampler": "unipc", "sampler_options": {"order": 3, "variant": "bh1", "lower_order_final": False}},
    {"sampler": "deis", "sampler_options": {"order": 2, "variable": "log_ratio"}, "final_sigma": "min"},
]


@pytest.mark.parametrize("settings", OPTIONS, ids=lambda settings: settings["sampler"])
def test_sampler_options_that_diffusers_has_survive_a_round_trip(settings: dict[str, Any]) -> None:
    model = {"schedule": SCHEDULE, "prediction": "eps", "time": "index"}
    sampling = {"spacing": "trailing"} | settings
    assert scheduler_from(scheduler_to(model | {"sampling": sampling}, HERE), HERE)[2] == sampling


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *((kind, {"use_beta_sigmas": True}) for kind in FIELDS if "use_beta_sigmas" in FIELDS[kind].fixed),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}),
        ("DPMSolverMultistepScheduler", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
        ("UniPCMultistepScheduler", {"predict_x0": False}),
        ("UniPCMultistepScheduler", {"disable_corrector": [0]}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        ("DDIMScheduler", {"thresholding": True}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        ("DDIMScheduler", {"a_field_of_tomorrow": 1}),
        ("DDIMScheduler", {"num_train_timesteps": "1000"}),
        ("DDIMScheduler", {"num_train_timesteps": 10**9}),
        ("DDIMScheduler", {"beta_end": float("nan")}),
        ("DDIMScheduler", {"set_alpha_to_one": "yes"}),
        ("DDIMScheduler", {"trained_betas": [0.1]}),
        ("DDIMScheduler", {"trained_betas": [0.1, 1.5] * 500}),
        ("DDIMScheduler", {"trained_betas": ["0.1", 0.2] * 500}),
        ("DDIMScheduler", {"trained_betas": 0.1}),
    ],
)
def test_a_field_that_ldm_cannot_honour_is_refused_by_name(kind: str, field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        scheduler_from({"_class_name": kind, **field}, HERE)


def test_fields_that_are_left_over_from_another_class_have_no_effect() -> None:
    left_over = {"skip_prk_steps": True, "solver_order": 3, "use_beta_sigmas": True, "final_sigmas_type": "sigma_min"}
    config = {"_class_name": "DDIMScheduler"}
    assert scheduler_from(config | left_over, HERE) == scheduler_from(config, HERE)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras", "exponential"])
@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "linear", "beta_start": 1e-4, "beta_end": 0.02, "steps": 500},
        {"name": "cosine", "offset": 0.008, "beta_max": 0.999, "steps": 1000},
        {"name": "table", "betas": [0.001, 0.01, 0.1, 0.2]},
    ],
)
def test_spacings_and_schedules_survive_a_round_trip(spacing: str, schedule: dict[str, Any]) -> None:
    sampling = {"sampler": "dpmpp_2m", "spacing": spacing}
    model = {"schedule": schedule, "prediction": "v", "time": None, "sampling": sampling}
    back = scheduler_from(scheduler_to(model, HERE), HERE)
    assert (back[0], back[1], back[2] | sampling) == (schedule, "v", back[2])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr_survives_a_round_trip_if_diffusers_supports_it(sampler: str) -> None:
    model = {"schedule": {"name": "zero_terminal_snr", "schedule": SCHEDULE}, "prediction": "v", "time": "index"}
    model["sampling"] = sampling = {"sampler": sampler, "spacing": "trailing"}
    if SAMPLERS[sampler][0] in RESCALING:
        schedule, prediction, back = scheduler_from(scheduler_to(model, HERE), HERE)
        assert (schedule, prediction, back | sampling) == (model["schedule"], "v", back)
        return
    with pytest.raises(ValueError, match="for which diffusers has no scheduler"):
        scheduler_to(model, HERE)


def test_a_flow_schedule_survives_a_round_trip() -> None:
    model = {"schedule": {"name": "flow", "shift": 3.0}, "prediction": "flow", "time": "thousand"}
    sampling = {"sampler": "heun", "spacing": "trailing"}
    back = scheduler_from(scheduler_to(model | {"sampling": sampling}, HERE), HERE)
    assert back == (model["schedule"], "flow", sampling)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "sigmoid"},
        {"rescale_betas_zero_snr": True},
        {"_class_name": "VQDiffusionScheduler"},
        {"prediction_type": "flow_prediction"},
    ],
)
def test_a_scheduler_that_ldm_does_not_have_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))[:7].replace("[", r"\[")):
        scheduler_from(PNDM | changes, HERE)


@pytest.mark.parametrize(
    "changes",
    [
        {"time": "log_sigma"},
        {"prediction": "flow"},
        {"schedule": {"name": "cosine", "offset": 0.1, "beta_max": 0.999, "steps": 9}},
    ],
)
def test_settings_that_diffusers_does_not_have_are_refused(changes: dict[str, Any]) -> None:
    model = {
        "schedule": SCHEDULE,
        "prediction": "v",
        "time": None,
        "sampling": {"sampler": "ddim", "spacing": "leading"},
    }
    with pytest.raises(ValueError, match="for which diffusers has no scheduler"):
        scheduler_to(model | changes, HERE)
