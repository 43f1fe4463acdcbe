"""Converts between diffusers' scheduler_config.json and ldm's schedule, prediction and sampler."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import shortened
from ldm.weights.diffusers.fields import Given
from ldm.weights.diffusers.samplers import sampler_from, sampler_to
from ldm.weights.diffusers.scheduler_fields import FIELDS

Config = dict[str, Any]

RESCALING = tuple(kind for kind, fields in FIELDS.items() if "rescale_betas_zero_snr" in fields.honoured)
LEADING = ("PNDMScheduler", "DDIMScheduler", "DDPMScheduler")  # their default timestep_spacing is "leading"
EXTRA = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
ROUNDED = (*LEADING, *EXTRA)  # classes that round the timesteps of timestep_spacing="linspace" to integers
BETA_ENDS = {"HeunDiscreteScheduler": (0.00085, 0.012), "DPMSolverSDEScheduler": (0.00085, 0.012)}  # by default
SPACINGS = "leading", "linspace", "trailing"
FINAL = {"zero": "zero", "sigma_min": "min"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
ZERO_SNR = "zero_terminal_snr"
MAX_TIMESTEPS = 100_000
SPACING_FLAGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_lu_lambdas": "log_snr"}
FLAGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "log_snr": "use_exponential_sigmas"}
COSINE = {"offset": 0.008, "beta_max": 0.999}  # the only cosine schedule in diffusers


def scheduler_from(config: Config, source: Path) -> tuple[Config, str, Config]:
    """Returns the schedule, prediction and sampling settings (sampler, spacing, end) of a scheduler_config.json.

    Raises ValueError for settings of the wrong type and those that ldm does not support, see `scheduler_fields`.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in FIELDS:
        raise ValueError(f"{source} has _class_name={name}, which ldm does not know; give one of {', '.join(FIELDS)}")
    FIELDS[name].check(config, source)
    given = Given(config, source)
    if name.startswith("FlowMatch"):
        sampler = {"sampler": "heun" if "Heun" in name else "euler", "spacing": "trailing"}
        return {"name": "flow", "shift": given.number("shift", 1.0)}, "flow", sampler
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    prediction = predictions[given.choice("prediction_type", "epsilon", *predictions)]
    return _schedule(name, given), prediction, sampler_from(name, given) | _spacing(name, given) | _final(name, given)


def _schedule(name: str, given: Given) -> Config:
    betas = {theirs: ours for ours, theirs in BETAS.items()}
    kind = betas[given.choice("beta_schedule", "linear", *betas)]
    start, end = BETA_ENDS.get(name, (0.0001, 0.02))
    ends = {"beta_start": given.number("beta_start", start, most=1), "beta_end": given.number("beta_end", end, most=1)}
    steps = {"steps": given.integer("num_train_timesteps", 1000, most=MAX_TIMESTEPS)}
    table = {"name": kind, **(COSINE if kind == "cosine" else ends), **steps}
    if given.has("trained_betas"):  # which replace beta_schedule and its ends
        table = {"name": "table", "betas": _betas(given, steps["steps"])}
    zero_snr = name in RESCALING and given.flag("rescale_betas_zero_snr", False)
    return {"name": ZERO_SNR, "schedule": table} if zero_snr else table


def _betas(given: Given, steps: int) -> list[float]:
    betas = given.numbers("trained_betas", most=MAX_TIMESTEPS)
    if len(betas) != steps:
        raise ValueError(
            f"{given.source} has {len(betas)} trained_betas, but num_train_timesteps={steps}; these must be equal"
        )
    return betas


def _spacing(name: str, given: Given) -> Config:
    """Returns the spacing and its options that differ from ldm's defaults."""
    for flag, ours in SPACING_FLAGS.items():
        if flag in FIELDS[name].honoured and given.flag(flag, False):
            bounds = [bound for bound in ("sigma_min", "sigma_max") if bound in FIELDS[name].honoured]
            options: Config = {bound: given.number(bound) for bound in bounds if given.has(bound)}
            return _with_options("spacing", ours, options)
    default = "leading" if name in LEADING else "linspace"
    has_choice = "timestep_spacing" in FIELDS[name].honoured
    spacing = given.choice("timestep_spacing", default, *SPACINGS) if has_choice else default
    extra = {"extra": True} if name in EXTRA and spacing != "trailing" else {}
    unrounded = {"rounded": False} if name not in ROUNDED and spacing == "linspace" else {}
    return _with_options("spacing", spacing, extra | unrounded)


