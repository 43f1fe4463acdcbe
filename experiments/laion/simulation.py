"""Simulates a long training run on a cluster as discrete events, and gives the closed forms that it must agree with.

Work is measured in seconds of undisturbed training. A run trains `interval` seconds of work, stops for `copy` seconds
to copy its state, and trains on while the copy is written, which takes `write` seconds; the next copy waits for it.
A failure loses the work since the last copy that was completely written.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapreplace, merge

NEVER = math.inf
EPSILON = 1e-9  # of work, below which a checkpoint is due


@dataclass(frozen=True)
class Setting:
    """One cluster, one run and its checkpoints; times in seconds."""

    hosts: int
    mtbf: float  # mean time between failures of one host
    interval: float
    copy: float
    write: float = 0.0
    crash: float = 0.0  # until a failure is reported, if processes die
    hang: float = 0.0  # until it is reported, if they hang
    hanging: float = 0.0  # share of failures after which they hang
    restart: float = 0.0  # requeue, start and loading; a failure in it starts it again
    replaced: float = 0.0  # share of failures after which the host is replaced
    spares: int = 0
    repair: float = 0.0  # mean time after which a replaced host is a spare again
    slow_every: float = NEVER  # mean time between slow periods of one host
    slow_for: float = 0.0  # mean length of a slow period
    slowdown: float = 1.0  # of a step while at least one host is slow

    @property
    def job_mtbf(self) -> float:
        """The mean time between failures of any host of the run."""
        return self.mtbf / self.hosts


@dataclass
class Times:
    """Seconds of a run by use; `useful` is the work that counts in the end."""

    useful: float = 0.0
    repeated: float = 0.0  # work that a failure lost
    slow: float = 0.0  # what slow hosts added to work
    copying: float = 0.0  # standing still for checkpoints
    detecting: float = 0.0
    waiting: float = 0.0  # for a host
    restarting: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def goodput(self) -> float:
        return self.useful / self.total


class Run:
    """A run that trains until it is interrupted."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.times = setting, Times()
        self.now = 0.0
        self.work = self.saved = 0.0  # trained, and completely written
        self.written = 0.0, NEVER  # the work of the last copy, and when it is completely written
        self.left, self.standing = setting.interval, 0.0  # work before the next copy; seconds until training continues

    def train(self, until: float, slowdown: float) -> None:
        """Trains and copies until the given time."""
        while self.now < until:
            if self.standing > 0:
                self._stand(until)
                continue
            self._skip_cycles(until, slowdown)
            seconds = min(self.left * slowdown, until - self.now)
            self._train(seconds, seconds / slowdown)
            self.left -= seconds / slowdown
            if self.left <= EPSILON and self.now < until:
                free = self.written[1] if self.written[1] < NEVER else self.now
                self.standing = max(free - self.now, 0.0) + self.setting.copy
                self.left = self.setting.interval
                if self.standing == 0:
                    self._copied()

    def fail(self) -> None:
        """Returns to the last checkpoint that is completely written."""
        work, when = self.written
        self.saved = work if when <= self.now else self.saved
        self.times.useful -= self.work - self.saved
        self.times.repeated += self.work - self.saved
        self.work, self.written = self.saved, (0.0, NEVER)
        self.left, self.standing = self.setting.interval, 0.0

    def _train(self, seconds: float, work: float) -> None:
        self.now += seconds
        self.work += work
        self.times.useful += work
        self.times.slow += seconds - work

    def _stand(self, until: float) -> None:
        seconds = min(self.standing, until - self.now)
        self.now += seconds
        self.times.copying += seconds
        self.standing = 0.0 if seconds == self.standing else self.standing - seconds
        if self.standing == 0:
            self._copied()

    def _copied(self) -> None:
        self.saved = self.written[0] if self.written[1] < NEVER else self.saved
        self.written = self.work, self.now + self.setting.write

    def _skip_cycles(self, until: float, slowdown: float) -> None:
        """Adds all but the last of the equal cycles before the given time at once."""
        setting = self.setting
        if self.left != setting.interval or self.written[1] == NEVER:
            return
        training = setting.interval * slowdown
        standing = max(setting.write - training, 0.0) + setting.copy
        cycles = int((until - self.now) / (training + standing)) - 1
        if cycles > 0:
            self.saved = self.work + (cycles - 1) * setting.interval
            self._train(cycles * training, cycles * setting.interval)
            self.now += cycles * standing
            self.times.copying += cycles * standing
            self.written = self.work, self.now + setting.write


