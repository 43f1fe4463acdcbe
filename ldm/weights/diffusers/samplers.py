"""Converts between diffusers' schedulers with their settings and ldm's samplers with their options.

Options with ldm's default values are left out.
"""

from collections.abc import Mapping
from typing import Any

from ldm.weights.diffusers.fields import Config, Given

# Maps ldm's samplers to the diffusers class and the settings that distinguish samplers of the same class.
SAMPLERS: dict[str, tuple[str, Config]] = {
    "pndm": ("PNDMScheduler", {}),
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
PLAIN = {kind: ours for ours, (kind, own) in reversed(SAMPLERS.items()) if not own}  # without edm
MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
SDE = "sde-dpmsolver++"
MIDPOINT = "midpoint", "logrho", "bh1", "bh2"  # diffusers replaces the others, of other classes, by the first
BH2 = "bh2", "midpoint", "heun", "logrho"  # in UniPC, the others are replaced by the first
# With fixed_large, diffusers also adds noise in the last step, so that it remains in the image; ldm does not.
FIXED_VARIANCE = {"fixed_small": "posterior", "fixed_small_log": "posterior", "fixed_large": "beta"}


def sampler_from(name: str, given: Given) -> Config:
    """Returns the sampler and options for the scheduler class `name`. Raises ValueError if ldm has no such sampler."""
    if name in (MULTISTEP, SINGLESTEP):
        return _dpm_solver(name, given)
    options: Config = {}
    if name == "PNDMScheduler" and given.flag("skip_prk_steps", False):
        options = {"prk": False}
    elif name == "DDPMScheduler":
        variance = FIXED_VARIANCE[given.choice("variance_type", "fixed_small", *FIXED_VARIANCE)]
        options = {} if variance == "posterior" else {"variance": variance}
    elif name == "UniPCMultistepScheduler":
        variant = given.choice("solver_type", "bh2", "bh1", *BH2)
        order = given.integer("solver_order", 2, most=3)
        options = {} if order == 2 else {"order": order}
        options |= ({"variant": "bh1"} if variant == "bh1" else {}) | _lower_order(given)
    elif name == "DEISMultistepScheduler":
        order = given.integer("solver_order", 2, most=3)
        options = ({} if order == 3 else {"order": order}) | {"variable": "log_ratio"} | _lower_order(given)
    return {"sampler": PLAIN[name]} | ({"sampler_options": options} if options else {})


def _dpm_solver(name: str, given: Given) -> Config:
    """Converts DPM-Solver++; order 1 is DDIM, and order 1 of the SDE is DDIM with eta=1."""
    order = given.integer("solver_order", 2, most=3 if name == MULTISTEP else 2)
    algorithms = ("dpmsolver++", "deis", SDE) if name == MULTISTEP else ("dpmsolver++", "deis")
    sde = given.choice("algorithm_type", "dpmsolver++", *algorithms) == SDE
    given.choice("variance_type", "fixed_small", *FIXED_VARIANCE, "fixed_large_log")  # the network predicts none
    heun = ("heun",) if name == MULTISTEP else ()
    rule = "heun" if given.choice("solver_type", "midpoint", *MIDPOINT, *heun) == "heun" else "midpoint"
    if order == 1:
        return {"sampler": "ddim"} | ({"sampler_options": {"eta": 1.0}} if sde else {})
    if name == SINGLESTEP:
        return {"sampler": "dpmpp_2s", "sampler_options": {"on_grid": True}}
    sampler = f"dpmpp_{order}m{'_sde' if sde else ''}"
    if sampler == "dpmpp_3m_sde":  # ldm uses its own rule because that of diffusers has a wrong sign
        return {"sampler": sampler}
    default = "midpoint" if order == 2 else "heun"
    options = ({} if rule == default else {"rule": rule}) | _lower_order(given)
    options |= {"curvature": "half"} if order == 3 else {}
    return {"sampler": sampler} | ({"sampler_options": options} if options else {})


def _lower_order(given: Given) -> Config:
    return {} if given.flag("lower_order_final", True) else {"lower_order_final": False}


def sampler_to(sampler: str, options: Mapping[str, Any]) -> tuple[str, Config]:
    """Returns the closest scheduler class for a sampler, and its settings; the class is "" if there is none."""
    kind, own = SAMPLERS.get(sampler, ("", {}))
    settings = dict(own)
    if sampler == "pndm":
        settings |= {"skip_prk_steps": not options.get("prk", True)}
    elif sampler == "ddpm":
        settings |= {"variance_type": "fixed_large" if options.get("variance") == "beta" else "fixed_small"}
    elif kind == MULTISTEP:
        settings |= {
            "solver_type": options.get("rule", "midpoint" if sampler in ("dpmpp_2m", "dpmpp_2m_sde") else "heun")
        }
    elif sampler == "unipc":
        settings |= {"solver_order": options.get("order", 2), "solver_type": options.get("variant", "bh2")}
    elif sampler == "deis":
        settings |= {"solver_order": min(3, options.get("order", 3))}
    if sampler in ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "deis"):
        settings |= {"lower_order_final": options.get("lower_order_final", True)}
    return kind, settings
