"""What is measured between real and generated pictures, from features computed once."""

from functools import partial

from torchmetrics import MetricCollection

from ldm.metrics.fid import FID, feature_fid, fid_infinity
from ldm.metrics.kid import kid
from ldm.metrics.pair import Pair, bootstrap_error
from ldm.metrics.precision_recall import precision_recall


def distances(
    num_features: int, neighbours: int = 3, resamples: int = 0, infinity: bool = False, sync: bool = True
) -> MetricCollection:
    """fid, kid, precision and recall, by update(features, real=, ids=).

    With `resamples` also fid_error and kid_error, their bootstrap standard errors; with `infinity` fid_infinity.
    sync=False is for a process that measures while others do not. Keeps every feature vector; for statistics in
    bounded memory take FID alone.
    """
    metrics = {
        "fid": FID(num_features, sync),
        "kid": Pair(kid, sync),
        "precision_recall": Pair(partial(precision_recall, neighbours=neighbours), sync),
    }
    if resamples:
        metrics["fid_error"] = Pair(bootstrap_error(feature_fid, resamples), sync)
        metrics["kid_error"] = Pair(bootstrap_error(kid, resamples), sync)
    if infinity:
        metrics["fid_infinity"] = Pair(fid_infinity, sync)
    return MetricCollection(metrics)  # type: ignore[arg-type]