def simulate(setting: Setting, seconds: float, seed: int) -> Times:
    """Returns how a run of that many seconds spends them."""
    rng = random.Random(seed)
    run, speeds = Run(setting), _slowdowns(setting, seconds, random.Random(f"slow {seed}"))
    until, slowdown = next(speeds)
    back = [0.0] * setting.spares  # when each spare is ready, as a heap
    while run.now < seconds:
        failure = min(run.now + _exponential(rng, setting.job_mtbf), seconds)
        while run.now < failure:
            run.train(min(until, failure), slowdown)
            while until <= run.now < seconds:
                until, slowdown = next(speeds)
        if failure < seconds:
            run.fail()
            _recover(run, back, seconds, rng)
            while until <= run.now < seconds:
                until, slowdown = next(speeds)
    return run.times


def _recover(run: Run, back: list[float], end: float, rng: random.Random) -> None:
    """Detects failures, replaces hosts and restarts until the run trains again, or until the end."""
    setting, times = run.setting, run.times
    failed = True

    def spend(seconds: float) -> float:
        seconds = min(seconds, end - run.now)
        run.now += seconds
        return seconds

    while failed and run.now < end:
        times.detecting += spend(setting.hang if rng.random() < setting.hanging else setting.crash)
        if rng.random() < setting.replaced:
            repaired = run.now + _exponential(rng, setting.repair)
            ready = heapreplace(back, repaired) if back and back[0] <= repaired else repaired
            times.waiting += spend(max(ready - run.now, 0.0))
        failure = _exponential(rng, setting.job_mtbf)
        failed = failure < setting.restart
        times.restarting += spend(min(failure, setting.restart))


def _slowdowns(setting: Setting, end: float, rng: random.Random) -> Iterator[tuple[float, float]]:
    """Yields, until the end, how long each slowdown lasts, and the slowdown: 1, or that of a slow host."""
    starts, time = [], 0.0
    while (time := time + _exponential(rng, setting.slow_every / setting.hosts)) < end:
        starts.append(time)
    stops = sorted(start + _exponential(rng, setting.slow_for) for start in starts)
    slow = 0
    for time, change in merge(((start, 1) for start in starts), ((stop, -1) for stop in stops)):
        yield time, setting.slowdown if slow else 1.0
        slow += change
    yield NEVER, 1.0


def _exponential(rng: random.Random, mean: float) -> float:
    return NEVER if mean == NEVER else rng.expovariate(1 / mean)


def young(copy: float, mtbf: float) -> float:
    """Young (1974): the interval that loses least, to first order."""
    return math.sqrt(2 * copy * mtbf)


def daly(copy: float, mtbf: float) -> float:
    """Daly (2006), equation 37: the same to a higher order, for copy < 2 mtbf."""
    ratio = copy / (2 * mtbf)
    return math.sqrt(2 * copy * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - copy


def exact_goodput(setting: Setting) -> float:
    """Returns the goodput for exponential failures, if the copy is the checkpoint (write = 0) and no host is slow.

    A period of work w with its copy c takes e^(r/M) (M + d) (e^((w + c)/M) - 1) seconds on average, where r is the
    restart, which failures interrupt, and d the detection, which they do not (Bougeret et al., SC 2011, theorem 1).
    """
    mtbf = setting.job_mtbf
    detection = setting.hanging * setting.hang + (1 - setting.hanging) * setting.crash
    factor = math.exp(setting.restart / mtbf) * (mtbf + detection)
    return setting.interval / (factor * math.expm1((setting.interval + setting.copy) / mtbf))
