"""The diffusion transformer: published sizes, initialisation and position embeddings."""

import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.nn.dit import DiT, DiTBlock, position_embedding


def dit() -> DiT:
    torch.manual_seed(0)
    network = DiT(width=32, layers=2, heads=4, context_width=24)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def inputs(height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, height, width, generator=generator)
    return x, torch.tensor([3.0, 700.0]), Conditioning(text=torch.randn(2, 5, 24, generator=generator))


def test_blocks_have_the_size_of_dit_xl_plus_cross_attention() -> None:
    """Peebles & Xie 2023, XL: width w = 1152, 4·w² weights in attention, 8·w² in the MLP, 6·w² in the modulation."""
    width, text = 1152, 768
    with torch.device("meta"):
        block = DiTBlock(width, heads=16, context_width=text)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in block.named_children()}
    biases = {"self_attention": 1, "perceptron": 5, "modulation": 6}  # in vectors of the width
    for name, squares in (("self_attention", 4), ("perceptron", 8), ("modulation", 6)):
        assert count[name] == squares * width**2 + biases[name] * width
    assert count["text_attention"] == 2 * width**2 + 2 * width * text + width


def test_a_new_block_is_the_identity() -> None:
    x, time, text = torch.randn(2, 9, 32), torch.randn(2, 32), torch.randn(2, 5, 24)
    assert torch.equal(DiTBlock(32, 4, 24)(x, time, text), x)


def test_the_order_of_the_text_tokens_does_not_matter() -> None:
    network, (x, time, conditioning) = dit(), inputs()
    reversed_text = conditioning.map(lambda text: text.flip(1))
    torch.testing.assert_close(network(x, time, conditioning), network(x, time, reversed_text), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (2, 2), (4, 10)])
def test_output_shape_equals_input_shape_at_any_multiple_of_the_patch(size: tuple[int, int]) -> None:
    x, time, conditioning = inputs(*size)
    assert dit()(x, time, conditioning).shape == x.shape


def test_output_patches_are_at_the_place_of_their_input_patches() -> None:
    """Without attention, each patch of the output depends only on the same patch of the input."""
    network, (x, time, conditioning) = dit(), inputs(4, 6)
    for block in network.blocks:
        for attention in (block.self_attention, block.text_attention):
            nn.init.zeros_(attention.to_out.weight)
            nn.init.zeros_(attention.to_out.bias)
    changed = x.clone()
    changed[:, :, 2:4, 4:6] += 1
    differs = (network(x, time, conditioning) != network(changed, time, conditioning)).any(1)  # (b, h, w)
    assert differs[:, 2:4, 4:6].all() and int(differs.sum()) == 2 * 4


def test_equal_patches_at_different_positions_have_different_outputs() -> None:
    network, (_, time, conditioning) = dit(), inputs()
    out = network(torch.ones(2, 4, 4, 4), time, conditioning)
    patches = out.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3)  # (b, c, patches, 2, 2)
    assert all(not torch.allclose(patches[:, :, a], patches[:, :, b]) for a in range(4) for b in range(a))


def test_position_embeddings_are_distinct_and_separate_rows_from_columns() -> None:
    embedding = position_embedding(3, 5, 32, torch.device("cpu")).unflatten(0, (3, 5))
    rows, columns = embedding.chunk(2, dim=-1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns))
    assert len(embedding.flatten(0, 1).unique(dim=0)) == 15


def test_position_embeddings_are_relative_to_the_image_size() -> None:
    """The middle of an image has the same embedding at every size, so that no size is out of the trained range."""
    small, large = (
        position_embedding(side, side, 32, torch.device("cpu")).unflatten(0, (side, side)) for side in (4, 16)
    )
    torch.testing.assert_close(small, large[::4, ::4])


def test_a_width_that_is_no_multiple_of_4_is_refused() -> None:
    with pytest.raises(ValueError, match="the width of a DiT is 30, but must be a multiple of 4"):
        DiT(width=30)
