"""Noise schedules: the signal alpha(t) and the noise sigma(t) of x_t = alpha·x0 + sigma·eps."""

from collections.abc import Callable, Sequence
from math import inf, log, pi, sqrt
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.errors import shortened

MAX_STEPS = 100_000  # maximum number of steps in a table
MAX_NUMBER = 1e30


class Schedule(Protocol):
    """Maps float tensors t to float64 tensors of the same shape; log_snr = ln(alpha² / sigma²) decreases with t.

    The times of a discrete schedule are the indices t_min = 0 … t_max of a table; fractional times interpolate.
    """

    name: str
    t_min: float
    t_max: float
    discrete: bool
    config: dict[str, Any]  # plain data from which `from_config` builds the same schedule

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def log_snr(self, t: Tensor) -> Tensor: ...

    def time(self, log_snr: Tensor) -> Tensor:
        """Returns t for a given log-SNR: the inverse of `log_snr`."""
        ...


class Discrete:
    """A variance-preserving schedule given by betas (n,); the log-SNR is interpolated linearly between entries."""

    t_min = 0.0
    discrete = True

    def __init__(self, name: str, betas: Tensor, /, **settings: Any) -> None:
        if len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"the {name} schedule needs at least 2 betas, each above 0 and below 1, but its settings are "
                f"{shortened(settings, 200)}"
            )
        alpha_bar = torch.cumprod(1 - betas.double(), dim=0)
        self.name = name
        self.config = {"name": name, **settings}
        self.t_max = float(len(betas) - 1)
        self.log_snr_table = alpha_bar.log() - (-alpha_bar).log1p()
        self._tables = {self.log_snr_table.device: self.log_snr_table}

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.log_snr(t)).sigmoid().sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        t, table = t.double(), self._table(t.device)
        left = t.long().clamp(0, len(table) - 2)
        return table[left].lerp(table[left + 1], t - left)

    def time(self, log_snr: Tensor) -> Tensor:
        log_snr, table = log_snr.double(), self._table(log_snr.device)
        left = torch.searchsorted(-table, -log_snr).sub(1).clamp(0, len(table) - 2)
        return left + (table[left] - log_snr) / (table[left] - table[left + 1])

    def _table(self, device: torch.device) -> Tensor:
        """Returns the table on the device, copied to it only once, because a copy waits for the device."""
        if device not in self._tables:
            with torch.inference_mode(False):
                self._tables[device] = self.log_snr_table.to(device)
        return self._tables[device]


