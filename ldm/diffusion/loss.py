"""The training loss."""

from torch import Tensor
from torch.nn.functional import huber_loss

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import per_sample
from ldm.diffusion.weighting import Weighting


def diffusion_loss(
    denoiser: Denoiser,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    context: Tensor,
    weighting: Weighting,
    huber: float | None = None,
) -> Tensor:
    """The weighted mean squared error of the output, per sample (b,), so that it may be looked at by time.

    x0 and eps are (b, c, h, w), t is (b,), context (b, n, d). An error d beyond `huber` counts 2·huber·d - huber²
    in place of d² (Huber 1964), so that outliers pull no harder than that.
    """
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    x = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps
    target = denoiser.prediction.target(x0, eps, alpha, sigma)
    out = denoiser.output(x, t, context).to(target.dtype)
    square = (out - target).square() if huber is None else 2 * huber_loss(out, target, reduction="none", delta=huber)
    error = square.flatten(1).mean(1)
    return weighting(alpha, sigma, denoiser.prediction).to(error.dtype) * error
