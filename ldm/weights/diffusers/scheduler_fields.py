"""Lists how ldm treats each config field of diffusers' schedulers (version 0.42.1), by class.

Fields of other classes have no effect: diffusers keeps the fields of the previous scheduler when the class changes.
`steps_offset` and `clip_sample` have no effect because the Stable Diffusion pipelines always set them to 1 and false.
"""

from math import inf

from ldm.weights.diffusers.fields import Config, Fields

TABLE = "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"
SIGMAS = "use_karras_sigmas", "use_exponential_sigmas"
SOLVER = "solver_order", "solver_type", "algorithm_type", "variance_type"
NO_SIGMAS: Config = {"use_beta_sigmas": False}
NO_FLOW: Config = {"use_flow_sigmas": False, "use_dynamic_shifting": False}
NO_THRESHOLD: Config = {"thresholding": False}
NO_CLIPPING: Config = {"lambda_min_clipped": -inf}
FLOW_FIXED: Config = {
    "num_train_timesteps": 1000, "use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None,
    "stochastic_sampling": False, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
}  # fmt: skip

# The honoured fields of each class, and the values that its fixed fields must have.
OWN: dict[str, tuple[tuple[str, ...], Config]] = {
    "PNDMScheduler": ((*TABLE, "timestep_spacing", "skip_prk_steps", "set_alpha_to_one"), {}),
    "DDIMScheduler": (
        (*TABLE, "timestep_spacing", "set_alpha_to_one", "rescale_betas_zero_snr"),
        NO_THRESHOLD,
    ),
    "DDPMScheduler": (
        (*TABLE, "timestep_spacing", "variance_type", "rescale_betas_zero_snr"),
        NO_THRESHOLD,
    ),
    "EulerDiscreteScheduler": (
        (*TABLE, *SIGMAS, "timestep_spacing", "sigma_min", "sigma_max", "final_sigmas_type", "rescale_betas_zero_snr"),
        NO_SIGMAS | {"interpolation_type": "linear", "timestep_type": "discrete"},
    ),
    "EulerAncestralDiscreteScheduler": ((*TABLE, "timestep_spacing", "rescale_betas_zero_snr"), {}),
    "HeunDiscreteScheduler": ((*TABLE, *SIGMAS, "timestep_spacing"), NO_SIGMAS),
    "LMSDiscreteScheduler": ((*TABLE, *SIGMAS, "timestep_spacing"), NO_SIGMAS),
    "DPMSolverMultistepScheduler": (
        (
            *TABLE, *SIGMAS, *SOLVER, "timestep_spacing", "use_lu_lambdas", "final_sigmas_type",
            "rescale_betas_zero_snr", "lower_order_final", "euler_at_final",
        ),
        NO_SIGMAS | NO_FLOW | NO_THRESHOLD | NO_CLIPPING,
    ),
    "DPMSolverSinglestepScheduler": (
        (*TABLE, *SIGMAS, *SOLVER, "final_sigmas_type"),
        NO_SIGMAS | NO_FLOW | NO_THRESHOLD | NO_CLIPPING,
    ),
    "DPMSolverSDEScheduler": (
        (*TABLE, *SIGMAS, "timestep_spacing"),
        NO_SIGMAS | {"noise_sampler_seed": None},
    ),
    "UniPCMultistepScheduler": (
        (
            *TABLE, *SIGMAS, "timestep_spacing", "solver_order", "solver_type", "lower_order_final", "sigma_min",
            "sigma_max", "final_sigmas_type", "rescale_betas_zero_snr",
        ),
        NO_SIGMAS | NO_FLOW | NO_THRESHOLD
        | {"predict_x0": True, "disable_corrector": [], "solver_p": None, "shift_terminal": None},
    ),
    "DEISMultistepScheduler": (
        (*TABLE, *SIGMAS, "timestep_spacing", "solver_order", "lower_order_final"),
        NO_SIGMAS | NO_FLOW | NO_THRESHOLD,
    ),
    "FlowMatchEulerDiscreteScheduler": (("shift",), FLOW_FIXED),
    "FlowMatchHeunDiscreteScheduler": (("shift",), FLOW_FIXED),
}  # fmt: skip
# Fields of these classes that never have an effect, or none while a field above has its fixed value.
WITHOUT_EFFECT = frozenset(
    {
        "steps_offset", "clip_sample", "clip_sample_range",
        "dynamic_thresholding_ratio", "sample_max_value",  # used only with thresholding
        "flow_shift", "time_shift_type", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
    }
)  # fmt: skip
OF_ANY_CLASS = frozenset(name for honoured, fixed in OWN.values() for name in (*honoured, *fixed)) | WITHOUT_EFFECT
NO_ZERO_SNR: Config = {"rescale_betas_zero_snr": False}  # for classes that would ignore this field
FIELDS = {
    kind: Fields(
        frozenset(honoured),
        fixed if "rescale_betas_zero_snr" in honoured else fixed | NO_ZERO_SNR,
        OF_ANY_CLASS - {*honoured} - fixed.keys() - NO_ZERO_SNR.keys(),
    )
    for kind, (honoured, fixed) in OWN.items()
}
