"""Tiled encoding and decoding, which equals that of the full image up to the rounding of sums."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.nn.tiling import tiles
from ldm.nn.vae import VAE
from ldm.weights.native import load_network

# 29 layers of sums of up to 288 products round about 29 · 288 times, each time by at most 2⁻²⁴ of the largest number.
# The errors have random signs, so they grow with the square root of their number, in both of the compared results.
ROUNDING = 2 * (29 * 288) ** 0.5 * 2.0**-24


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= ROUNDING * expected.abs().max()


def narrow_vae(groups: int = 8) -> VAE:
    """Stable Diffusion's four levels with fewer channels, and residual branches that do not start at zero."""
    torch.manual_seed(0)
    vae = VAE(widths=(16, 16, 32, 32), blocks=1, groups=groups)
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return vae.eval()


def image_of(size: tuple[int, int], count: int = 1) -> Tensor:
    coarse = torch.rand(count, 3, size[0] // 16, size[1] // 16, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse * 2 - 1, size=size, mode="bilinear")


def test_tiles_cover_each_cell_once() -> None:
    covered = torch.zeros(7, 10, dtype=torch.int64)
    for core, window in tiles(7, 10, side=3, margin=2):
        core.crop(covered, 1).add_(1)
        cropped = window.crop(torch.ones_like(covered), 1)
        assert core.relative_to(window).crop(cropped, 1).shape == core.crop(covered, 1).shape
    assert (covered == 1).all()


@pytest.mark.parametrize("size", [(96, 160), (72, 64)])
@torch.no_grad()
def test_tiling_the_shipped_autoencoder_equals_the_full_image(size: tuple[int, int]) -> None:
    vae = load_network("assets:vae.safetensors", "vae")
    assert isinstance(vae, VAE)
    image = image_of(size, count=2)
    latents = vae.encode(image)
    assert_same(vae.encode(image, tile=64), latents)
    assert_same(vae.decode(latents, tile=64), vae.decode(latents))


@pytest.mark.parametrize("groups", [0, 8])
@torch.no_grad()
def test_tiling_a_vae_like_that_of_stable_diffusion_equals_the_full_image(groups: int) -> None:
    vae, image = narrow_vae(groups), image_of((192, 128))
    moments, latents = vae.moments(image), vae.encode(image)
    decoded = vae.decode(latents)
    assert_same(vae.moments(image, tile=32), moments)
    assert_same(vae.decode(latents, tile=32), decoded)


@torch.no_grad()
def test_images_are_decoded_one_at_a_time() -> None:
    vae, image = narrow_vae(), image_of((32, 32), count=3)
    batches = []
    hook = vae.decoder.conv_out.register_forward_hook(lambda module, inputs, out: batches.append(len(out)))
    tiled, full = (vae.decode(vae.encode(image), tile) for tile in (64, 0))
    hook.remove()
    assert batches == [1, 1, 1, 3]
    assert_same(tiled, full)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is created."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


@torch.no_grad()
def test_the_largest_tensor_is_the_input_of_the_last_level() -> None:
    """Without tiles, Stable Diffusion's autoencoder upsamples it to four times its size."""
    with torch.device("meta"):
        vae = VAE(groups=0).to("meta")  # .to() moves its scale too; without group norms, whose passes need no more
    latents, image = torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, 3, 256, 256, device="meta")
    for run, x, largest in ((vae.decode, latents, 256 * 128**2), (vae.moments, image, 128 * 128**2)):
        sizes = []
        for tile in (64, 0):
            with Largest() as created:
                run(x, tile=tile)
            sizes.append(created.numel)
        assert sizes[0] == largest and sizes[1] >= 4 * largest


def test_a_tile_that_is_no_multiple_of_the_downsampling_is_refused() -> None:
    with pytest.raises(ValueError, match="tile is 20, but must be 0, for no tiles, or a multiple of 8 pixels"):
        narrow_vae().decode(torch.zeros(1, 4, 2, 2), tile=20)


def test_tiling_leaves_no_hooks_behind() -> None:
    vae = narrow_vae()
    vae.decode(torch.zeros(1, 4, 8, 8), tile=32)
    assert not any(module._forward_hooks for module in vae.modules())
