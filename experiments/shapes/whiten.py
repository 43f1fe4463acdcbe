"""Whitens the latents of the included autoencoder: python -m experiments.shapes.whiten OUT.safetensors

The channels of its latents are correlated. This script applies a linear map that makes them uncorrelated and gives each
a standard deviation of 1. The map is merged into the 1x1 convolution before the latents and its inverse into the one
after them, so the decoded images do not change. The new latents are the mean of the posterior, without its variance,
because the covariance after the map would not be diagonal.
"""

import argparse
from pathlib import Path

import torch

from ldm.data.sources.shapes import Shapes
from ldm.image import from_uint8
from ldm.nn.vae import VAE
from ldm.weights.native import save_network
from ldm.weights.parts import first_stage

IMAGES, NO_VARIANCE = 1024, -20.0  # the second is a log-variance


@torch.no_grad()
def whitened(net: VAE, images: torch.Tensor) -> VAE:
    """Returns the autoencoder with latents that are white on average over images (b, 3, H, W) in [-1, 1]."""
    moments = torch.cat([net.moments(some) for some in images.split(128)])
    mean = moments.chunk(2, dim=1)[0].transpose(0, 1).flatten(1).double()  # (z, b·h·w)
    values, vectors = torch.linalg.eigh(torch.cov(mean))
    print("share of the variance by direction:", [round(share, 3) for share in (values / values.sum()).tolist()])
    forward, back = ((vectors * values**power) @ vectors.T for power in (-0.5, 0.5))
    shift, z = mean.mean(dim=1), len(mean)
    white = VAE(**{**net.config, "scale": 1.0, "shift": 0.0})
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weight, bias = state["quant.weight"].double(), state["quant.bias"].double()
    weight[:z], bias[:z] = torch.einsum("ij,jkhw->ikhw", forward, weight[:z]), forward @ (bias[:z] - shift)
    weight[z:], bias[z:] = 0, NO_VARIANCE
    state |= {"quant.weight": weight.float(), "quant.bias": bias.float()}
    weight, bias = state["post_quant.weight"].double(), state["post_quant.bias"].double()
    state["post_quant.bias"] = (bias + weight[:, :, 0, 0] @ shift).float()
    state["post_quant.weight"] = torch.einsum("oihw,ij->ojhw", weight, back).float()
    white.load_state_dict(state)
    return white.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    data = Shapes(seed=1)
    images = from_uint8(torch.stack([data[index]["image"] for index in range(IMAGES)]))
    net = first_stage(weights="assets:vae.safetensors").network
    white = whitened(net, images)
    with torch.no_grad():
        few = images[:32]
        difference = (net.decode(net.encode(few)) - white.decode(white.encode(few))).abs().max()
    print(f"decoded images differ by at most {float(difference):.1e}")
    save_network(args.out, "vae", white.config, white.state_dict())


if __name__ == "__main__":
    main()
