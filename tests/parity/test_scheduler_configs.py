"""Compares complete trajectories of scheduler_config.json files in ldm and in diffusers.

diffusers' tables and sigmas are float32, with few correct digits at the first indices, which bounds the agreement.
"""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ldm.diffusion.schedule import from_config
from ldm.sampling.driver import get_solver
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import get_spacing
from ldm.weights.diffusers.scheduler import scheduler_from
from tests.parity.trajectories import EPS, SD, at_integer_times, fixed_noise, network, noise_queue, ours, theirs

PER_ALPHA = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"
# As published with Stable Diffusion 1.x, with every field that pipelines wrote at that time.
SD1 = {"_class_name": "PNDMScheduler", "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
DPM = "DPMSolverMultistepScheduler"
SDE = {"_class_name": DPM, "algorithm_type": "sde-dpmsolver++"}
OWN_BETAS = torch.linspace(0.03, 0.11, 1000, dtype=torch.float64).pow(2).tolist()
CONFIGS: list[dict[str, Any]] = [
    SD1,
    SD1 | {"skip_prk_steps": False},
    {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "timestep_spacing": "trailing", "set_alpha_to_one": True},
    {"_class_name": "DDIMScheduler", "set_alpha_to_one": False},
    {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"},
    {"_class_name": "DDPMScheduler"},
    {"_class_name": "DDPMScheduler", "variance_type": "fixed_small_log"},
    {"_class_name": "EulerDiscreteScheduler"},
    {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min", "timestep_spacing": "leading"},
    {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
    {"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"},
    {"_class_name": "EulerAncestralDiscreteScheduler"},
    {"_class_name": "HeunDiscreteScheduler", "timestep_spacing": "trailing"},
    {"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True},
    {"_class_name": DPM},
    {"_class_name": DPM, "timestep_spacing": "leading", "solver_type": "heun", "lower_order_final": False},
    {"_class_name": DPM, "solver_order": 1, "timestep_spacing": "trailing"},
    {"_class_name": DPM, "solver_order": 3, "final_sigmas_type": "sigma_min"},
    {"_class_name": DPM, "use_lu_lambdas": True},
    {"_class_name": DPM, "use_karras_sigmas": True, "solver_type": "bh2"},
    SDE,
    SDE | {"solver_order": 1, "timestep_spacing": "leading"},
    {"_class_name": "DPMSolverSinglestepScheduler"},
    {"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 1},
    {"_class_name": "UniPCMultistepScheduler"},
    {"_class_name": "UniPCMultistepScheduler", "solver_order": 3, "timestep_spacing": "trailing"},
    {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    {"_class_name": "DEISMultistepScheduler", "timestep_spacing": "trailing"},
    {"_class_name": "DEISMultistepScheduler", "solver_order": 3, "use_karras_sigmas": True},
    {"_class_name": "DDIMScheduler", "trained_betas": OWN_BETAS},
    {"_class_name": "EulerDiscreteScheduler", "trained_betas": OWN_BETAS, "use_karras_sigmas": True},
]


def label(config: dict[str, Any]) -> str:
    return " ".join(name if isinstance(value, list) else str(value) for name, value in config.items())


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_a_scheduler_config_is_sampled_as_diffusers_does(config: dict[str, Any], monkeypatch: Any) -> None:
    config, steps = SD | config, 20
    schedule, prediction, sampling = scheduler_from(config, Path("scheduler_config.json"))
    table = from_config(schedule)
    times = get_spacing(sampling["spacing"], sampling.get("spacing_options"))(table, steps)
    grid = Grid.to_final(table, times, sampling.get("final_sigma", "zero"))
    # the Stable Diffusion pipelines always set these two, regardless of the file
    reference = getattr(diffusers, config["_class_name"]).from_config(config, steps_offset=1, clip_sample=False)
    module = __import__(type(reference).__module__, fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", noise_queue())
    reference.set_timesteps(steps)

    first = grid.points[0]
    scaled = config["_class_name"] in PER_ALPHA
    integral = "Multistep" in config["_class_name"] or "Singlestep" in config["_class_name"]
    calls = 0

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (at_integer_times if integral else network)(*args)

    solver = get_solver(sampling["sampler"], sampling.get("sampler_options"))
    mine = ours(solver, grid, grid.start(EPS), prediction, fixed_noise(), counted)[-1]
    expected = theirs(reference, EPS * (first.ratio if scaled else first.sigma))[-1]
    if scaled:
        mine = mine / grid.points[-1].alpha
    repeated = bool(reference.timesteps[-1] == 0) and sampling.get("final_sigma") == "min"  # a step of length zero
    assert calls == len(reference.timesteps) - repeated
    torch.testing.assert_close(mine, expected, rtol=0, atol=3e-4 * float(expected.abs().max()))
