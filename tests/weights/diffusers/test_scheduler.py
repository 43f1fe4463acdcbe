from pathlib import Path
from typing import Any

import pytest

from ldm.weights.diffusers.scheduler import RESCALING, SAMPLERS, scheduler_from, scheduler_to

HERE = Path("scheduler_config.json")
# As published with runwayml/stable-diffusion-v1-5.
PNDM = {
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
SCHEDULE = {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}


def test_the_scheduler_of_sd15_is_pndm_with_leading_spacing() -> None:
    assert scheduler_from(PNDM, HERE) == (SCHEDULE, "eps", {"sampler": "pndm", "spacing": "leading"})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_samplers_and_predictions_survive_a_round_trip(sampler: str, prediction: str) -> None:
    model = {"schedule": SCHEDULE, "prediction": prediction, "time": "index"}
    sampling = {"sampler": sampler, "spacing": "trailing"}
    back = scheduler_from(scheduler_to(model | {"sampling": sampling}, HERE), HERE)
    assert back == (SCHEDULE, prediction, sampling | ({"sampler": "heun"} if sampler == "edm" else {}))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras", "exponential"])
@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "linear", "beta_start": 1e-4, "beta_end": 0.02, "steps": 500},
        {"name": "cosine", "offset": 0.008, "beta_max": 0.999, "steps": 1000},
    ],
)
def test_spacings_and_schedules_survive_a_round_trip(spacing: str, schedule: dict[str, Any]) -> None:
    sampling = {"sampler": "dpmpp_2m", "spacing": spacing}
    model = {"schedule": schedule, "prediction": "v", "time": None, "sampling": sampling}
    assert scheduler_from(scheduler_to(model, HERE), HERE) == (schedule, "v", sampling)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr_survives_a_round_trip_if_diffusers_supports_it(sampler: str) -> None:
    model = {"schedule": {"name": "zero_terminal_snr", "schedule": SCHEDULE}, "prediction": "v", "time": "index"}
    model["sampling"] = sampling = {"sampler": sampler, "spacing": "trailing"}
    if SAMPLERS[sampler][0] in RESCALING:
        assert scheduler_from(scheduler_to(model, HERE), HERE) == (model["schedule"], "v", sampling)
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
        {"trained_betas": [0.1]},
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
