"""Tests the simulation of a training run on failing hosts against closed forms."""

import math
from collections.abc import Iterable
from dataclasses import replace
from statistics import mean, stdev

import pytest

from experiments.laion.goodput import best_interval
from experiments.laion.simulation import NEVER, Run, Setting, daly, exact_goodput, simulate, young

HOUR, DAY = 3600.0, 86400.0
CALM = Setting(hosts=8, mtbf=NEVER, interval=96.0, copy=4.0)
FAILING = Setting(
    hosts=64, mtbf=64 * 10 * HOUR, interval=900.0, copy=60.0, crash=20.0, hang=2700.0, hanging=0.1, restart=600.0
)
ALL = replace(FAILING, write=40.0, replaced=0.5, spares=1, repair=DAY, slow_every=30 * DAY, slow_for=HOUR, slowdown=1.5)


def agrees(values: Iterable[float], expected: float) -> bool:
    """Whether the mean of the values is within four of its standard errors, which are below 1 % of it."""
    values = list(values)
    error = stdev(values) / math.sqrt(len(values))
    return abs(mean(values) - expected) < 4 * error < 0.04 * expected


def test_without_failures_goodput_is_the_interval_over_interval_plus_copy() -> None:
    assert simulate(replace(CALM, write=32.0), 1e6, seed=0).goodput == 0.96


def test_the_next_copy_waits_for_the_last_write() -> None:
    times = simulate(replace(CALM, write=128.0), 96 + 4 + 1000 * (128 + 4), seed=0)
    assert times.useful == 96 + 1000 * 96


@pytest.mark.parametrize(("failure", "kept"), [(13.0, 0.0), (17.0, 10.0), (26.0, 10.0), (27.0, 20.0), (300.0, 260.0)])
def test_a_failure_loses_all_work_after_the_last_completely_written_copy(failure: float, kept: float) -> None:
    run = Run(Setting(hosts=1, mtbf=NEVER, interval=10.0, copy=1.0, write=5.0))  # written at 16, 27, 38 … 11 n + 5
    run.train(failure, slowdown=1.0)
    run.fail()
    assert run.work == run.times.useful == kept
    assert run.times.repeated == failure - run.times.copying - kept


def test_every_second_of_a_run_has_exactly_one_use() -> None:
    for seed in range(5):
        times = simulate(ALL, 30 * DAY, seed)
        assert times.total == pytest.approx(30 * DAY, rel=1e-12)
        assert min(vars(times).values()) > 0


@pytest.mark.parametrize("interval", [120.0, 900.0, 7200.0])
def test_goodput_under_failures_agrees_with_its_closed_form(interval: float) -> None:
    given = replace(FAILING, interval=interval)
    assert agrees((simulate(given, 50 * DAY, seed).goodput for seed in range(40)), exact_goodput(given))


def test_the_best_simulated_interval_is_that_of_young_and_daly() -> None:
    expected = young(FAILING.copy, FAILING.job_mtbf)
    assert daly(FAILING.copy, FAILING.job_mtbf) == pytest.approx(expected, rel=0.05)
    found = best_interval(FAILING, [expected * 2**power for power in (-3, -1.5, 0, 1.5, 3)], 50 * DAY, runs=20)
    assert found["seconds"] == expected


def test_dalys_interval_maximizes_the_exact_goodput() -> None:
    best = daly(FAILING.copy, FAILING.job_mtbf)
    around = [exact_goodput(replace(FAILING, interval=best * factor)) for factor in (0.97, 1.0, 1.03)]
    assert max(around) == around[1]


def test_hosts_are_slow_as_often_as_a_queue_with_infinitely_many_servers_is_busy() -> None:
    given = replace(CALM, copy=0.0, slow_every=30 * DAY, slow_for=12 * HOUR, slowdown=1.5)
    idle = math.exp(-given.hosts * given.slow_for / given.slow_every)
    goodputs = (simulate(given, 500 * DAY, seed).goodput for seed in range(40))
    assert agrees(goodputs, idle + (1 - idle) / given.slowdown)


def test_without_spares_a_run_is_up_for_mtbf_over_mtbf_plus_repair() -> None:
    given = Setting(hosts=8, mtbf=8 * 10 * HOUR, interval=1.0, copy=0.0, replaced=1.0, repair=5 * HOUR)
    assert agrees((simulate(given, 50 * DAY, seed).goodput for seed in range(40)), 10 / (10 + 5))


def test_a_run_with_enough_spares_never_waits() -> None:
    assert simulate(replace(ALL, spares=1000), 30 * DAY, seed=0).waiting == 0
