"""Settings that contradict one another, each with its mend."""

import torch

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.weighting import Weighting
from ldm.sampling.spacing import SPACINGS


def contradictions(
    schedule: Schedule,
    prediction: Prediction,
    weighting: Weighting | None = None,
    time: str | None = None,
    spacing: str | None = None,
    interval: tuple[float, float] | None = None,
) -> list[str]:
    """One sentence for each pair of settings that cannot work together; what is None is not looked at.

    `time` is the Denoiser's, `interval` the guidance's.
    """
    found = []
    end = torch.tensor([schedule.t_max], dtype=torch.float64)
    alpha, sigma = schedule.alpha(end), schedule.sigma(end)
    no_signal = float(alpha) == 0
    if no_signal and float(prediction.determinant(alpha, sigma)) == 0:
        found.append(
            f"prediction={prediction.name} divides by alpha, which is 0 at the end of "
            f"schedule={schedule.name}: use prediction=v or prediction=flow"
        )
    if weighting is not None and float(weighting(alpha, sigma, prediction)) < 1e-12:
        found.append(
            f"weighting={weighting.name} gives weight 0 to the end of schedule={schedule.name} under "
            f"prediction={prediction.name}, so the first sampling step is not trained: use weighting=uniform"
        )
    if no_signal and time == "log_sigma":
        found.append(
            f"time=log_sigma is infinite at the end of schedule={schedule.name}, where alpha is 0: use time=thousand"
        )
    if no_signal and spacing is not None and float(SPACINGS[spacing](schedule, 10)[0]) < schedule.t_max:
        found.append(
            f"spacing={spacing} leaves out the end of schedule={schedule.name}, the only time at which "
            "a state is pure noise: use spacing=trailing"
        )
    if interval is not None and (interval[1] < schedule.t_min or interval[0] > schedule.t_max):
        found.append(
            f"the guidance interval {interval} lies outside the times {schedule.t_min:g} to "
            f"{schedule.t_max:g} of schedule={schedule.name}, so there is no guidance: give it in those times"
        )
    return found
