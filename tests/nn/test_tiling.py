"""Tiles: nothing may tell them from the whole picture but the rounding of sums."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.nn.tiling import tiles
from ldm.nn.vae import VAE
from ldm.weights.native import load_network

# 29 layers of sums of up to 288 products make some 29 · 288 roundings of at most 2⁻²⁴ of the largest number. They have
# no preferred sign, so they add up as a random walk does; both of the results that are compared are off by that much.
ROUNDING = 2 * (29 * 288) ** 0.5 * 2.0**-24


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


def like_stable_diffusions(groups: int = 8) -> VAE:
    """Its four levels, narrow, with no branch that starts as nothing."""
    torch.manual_seed(0)
    vae = VAE(widths=(16, 16, 32, 32), blocks=1, groups=groups)
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return vae.eval()


def picture(size: tuple[int, int], count: int = 1) -> Tensor:
    coarse = torch.rand(count, 3, size[0] // 16, size[1] // 16, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse * 2 - 1, size=size, mode="bilinear")


def test_tiles_cover_each_cell_once() -> None:
    covered = torch.zeros(7, 10, dtype=torch.int64)
    for core, window in tiles(7, 10, side=3, reach=2):
        core.of(covered, 1).add_(1)
        seen = window.of(torch.ones_like(covered), 1)
        assert core.within(window).of(seen, 1).shape == core.of(covered, 1).shape
    assert (covered == 1).all()


@pytest.mark.parametrize("size", [(96, 160), (72, 64)])
@torch.no_grad()
def test_the_shipped_autoencoder_gives_what_it_gives_on_the_whole_picture(size: tuple[int, int]) -> None:
    vae = load_network("assets:vae.safetensors", "vae")
    assert isinstance(vae, VAE)
    image = picture(size, count=2)
    latents = vae.encode(image)
    assert_same(vae.encode(image, tile=64), latents)
    assert_same(vae.decode(latents, tile=64), vae.decode(latents))


@pytest.mark.parametrize("groups", [0, 8])
@torch.no_grad()
def test_an_autoencoder_like_stable_diffusions_gives_what_it_gives_on_the_whole_picture(groups: int) -> None:
    vae, image = like_stable_diffusions(groups), picture((192, 128))
    moments, latents = vae.moments(image), vae.encode(image)
    whole = vae.decode(latents)
    assert_same(vae.moments(image, tile=32), moments)
    assert_same(vae.decode(latents, tile=32), whole)


@torch.no_grad()
def test_pictures_go_one_at_a_time() -> None:
    vae, image = like_stable_diffusions(), picture((32, 32), count=3)
    seen = []
    hook = vae.decoder.conv_out.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    sliced, whole = (vae.decode(vae.encode(image), tile) for tile in (64, 0))
    hook.remove()
    assert seen == [1, 1, 1, 3]
    assert_same(sliced, whole)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


@torch.no_grad()
def test_the_largest_tensor_is_the_last_levels_input() -> None:
    """Stable Diffusion's autoencoder enlarges it to four times its size, and makes more such tensors at once."""
    with torch.device("meta"):
        vae = VAE(groups=0).to("meta")  # its scale too; without passes that measure, which take no more
    latents, image = torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, 3, 256, 256, device="meta")
    for run, x, largest in ((vae.decode, latents, 256 * 128**2), (vae.moments, image, 128 * 128**2)):
        found = []
        for tile in (64, 0):
            with Largest() as watched:
                run(x, tile=tile)
            found.append(watched.numel)
        assert found[0] == largest and found[1] >= 4 * largest


def test_a_tile_of_no_whole_number_of_latents_is_refused() -> None:
    with pytest.raises(ValueError, match="tile is 20, but must be 0, for none, or a multiple of 8 pixels"):
        like_stable_diffusions().decode(torch.zeros(1, 4, 2, 2), tile=20)


def test_the_network_is_left_as_it_was() -> None:
    vae = like_stable_diffusions()
    vae.decode(torch.zeros(1, 4, 8, 8), tile=32)
    assert not any(module._forward_hooks for module in vae.modules())
