"""Distances between real and generated images, all computed from the same features."""

from functools import partial

from torchmetrics import MetricCollection

from ldm.metrics.fid import FID, feature_fid, fid_infinity
from ldm.metrics.kid import kid
from ldm.metrics.pair import Pair, bootstrap_error
from ldm.metrics.precision_recall import precision_recall


def distances(
    num_features: int, neighbours: int = 3, resamples: int = 0, infinity: bool = False, sync: bool = True
) -> MetricCollection:
    """Returns a collection of fid, kid, precision and recall, fed by update(features, real=, ids=).

    `resamples` adds fid_error and kid_error, their bootstrap standard errors; `infinity` adds fid_infinity.
    Use sync=False if only one of several processes measures. The collection keeps every feature vector; use FID alone
    for bounded memory.
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
