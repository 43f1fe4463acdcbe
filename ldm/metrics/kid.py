"""Kernel distance (KID) between two sets of features (Bińkowski et al. 2018)."""

from torch import Tensor


def kid(real: Tensor, fake: Tensor, block: int = 4096) -> float:
    """Returns the unbiased squared maximum mean discrepancy of features (n, d) and (m, d), kernel (x·y / d + 1)³.

    It uses all pairs, where the paper averages over random subsets: the expectation is the same, with less variance
    and no seed. Unlike FID it can be negative.
    """
    n, m = len(real), len(fake)
    if min(n, m) < 2:
        raise ValueError(f"KID needs at least two images on each side, not {n} real and {m} generated")
    return _within(real, block) + _within(fake, block) - 2 * _kernel_sum(real, fake, block) / (n * m)


def _within(x: Tensor, block: int) -> float:
    """Returns the mean kernel over pairs of distinct samples of x (n, d)."""
    diagonal = (x.double().square().mean(dim=1) + 1).pow(3).sum().item()
    return (_kernel_sum(x, x, block) - diagonal) / (len(x) * (len(x) - 1))


def _kernel_sum(x: Tensor, y: Tensor, block: int) -> float:
    """Sums the kernel over all pairs in float64, because the three sums of KID nearly cancel."""
    y = y.double()
    return sum(((rows.double() @ y.T) / x.shape[1] + 1).pow(3).sum().item() for rows in x.split(block))
