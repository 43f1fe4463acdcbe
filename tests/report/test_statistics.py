import math

import numpy as np
import pytest
import scipy.stats

from ldm.report.statistics import contrast, holm, mean, quantile, two_sided

A = {1: 9.8, 2: 10.4, 3: 9.1, 4: 10.0, 5: 9.6}
B = {1: 11.3, 2: 12.6, 3: 10.7, 4: 12.1, 5: 11.0}


CLOSED_FORMS = {1: lambda t: 1 - 2 / math.pi * math.atan(t), 2: lambda t: 1 - t / math.sqrt(2 + t * t)}


@pytest.mark.parametrize("freedom", CLOSED_FORMS)
@pytest.mark.parametrize("t", [0.0, 0.5, 2.0, 12.0])
def test_tail_probabilities_match_the_closed_forms(t: float, freedom: int) -> None:
    assert two_sided(t, freedom) == two_sided(-t, freedom) == pytest.approx(CLOSED_FORMS[freedom](t), rel=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 4.5, 100])
def test_quantiles_invert_tail_probabilities(freedom: float) -> None:
    tolerance = 1e-9  # scipy before 1.17 finds the quantile by iteration
    assert two_sided(quantile(freedom), freedom) == pytest.approx(0.05, rel=tolerance)


def test_common_seeds_are_compared_by_the_paired_t_test() -> None:
    found, expected = contrast(A, B), scipy.stats.ttest_rel(list(A.values()), list(B.values()))
    interval = expected.confidence_interval()
    assert found.paired and found.count == 5
    assert found.difference == pytest.approx(np.mean(list(A.values())) - np.mean(list(B.values())))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-5)
    assert found.half == pytest.approx((interval.high - interval.low) / 2, rel=1e-4)


def test_different_seeds_are_compared_by_welchs_test() -> None:
    other = {seed + 100: value for seed, value in B.items() if seed > 1}
    found = contrast(A, other)
    expected = scipy.stats.ttest_ind(list(A.values()), list(other.values()), equal_var=False)
    interval = expected.confidence_interval()
    assert not found.paired and found.count == 4
    assert found.p == pytest.approx(expected.pvalue, rel=1e-5)
    assert found.half == pytest.approx((interval.high - interval.low) / 2, rel=1e-4)


def test_one_seed_has_a_difference_but_no_interval() -> None:
    found = contrast({1: 3.0}, {1: 2.0})
    assert (found.difference, found.half, found.p) == (1.0, None, None)
    assert mean([2.0]).half is None


def test_equal_values_have_p_value_1() -> None:
    assert contrast(A, dict(A)).p == 1
    assert contrast({1: 2.0, 2: 2.0}, {3: 2.0, 4: 2.0}).p == 1


def test_the_interval_of_a_mean_equals_scipys() -> None:
    values = list(A.values())
    low, high = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
    assert mean(values).half == pytest.approx((high - low) / 2, rel=1e-4)


def test_holm_adjusts_a_known_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1] and holm([]) == []
