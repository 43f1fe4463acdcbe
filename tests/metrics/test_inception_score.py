import pytest
import torch

from ldm.metrics.inception_score import InceptionScore


def score(logits: torch.Tensor, parts: int = 1) -> float:
    metric = InceptionScore(logits.shape[1], sync=False)
    for part in logits.chunk(parts):
        metric.update(part)
    return float(metric.compute())


def test_confident_predictions_spread_evenly_score_the_number_of_classes() -> None:
    assert score(1e4 * torch.eye(5).repeat(3, 1), parts=4) == pytest.approx(5)


def test_equal_or_uniform_predictions_score_one() -> None:
    assert score(torch.randn(1, 7).repeat(9, 1)) == pytest.approx(1)
    assert score(torch.zeros(9, 7)) == pytest.approx(1)


def test_score_is_the_exponential_of_the_mean_kl_divergence() -> None:
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(1)
    divergence = torch.nn.functional.kl_div(p.mean(0).log().expand(20, 6), p, reduction="none").sum(1).mean()
    assert score(logits, parts=3) == pytest.approx(divergence.exp().item(), rel=1e-12)


def test_nan_logits_and_an_empty_set_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        score(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="given none"):
        InceptionScore(3, sync=False).compute()