def linear(beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> Discrete:
    """Linearly spaced betas (Ho et al. 2020, section 4)."""
    betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    return Discrete("linear", betas, beta_start=beta_start, beta_end=beta_end, steps=steps)


def scaled_linear(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> Discrete:
    """Betas whose square roots are linearly spaced; the defaults are Stable Diffusion's (Rombach et al. 2022)."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
    return Discrete("scaled_linear", roots.square(), beta_start=beta_start, beta_end=beta_end, steps=steps)


def cosine(offset: float = 0.008, beta_max: float = 0.999, steps: int = 1000) -> Discrete:
    """Alpha-bar as a squared cosine of time (Nichol & Dhariwal 2021, equation 17)."""
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((t + offset) / (1 + offset) * pi / 2).square()
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max)
    return Discrete("cosine", betas, offset=offset, beta_max=beta_max, steps=steps)


def sigmoid(
    start: float = -3.0, end: float = 3.0, tau: float = 1.0, least: float = 1e-9, steps: int = 1000
) -> Discrete:
    """Alpha-bar as a sigmoid of slope 1 / tau, at least `least` (Jabri et al. 2022; Chen 2023, algorithm 1)."""
    if not (start < end and tau > 0):
        raise ValueError(f"the sigmoid schedule needs start < end and tau > 0, not {start}, {end} and {tau}")
    curve = torch.linspace(start, end, steps + 1, dtype=torch.float64).div(tau).sigmoid()
    alpha_bar = ((curve[-1] - curve) / (curve[-1] - curve[0])).clamp(min=least)
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    return Discrete("sigmoid", betas, start=start, end=end, tau=tau, least=least, steps=steps)


def table(betas: Sequence[float] | Tensor) -> Discrete:
    """Any betas, such as those of a formula of your own. Saved models list them: code is needed only for training."""
    values = torch.as_tensor(betas, dtype=torch.float64)
    if values.ndim != 1 or len(values) > MAX_STEPS:
        raise ValueError(
            f"the betas of the table schedule must be a list of at most {MAX_STEPS} numbers, but have the shape "
            f"{[*values.shape]}"
        )
    return Discrete("table", values, betas=values.tolist())


class Flow:
    """Rectified flow on t in [0, 1]: alpha = 1 - sigma, and sigma = t if `shift` is 1.

    The shift multiplies sigma/alpha (Esser et al. 2024, equation 23): sigma = shift·t / (1 + (shift - 1)·t).
    """

    name = "flow"
    t_min = 0.0
    t_max = 1.0
    discrete = False

    def __init__(self, shift: float = 1.0) -> None:
        if not 0 < shift < inf:
            raise ValueError(f"the flow schedule's shift is {shift}, but must be positive")
        self.shift = shift
        self.config = {"name": "flow", "shift": shift}

    def alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        t = t.double()
        return self.shift * t / (1 + (self.shift - 1) * t)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def time(self, log_snr: Tensor) -> Tensor:
        sigma = (-log_snr.double() / 2).sigmoid()
        return sigma / (self.shift - (self.shift - 1) * sigma)


class EDM:
    """sigma/alpha in geometric progression from sigma_min at t = 0 to sigma_max at t = 1 (Karras et al. 2022).

    The path preserves variance, so x is the paper's c_in(sigma)·x for data of standard deviation sigma_data = 1, and
    the paper's network with its c_skip and c_out is v-prediction (up to a sign).
    """

    name = "edm"
    t_min = 0.0
    t_max = 1.0
    discrete = False

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max < inf:
            raise ValueError(f"the edm schedule needs 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
        self.max_log_snr, self.log_snr_range = -2 * log(sigma_min), 2 * log(sigma_max / sigma_min)
        self.config = {"name": "edm", "sigma_min": sigma_min, "sigma_max": sigma_max}

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.log_snr(t)).sigmoid().sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        return self.max_log_snr - self.log_snr_range * t.double()

    def time(self, log_snr: Tensor) -> Tensor:
        return (self.max_log_snr - log_snr.double()) / self.log_snr_range


class Shifted:
    """See `snr_shift`."""

    name = "snr_shift"

    def __init__(self, schedule: Schedule, shift: float) -> None:
        if not 0 < shift < inf:
            raise ValueError(f"the shift of snr_shift is {shift}, but must be positive")
        self.schedule, self.log_snr_shift = schedule, 2 * log(shift)
        self.t_min, self.t_max, self.discrete = schedule.t_min, schedule.t_max, schedule.discrete
        self.config: dict[str, Any] = {"name": self.name, "schedule": schedule.config, "shift": shift}

    def alpha(self, t: Tensor) -> Tensor:
        return self.schedule.alpha(self.schedule.time(self.log_snr(t)))

    def sigma(self, t: Tensor) -> Tensor:
        return self.schedule.sigma(self.schedule.time(self.log_snr(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        return self.schedule.log_snr(t) - self.log_snr_shift

    def time(self, log_snr: Tensor) -> Tensor:
        return self.schedule.time(log_snr.double() + self.log_snr_shift)


class ZeroTerminal:
    """See `zero_terminal_snr`."""

    name = "zero_terminal_snr"

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.t_min, self.t_max, self.discrete = schedule.t_min, schedule.t_max, schedule.discrete
        self.config: dict[str, Any] = {"name": self.name, "schedule": schedule.config}
        ends = schedule.alpha(torch.tensor([self.t_min, self.t_max], dtype=torch.float64))
        first, self.last = ends.tolist()
        self.scale = first / (first - self.last)

    def alpha(self, t: Tensor) -> Tensor:
        alpha = (self.schedule.alpha(t) - self.last) * self.scale
        return alpha.masked_fill(t >= self.t_max, 0)  # exactly 0, however the difference is rounded

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t).square()).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def time(self, log_snr: Tensor) -> Tensor:
        alpha = log_snr.double().sigmoid().sqrt() / self.scale + self.last
        t = self.schedule.time(alpha.square().logit())
        return t.masked_fill(log_snr == -inf, self.t_max)


def snr_shift(schedule: Schedule, shift: float) -> Shifted:
    """Returns a schedule on the same path with sigma/alpha multiplied by `shift`, and the SNR divided by shift².

    It adapts a schedule to larger images (Hoogeboom et al. 2023, equation 3); snr_shift(Flow(), shift) is Flow(shift).
    """
    return Shifted(schedule, shift)


def resolution_shift(positions: int, trained: int) -> float:
    """Returns the shift sqrt(m/n) at which m = `positions` latent positions (h·w) are as uncertain as n = `trained`
    ones without a shift (Esser et al. 2024, equation 23)."""
    if min(positions, trained) < 1:
        raise ValueError(f"the numbers of latent positions are {positions} and {trained}, but must be 1 or more")
    return sqrt(positions / trained)


def flow_at_resolution(positions: int, trained: int) -> Flow:
    """Rectified flow with the `resolution_shift` of `positions` latent positions (h·w), relative to `trained`."""
    return Flow(resolution_shift(positions, trained))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shifts and scales alpha of a variance-preserving schedule so that it is 0 at t_max and unchanged at t_min.

    This is algorithm 1 of Lin et al. 2024, applied to alpha(t) instead of the entries of a table, so that it works
    between entries and on continuous schedules. A schedule that ends in pure noise, such as Flow, is returned as is.
    """
    end = schedule.alpha(torch.tensor([schedule.t_max], dtype=torch.float64))
    return schedule if float(end) == 0 else ZeroTerminal(schedule)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "table": table,
    "flow": Flow,
    "edm": EDM,
    "snr_shift": snr_shift,
    "zero_terminal_snr": zero_terminal_snr,
}


def from_config(config: dict[str, Any]) -> Schedule:
    """Builds a schedule from its `config`. Raises ValueError for an unknown name or invalid settings."""
    if not isinstance(config, dict):
        raise ValueError(f"a schedule must be a mapping of its name and settings, not {config!r}")
    settings = dict(config)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(f"the schedule is {name!r}, but must be one of {', '.join(SCHEDULES)}")
    if not _is_count(settings.get("steps", 1)):
        raise ValueError(
            f"the schedule {name!r} has steps={settings['steps']!r}, but must have an integer from 1 to {MAX_STEPS}"
        )
    for key, value in settings.items():
        if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:  # also NaN
            raise ValueError(
                f"the {key} of the schedule {name!r} must be a number from -{MAX_NUMBER:g} to {MAX_NUMBER:g}"
            )
    try:
        if "schedule" in settings:
            settings["schedule"] = from_config(settings["schedule"])
        return SCHEDULES[name](**settings)
    except (TypeError, RuntimeError, ArithmeticError) as error:  # RecursionError is a RuntimeError
        raise ValueError(f"the schedule {name!r} cannot be built with {shortened(settings, 200)}: {error}") from error


def check_config(schedule: Schedule) -> None:
    """Raises ValueError unless `config` builds the same schedule, because a saved model has nothing else of it."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 1001, dtype=torch.float64)
    try:
        same = torch.equal(from_config(schedule.config).log_snr(t), schedule.log_snr(t))
        reason = "this builds another schedule"
    except ValueError as error:
        same, reason = False, str(error)
    if not same:
        raise ValueError(
            f"a model trained with the schedule {schedule.name} could not be loaded, because its file contains only "
            f"{shortened(schedule.config, 200)}, and {reason}. A formula of your own can return "
            "ldm.diffusion.schedule.table(betas)"
        )


def _is_count(steps: object) -> bool:
    return isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= MAX_STEPS
