"""The denoiser: a network, a schedule and a prediction type, which together estimate x0 from x_t."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule

# (x (b, c, h, w), time (b,), conditioning of k·b samples) → output (k·b, c, h, w)
Network = Callable[[Tensor, Tensor, Conditioning], Tensor]
Conditional = Callable[[Tensor, float, Conditioning], Tensor]  # (x, t, conditioning) → x0
Denoise = Callable[[Tensor, float], Tensor]  # (x, t) → x0, under a fixed conditioning

NETWORK_TIMES: dict[str, Callable[[Schedule, Tensor], Tensor]] = {
    "index": lambda schedule, t: t,
    # 1000·t on the unshifted flow; it depends on the noise level alone, so the shift may change after training
    "thousand": lambda schedule, t: 1000 * schedule.sigma(t) / (schedule.alpha(t) + schedule.sigma(t)),
    "log_sigma": lambda schedule, t: -schedule.log_snr(t) / 8,  # ln(sigma / alpha) / 4
}


class Denoiser:
    """A function (x, t, conditioning) → x0.

    `time` names the encoding of t that the network reads (see `NETWORK_TIMES`): by default the index on a discrete
    schedule and 1000·t on a continuous one.
    """

    def __init__(self, network: Network, schedule: Schedule, prediction: Prediction, time: str | None = None) -> None:
        time = time or ("index" if schedule.discrete else "thousand")
        if time not in NETWORK_TIMES:
            raise ValueError(f"the network's time is {time!r}, but must be one of {', '.join(NETWORK_TIMES)}")
        if time == "index" and not schedule.discrete:
            raise ValueError(f"schedule={schedule.name} has no indices: use time=thousand or time=log_sigma")
        self.network, self.schedule, self.prediction, self.time = network, schedule, prediction, time
        self._cache: dict[float, tuple[float, float, float]] = {}

    def output(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the network's output for x (b, c, h, w) at times t (b,)."""
        return self.network(x, NETWORK_TIMES[self.time](self.schedule, t).float(), conditioning)

    def __call__(self, x: Tensor, t: float | Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the estimate of x0 (b, c, h, w), in the dtype of x, at a single time or at times (b,).

        At a single time there may be k conditionings for each sample of x, which give k·b estimates (k·b, c, h, w).
        """
        if isinstance(t, Tensor):
            times = t.to(x.device, torch.float64).expand(len(x))
            out = self.output(x, times, conditioning)
            return self.prediction.to_x0(x, out, self.schedule.alpha(times), self.schedule.sigma(times))
        time, p, q = self._coefficients(t)
        out = self.network(x, torch.full((len(x),), time, dtype=torch.float32, device=x.device), conditioning)
        x = x if len(x) == len(out) else torch.cat([x] * (len(out) // len(x)))
        return (p * x).add_(out, alpha=q)  # allocates one tensor; p and q are floats, so that no device synchronises

    def _coefficients(self, t: float) -> tuple[float, float, float]:
        """Returns the network's time, and p and q of x0 = p·x + q·out; cached, because samplers reuse their times."""
        if t not in self._cache:
            one = torch.ones((), dtype=torch.float64)
            levels = self.schedule.alpha(t * one), self.schedule.sigma(t * one)
            p, q = (self.prediction.to_x0(*pair, *levels) for pair in ((one, 0 * one), (0 * one, one)))
            self._cache[t] = float(NETWORK_TIMES[self.time](self.schedule, t * one)), float(p), float(q)
        return self._cache[t]
