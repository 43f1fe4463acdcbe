import pytest
import torch
from scipy import stats

from ldm.diffusion.schedule import Flow, scaled_linear
from ldm.diffusion.time_sampling import LogitNormal, Uniform

U = (torch.arange(100_000, dtype=torch.float64)) / 100_000
ALMOST_ONE = torch.tensor([1 - 2.0**-32], dtype=torch.float64)


def test_uniform_gives_every_index_its_equal_share():
    counts = Uniform(scaled_linear()).times(U).long().bincount(minlength=1000)
    assert len(counts) == 1000 and counts.min() >= 99 and counts.max() <= 101


def test_uniform_on_flow_is_the_number_itself():
    assert torch.equal(Uniform(Flow()).times(U), U)


def test_the_logit_of_a_logit_normal_time_is_normal():
    t = LogitNormal(Flow(), mean=0.5, std=1.5).times(U[1:])
    assert stats.kstest(t.logit().numpy(), "norm", args=(0.5, 1.5)).statistic < 1e-4


def test_logit_normal_indices_are_its_times_cut_into_a_thousand():
    on_flow = LogitNormal(Flow()).times(U)
    assert torch.equal(LogitNormal(scaled_linear()).times(U), (on_flow * 1000).floor())


@pytest.mark.parametrize("sampler", [Uniform(scaled_linear()), LogitNormal(scaled_linear(), mean=40.0)])
def test_no_number_leads_beyond_the_last_index(sampler):
    assert float(sampler.times(ALMOST_ONE)) == 999


def test_the_number_zero_leads_to_the_first_time():
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(LogitNormal(Flow()).times(zero)) == 0 == float(Uniform(scaled_linear()).times(zero))
