import pytest
import torch
from scipy import stats

from ldm.diffusion.schedule import EDM, Flow, scaled_linear
from ldm.diffusion.time_sampling import LogitNormal, LogNormal, Uniform, stratified

U = (torch.arange(100_000, dtype=torch.float64)) / 100_000
ALMOST_ONE = torch.tensor([1 - 2.0**-32], dtype=torch.float64)


def test_uniform_samples_every_index_equally_often():
    counts = Uniform(scaled_linear()).times(U).long().bincount(minlength=1000)
    assert len(counts) == 1000 and counts.min() >= 99 and counts.max() <= 101


def test_uniform_on_flow_returns_u_unchanged():
    assert torch.equal(Uniform(Flow()).times(U), U)


def test_the_logit_of_a_logit_normal_time_is_normal():
    t = LogitNormal(Flow(), mean=0.5, std=1.5).times(U[1:])
    assert stats.kstest(t.logit().numpy(), "norm", args=(0.5, 1.5)).statistic < 1e-4


def test_logit_normal_indices_are_the_continuous_times_in_1000_bins():
    on_flow = LogitNormal(Flow()).times(U)
    assert torch.equal(LogitNormal(scaled_linear()).times(U), (on_flow * 1000).floor())


@pytest.mark.parametrize("sampler", [Uniform(scaled_linear()), LogitNormal(scaled_linear(), mean=40.0)])
def test_u_close_to_one_maps_to_the_last_index(sampler):
    assert float(sampler.times(ALMOST_ONE)) == 999


def test_u_of_zero_maps_to_the_first_time():
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(LogitNormal(Flow()).times(zero)) == 0 == float(Uniform(scaled_linear()).times(zero))


@pytest.mark.parametrize("schedule", [EDM(1e-9, 1e9), Flow(), Flow(shift=3.0)], ids=["edm", "flow", "shifted flow"])
def test_log_normal_makes_log_sigma_over_alpha_normal(schedule):
    t = LogNormal(schedule, mean=-0.4, std=1.0).times(U[1:])
    log_ratio = -schedule.log_snr(t) / 2
    assert stats.kstest(log_ratio.numpy(), "norm", args=(-0.4, 1.0)).statistic < 1e-4


def test_log_normal_is_clamped_to_the_range_of_the_schedule():
    t = LogNormal(EDM(0.1, 1.0)).times(U)
    assert (t == 0).float().mean() == pytest.approx(stats.norm.cdf((-2.302585 + 1.2) / 1.2), abs=1e-4)
    assert (t == 1).float().mean() == pytest.approx(1 - stats.norm.cdf(1.0), abs=1e-4)


def test_log_normal_rounds_to_the_nearest_index():
    schedule = scaled_linear()
    t = LogNormal(schedule).times(U[1:])
    assert torch.equal(t, t.round()) and t.min() == 0 and t.max() <= 999
    inside = (t > 0) & (t < 999)
    log_ratio = -1.2 + 1.2 * torch.special.ndtri(U[1:][inside])
    gaps = -schedule.log_snr(t[inside]) / 2 - log_ratio
    half = (schedule.log_snr(t[inside] - 1) - schedule.log_snr(t[inside] + 1)) / 4
    assert (gaps.abs() <= 1.2 * half).all()


@pytest.mark.parametrize("sampler", [LogitNormal, LogNormal])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (torch.nan, 1.0), (0.0, torch.inf)])
def test_an_infinite_mean_or_a_std_that_is_not_positive_is_refused(sampler, mean, std):
    with pytest.raises(ValueError, match=f"a finite mean and a positive std, not {mean} and {std}"):
        sampler(Flow(), mean, std)


def test_each_stratum_gets_one_number_below_one():
    count = 64
    stratum = torch.stack((torch.arange(count).flip(0), torch.full((count,), count)), dim=1)
    for u in (torch.zeros(count).double(), U[::1563], ALMOST_ONE.expand(count)):
        moved = stratified(u, stratum)
        assert torch.equal((moved * count).floor().long().sort().values, torch.arange(count)) and moved.max() < 1


def test_stratification_reduces_the_variance_of_the_batch_mean():
    u = torch.rand(1000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stratum = torch.stack((torch.arange(64), torch.full((64,), 64)), dim=1)
    even = torch.stack([stratified(row, stratum) for row in u]).mean(1)
    assert float(even.mean()) == pytest.approx(0.5, abs=1e-4)
    assert float(even.std()) == pytest.approx(float(u.mean(1).std()) / 64, rel=0.1)
