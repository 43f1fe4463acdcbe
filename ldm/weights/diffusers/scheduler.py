"""Converts between scheduler_config.json of diffusers and ldm's schedule, prediction and sampler."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.weights.diffusers.networks import refuse_unknown

Config = dict[str, Any]

# Maps ldm's samplers to the class in diffusers and the settings that distinguish them from others of the class; the
# first of a class is its default.
SAMPLERS: dict[str, tuple[str, Config]] = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "edm": ("HeunDiscreteScheduler", {}),  # the same steps without churn
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}
RESCALING = (  # have the setting rescale_betas_zero_snr; the others ignore it
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
LEADING = ("PNDMScheduler", "DDIMScheduler", "DDPMScheduler")  # their default timestep_spacing is "leading"
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
ZERO_SNR = "zero_terminal_snr"
COSINE = {"offset": 0.008, "beta_max": 0.999}  # the only cosine schedule in diffusers


def scheduler_from(given: Config, source: Path) -> tuple[Config, str, Config]:
    """Returns schedule, prediction and {"sampler", "spacing"} of a scheduler_config.json.

    Raises ValueError for settings that ldm does not have.
    """
    name = given.get("_class_name", "")
    if name.startswith("FlowMatch"):
        sampler = {"sampler": "heun" if "Heun" in name else "euler", "spacing": "trailing"}
        return {"name": "flow", "shift": float(given.get("shift", 1.0))}, "flow", sampler
    zero_snr = name in RESCALING and given.get("rescale_betas_zero_snr", False)
    fixed = {"trained_betas": None, "rescale_betas_zero_snr": zero_snr, "thresholding": False}
    refuse_unknown(given, fixed, source)
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    betas = {theirs: ours for ours, theirs in BETAS.items()}
    prediction = given.get("prediction_type", "epsilon")
    schedule = given.get("beta_schedule", "linear")
    if prediction not in predictions or schedule not in betas:
        raise ValueError(
            f"{source} asks for prediction_type={prediction}, beta_schedule={schedule}, which ldm does not "
            "have; give a model of Stable Diffusion 1.x or 2.x"
        )
    steps = {"steps": given.get("num_train_timesteps", 1000)}
    ends = {key: given[key] for key in ("beta_start", "beta_end") if key in given}
    parameters = COSINE if betas[schedule] == "cosine" else {"beta_start": 0.0001, "beta_end": 0.02} | ends
    spacing = given.get("timestep_spacing", "leading" if name in LEADING else "linspace")
    for flag, ours in (("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential")):
        spacing = ours if given.get(flag) else spacing
    sampler = {"sampler": _sampler(given, source), "spacing": spacing}
    table = {"name": betas[schedule], **parameters, **steps}
    return {"name": ZERO_SNR, "schedule": table} if zero_snr else table, predictions[prediction], sampler


def scheduler_to(model: Mapping[str, Any], source: Path) -> Config:
    """Returns the scheduler_config.json of ldm's settings. Raises ValueError for those that diffusers does not have."""
    schedule, prediction, sampling = dict(model["schedule"]), model["prediction"], model["sampling"]
    zero_snr = schedule["name"] == ZERO_SNR
    schedule = dict(schedule["schedule"]) if zero_snr else schedule
    name = schedule.pop("name")
    if name == "flow" and prediction == "flow" and model["time"] in (None, "thousand"):
        kind = "FlowMatchHeunDiscreteScheduler" if sampling["sampler"] == "heun" else "FlowMatchEulerDiscreteScheduler"
        return {"_class_name": kind, "num_train_timesteps": 1000, "shift": schedule["shift"]}
    steps = schedule.pop("steps", None)
    kind, own = SAMPLERS.get(sampling["sampler"], ("", {}))
    known = name in BETAS and prediction in PREDICTIONS and model["time"] in (None, "index")
    if not known or (name == "cosine" and schedule != COSINE) or not kind or (zero_snr and kind not in RESCALING):
        raise ValueError(
            f"{source} has schedule={model['schedule']}, prediction={prediction}, time={model['time']}, "
            f"sampler={sampling['sampler']}, for which diffusers has no scheduler; convert it to a single file instead"
        )
    spacing = sampling["spacing"]
    flags = {"karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}
    return {
        "_class_name": kind,
        "num_train_timesteps": steps,
        "beta_schedule": BETAS[name],
        **({} if name == "cosine" else schedule),
        "prediction_type": PREDICTIONS[prediction],
        **({"rescale_betas_zero_snr": True} if zero_snr else {}),
        **flags.get(spacing, {"timestep_spacing": spacing}),
        "steps_offset": 1,
        **({"clip_sample": False, "set_alpha_to_one": False} if kind in LEADING else {}),
        **own,
    }


def _sampler(given: Config, source: Path) -> str:
    name = given.get("_class_name", "")
    candidates = [ours for ours, (kind, _) in SAMPLERS.items() if kind == name]
    if not candidates:
        classes = ", ".join(dict.fromkeys(kind for kind, _ in SAMPLERS.values()))
        raise ValueError(f"{source} has _class_name={name or None}, which ldm does not know; give one of {classes}")
    exact = [
        ours for ours in candidates if all(given.get(key, value) == value for key, value in SAMPLERS[ours][1].items())
    ]
    return (exact or candidates)[0]
