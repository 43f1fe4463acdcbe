"""Network + schedule + prediction → an estimate of the data."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule

# (x (b, c, h, w), time (b,), conditioning of k·b samples, k for each x) → output (k·b, c, h, w)
Network = Callable[[Tensor, Tensor, Conditioning], Tensor]
Conditional = Callable[[Tensor, float, Conditioning], Tensor]  # (x, t, conditioning) → x0
Denoise = Callable[[Tensor, float], Tensor]  # (x, t) → x0, under a fixed conditioning

NETWORK_TIMES: dict[str, Callable[[Schedule, Tensor], Tensor]] = {
    "index": lambda schedule, t: t,
    # 1000·t on an unshifted flow, and independent of the shift, so that it may change after training.
    "thousand": lambda schedule, t: 1000 * schedule.sigma(t) / (schedule.alpha(t) + schedule.sigma(t)),
    "log_sigma": lambda schedule, t: -schedule.log_snr(t) / 8,  # ln(sigma / alpha) / 4
}


class Denoiser:
    """Calls a network as a function (x, t, conditioning) → x0; `time` says how the network is told the time.

    By default that is the index on a discrete schedule, 1000·t on a continuous one.
    """

    def __init__(self, network: Network, schedule: Schedule, prediction: Prediction, time: str | None = None) -> None:
        time = time or ("index" if schedule.discrete else "thousand")
        if time not in NETWORK_TIMES:
            raise ValueError(f"the network's time is {time!r}, but must be one of {', '.join(NETWORK_TIMES)}")
        if time == "index" and not schedule.discrete:
            raise ValueError(
                f"schedule={schedule.name} has no indices: tell the network time=thousand or time=log_sigma"
            )
        self.network, self.schedule, self.prediction, self.time = network, schedule, prediction, time
        self._known: dict[float, tuple[float, float, float]] = {}

    def output(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output for x (b, c, h, w) at times t (b,)."""
        return self.network(x, NETWORK_TIMES[self.time](self.schedule, t).float(), conditioning)

    def __call__(self, x: Tensor, t: float | Tensor, conditioning: Conditioning) -> Tensor:
        """The estimate of x0 (b, c, h, w), in the type of x, at one time or at times (b,).

        At one time there may be k conditionings for each x, which give as many estimates (k·b, c, h, w).
        """
        if isinstance(t, Tensor):
            times = t.to(x.device, torch.float64).expand(len(x))
            out = self.output(x, times, conditioning)
            return self.prediction.to_x0(x, out, self.schedule.alpha(times), self.schedule.sigma(times))
        time, of_x, of_out = self._numbers(t)
        out = self.network(x, torch.full((len(x),), time, dtype=torch.float32, device=x.device), conditioning)
        x = x if len(x) == len(out) else torch.cat([x] * (len(out) // len(x)))
        return (of_x * x).add_(out, alpha=of_out)  # one new tensor, and numbers that no device is asked for

    def _numbers(self, t: float) -> tuple[float, float, float]:
        """The network's time and x0 = of_x·x + of_out·out: kept, since samplers come back to the same times."""
        if t not in self._known:
            one = torch.ones((), dtype=torch.float64)
            levels = self.schedule.alpha(t * one), self.schedule.sigma(t * one)
            of_x, of_out = (self.prediction.to_x0(*pair, *levels) for pair in ((one, 0 * one), (0 * one, one)))
            self._known[t] = float(NETWORK_TIMES[self.time](self.schedule, t * one)), float(of_x), float(of_out)
        return self._known[t]
