"""Compares the Fréchet distance at 2,048 features with one by scipy's sqrtm: ldm bench fid --json FILE"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import scipy.linalg
import torch

from ldm.metrics.frechet import Moments, frechet_distance, moments_of


def by_sqrtm(a: Moments, b: Moments) -> float:
    """Returns the distance as computed by the reference implementations."""
    product = a.covariance.numpy() @ b.covariance.numpy()
    root = scipy.linalg.sqrtm(product).real
    apart = (a.mean - b.mean).square().sum().item()
    return float(apart + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root))


def seconds(work: Callable[[], float], repeats: int) -> dict[str, list[float]]:
    """Returns wall times, and processor times, which do not depend on other work on the machine."""
    times: dict[str, list[float]] = {"clock": [], "processor": []}
    for _ in range(repeats):
        began = time.perf_counter(), time.process_time()
        work()
        times["clock"].append(time.perf_counter() - began[0])
        times["processor"].append(time.process_time() - began[1])
    return times


def measure(features: int = 2048, samples: int = 4_000, repeats: int = 3) -> dict[str, Any]:
    """Returns both distances between two sets of random features, and their times."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, features + 1).pow(-0.5).double()  # a decaying spectrum, like that of real features
    noise = [torch.randn(samples, features, generator=generator, dtype=torch.float64) for _ in range(2)]
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64) / 64
    a, b = moments_of(noise[0] * scale), moments_of(noise[1] * scale @ (torch.eye(features) + 0.3 * mixing) + 0.01)
    values = {"ours": frechet_distance(a, b), "sqrtm": by_sqrtm(a, b)}
    times = {
        "ours": seconds(lambda: frechet_distance(a, b), repeats),
        "sqrtm": seconds(lambda: by_sqrtm(a, b), repeats),
    }
    share = {
        kind: statistics.median(times["ours"][kind]) / statistics.median(times["sqrtm"][kind])
        for kind in ("clock", "processor")
    }
    return {
        "values": values,
        "relative_difference": abs(values["ours"] / values["sqrtm"] - 1),
        "seconds": times,
        "share_of_sqrtm": share,
        "features": features,
        "samples": samples,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
    }
