import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from ldm.metrics.distances import distances
from ldm.metrics.fid import feature_fid
from ldm.metrics.inception_score import InceptionScore
from ldm.metrics.pair import Pair, bootstrap_error

pytestmark = pytest.mark.filterwarnings("ignore:FID from")


def features(n: int, seed: int, shift: float = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)) + shift


REAL, FAKE = features(41, 0), features(23, 1, 0.5)


def measured(rank: int, world: int) -> dict[str, float]:
    """Computes the metrics from a rank's share of the features, in batches of 7."""
    metrics = distances(6, resamples=5, infinity=False)
    score = InceptionScore(6)
    for data, real in ((REAL, True), (FAKE, False)):
        share = torch.arange(rank, len(data), world)
        for ids in share.split(7):
            metrics.update(data[ids], real=real, ids=ids)
    score.update(FAKE[rank::world])
    return {name: float(value) for name, value in {**metrics.compute(), "is": score.compute()}.items()}


def one_rank(rank: int, world: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.save(measured(rank, world), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_metrics_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    alone = measured(0, 1)
    assert set(alone) == {"fid", "kid", "precision", "recall", "fid_error", "kid_error", "is"}
    mp.spawn(one_rank, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(alone, rel=1e-6)


def test_a_repeated_image_counts_once_and_order_does_not_matter() -> None:
    metric = Pair(lambda real, fake: float(len(real)) + 1000 * fake[0, 0].item(), sync=False)
    for ids in ([3, 1, 2], [2, 0]):
        metric.update(REAL[ids], real=True, ids=torch.tensor(ids))
        metric.update(FAKE[ids], real=False, ids=torch.tensor(ids))
    assert float(metric.compute()) == pytest.approx(4 + 1000 * FAKE[0, 0].item())


def test_features_of_only_one_side_are_refused() -> None:
    metric = Pair(feature_fid, sync=False)
    metric.update(REAL, real=True, ids=torch.arange(len(REAL)))
    with pytest.raises(ValueError, match="one side has none"):
        metric.compute()


def test_bootstrap_error_of_a_mean_is_the_textbook_standard_error() -> None:
    fake = features(400, 3)[:, :1]
    error = bootstrap_error(lambda _, sample: sample.mean().item(), resamples=600)(REAL, fake)
    assert error == pytest.approx(fake.std().item() / 20, rel=0.1)