def _final(name: str, given: Given) -> Config:
    """Returns the end of sampling: the clean image, or the noise level of the schedule's first timestep."""
    honoured = FIELDS[name].honoured
    if "set_alpha_to_one" in honoured:
        minimum = not given.flag("set_alpha_to_one", name == "DDIMScheduler")
    elif "final_sigmas_type" in honoured:
        minimum = FINAL[given.choice("final_sigmas_type", "zero", *FINAL)] == "min"
    else:
        minimum = name == "DEISMultistepScheduler"
    if minimum and "euler_at_final" in honoured and given.flag("euler_at_final", False):
        raise ValueError(
            f"{given.source} asks for euler_at_final=True with final_sigmas_type=sigma_min, which ldm does not have; "
            "set either to its default"
        )
    return {"final_sigma": "min"} if minimum else {}


def _with_options(kind: str, name: str, options: Config) -> Config:
    return {kind: name} | ({f"{kind}_options": options} if options else {})


def scheduler_to(model: Mapping[str, Any], source: Path) -> Config:
    """Returns the scheduler_config.json for ldm's settings. Raises ValueError for settings that diffusers lacks."""
    schedule, prediction, sampling = dict(model["schedule"]), model["prediction"], model["sampling"]
    zero_snr = schedule["name"] == ZERO_SNR
    schedule = dict(schedule["schedule"]) if zero_snr else schedule
    name = schedule.pop("name")
    if name == "flow" and prediction == "flow" and model["time"] in (None, "thousand"):
        kind = "FlowMatchHeunDiscreteScheduler" if sampling["sampler"] == "heun" else "FlowMatchEulerDiscreteScheduler"
        return {"_class_name": kind, "num_train_timesteps": 1000, "shift": schedule["shift"]}
    steps = schedule.pop("steps", None)
    kind, own = sampler_to(sampling["sampler"], sampling.get("sampler_options", {}))
    known = name in (*BETAS, "table") and prediction in PREDICTIONS and model["time"] in (None, "index")
    known = known and sampling["spacing"] in (*SPACINGS, *FLAGS)
    if not known or (name == "cosine" and schedule != COSINE) or not kind or (zero_snr and kind not in RESCALING):
        raise ValueError(
            f"{source} has schedule={shortened(model['schedule'], 200)}, prediction={prediction}, "
            f"time={model['time']}, sampler={sampling['sampler']}, spacing={sampling['spacing']}, "
            "for which diffusers has no scheduler; convert it to a single file instead"
        )
    return {
        "_class_name": kind,
        **_table_to(name, schedule, steps),
        "prediction_type": PREDICTIONS[prediction],
        **({"rescale_betas_zero_snr": True} if zero_snr else {}),
        **_spacing_to(kind, sampling),
        "steps_offset": 1,
        **({"clip_sample": False} if kind in LEADING else {}),
        **_final_to(kind, sampling.get("final_sigma", "zero")),
        **own,
    }


def _table_to(name: str, schedule: Mapping[str, Any], steps: int | None) -> Config:
    if name == "table":
        return {"num_train_timesteps": len(schedule["betas"]), "trained_betas": schedule["betas"]}
    ends = {} if name == "cosine" else schedule
    return {"num_train_timesteps": steps, "beta_schedule": BETAS[name], **ends}


def _spacing_to(kind: str, sampling: Mapping[str, Any]) -> Config:
    spacing, options = sampling["spacing"], sampling.get("spacing_options", {})
    if spacing not in FLAGS:
        return {"timestep_spacing": spacing}
    bounds = {key: options[key] for key in ("sigma_min", "sigma_max") if key in options}
    return {FLAGS[spacing]: True} | (bounds if bounds.keys() <= FIELDS[kind].honoured else {})


def _final_to(kind: str, final_sigma: str) -> Config:
    if "set_alpha_to_one" in FIELDS[kind].honoured:
        return {"set_alpha_to_one": final_sigma == "zero"}
    if "final_sigmas_type" in FIELDS[kind].honoured:
        return {"final_sigmas_type": {"zero": "zero", "min": "sigma_min"}[final_sigma]}
    return {}
