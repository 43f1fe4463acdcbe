"""Batching, moving, dropping and interpolating the conditioning of a denoising network."""

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from ldm.conditioning import Conditioning, cat


def full(samples: int = 3, seed: int = 0) -> Conditioning:
    """A conditioning with every field and a hint."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(samples, *shape, generator=generator)

    return Conditioning(
        text=randn(5, 4),
        pooled=randn(6),
        labels=torch.arange(samples) + seed,
        sizes=randn(6),
        guidance=randn(),
        hints={"inpainting": randn(5, 2, 2)},
    )


def assert_same(one: Conditioning, other: Conditioning) -> None:
    ours, theirs = dict(one.named()), dict(other.named())
    assert [*ours] == [*theirs]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_named_yields_the_fields_that_are_set_and_the_hints() -> None:
    assert [*dict(full().named())] == ["text", "pooled", "labels", "sizes", "guidance", "inpainting"]
    assert [*dict(Conditioning(pooled=torch.zeros(2, 3)).named())] == ["pooled"]


def test_the_length_is_the_number_of_samples() -> None:
    assert len(full(3)) == 3 and len(Conditioning()) == 0


def test_get_returns_a_field_or_a_hint() -> None:
    conditioning = full()
    assert conditioning.get("pooled") is conditioning.pooled
    assert conditioning.get("inpainting") is conditioning.hints["inpainting"]


def test_get_of_a_missing_field_lists_the_available_ones() -> None:
    with pytest.raises(ValueError, match="the network reads sizes, but the conditioning has text"):
        Conditioning(text=torch.zeros(1, 2, 3)).get("sizes")
    with pytest.raises(ValueError, match="has no fields"):
        Conditioning().get("text")


def test_map_changes_every_tensor_and_keeps_missing_fields_missing() -> None:
    doubled = full().map(lambda tensor: 2 * tensor)
    for (name, ours), (_, theirs) in zip(doubled.named(), full().named(), strict=True):
        assert torch.equal(ours, 2 * theirs), name
    assert Conditioning(text=torch.zeros(1, 2, 3)).map(torch.clone).pooled is None


@pytest.mark.parametrize("rows", [slice(1, 3), [2, 0], torch.tensor([2, 2])], ids=["slice", "list", "tensor"])
def test_indexing_selects_samples_in_the_given_order(rows: slice | list[int] | Tensor) -> None:
    selected = full()[rows]
    for (name, ours), (_, theirs) in zip(selected.named(), full().named(), strict=True):
        assert torch.equal(ours, theirs[rows]), name


def test_to_casts_floating_point_tensors_only() -> None:
    cast = full().to("cpu", torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in cast.named()} == {
        name: torch.int64 if name == "labels" else torch.bfloat16 for name, _ in full().named()
    }


def test_to_moves_every_tensor() -> None:
    assert {tensor.device.type for _, tensor in full().to("meta").named()} == {"meta"}


def test_repeated_concatenates_copies_of_the_batch() -> None:
    """Sample i of b becomes samples i, b + i and 2b + i."""
    repeated = full(2).repeated(3)
    assert len(repeated) == 6
    for start in range(0, 6, 2):
        assert_same(repeated[start : start + 2], full(2))


def test_dropped_samples_get_the_unconditional_text_pooled_vector_and_label() -> None:
    empty, rows = full(1, seed=7), torch.tensor([False, True, False])
    dropped = full().dropped(rows, empty)
    for name in ("text", "pooled", "labels"):
        assert torch.equal(dropped.get(name)[1], empty.get(name)[0])
        assert torch.equal(dropped.get(name)[[0, 2]], full().get(name)[[0, 2]])


def test_dropped_samples_keep_their_sizes_guidance_and_hints() -> None:
    dropped = full().dropped(torch.ones(3, dtype=torch.bool), full(1, seed=7))
    assert all(torch.equal(dropped.get(name), full().get(name)) for name in ("sizes", "guidance", "inpainting"))


def test_dropping_keeps_the_dtype_of_the_samples() -> None:
    half = full().to(dtype=torch.bfloat16)
    assert half.dropped(torch.ones(3, dtype=torch.bool), full(1, seed=7)).get("text").dtype == torch.bfloat16


def test_lerp_interpolates_captions_by_a_weight_per_sample_and_nothing_else() -> None:
    one, other, weight = full(), full(seed=7), torch.tensor([0.0, 0.25, 1.0])
    mixed = one.lerp(other, weight)
    for name in ("text", "pooled"):
        a, b, w = one.get(name), other.get(name), weight.view(-1, *[1] * (one.get(name).ndim - 1))
        torch.testing.assert_close(mixed.get(name), a + w * (b - a))
    assert all(torch.equal(mixed.get(name), one.get(name)) for name in ("labels", "sizes", "guidance", "inpainting"))


def test_with_hint_keeps_the_other_hints() -> None:
    control = torch.ones(3, 1, 4, 4)
    hinted = full().with_hint("control", control)
    assert [*hinted.hints] == ["inpainting", "control"] and hinted.get("control") is control
    assert "control" not in full().hints


def test_cat_batches_all_samples_in_order() -> None:
    both = cat([full(2), full(3, seed=7)])
    assert len(both) == 5
    assert_same(both[:2], full(2))
    assert_same(both[2:], full(3, seed=7))


def test_cat_keeps_a_hint_that_all_parts_share_once() -> None:
    """Guidance relies on it: its two conditionings share the mask, as they share the latents."""
    hint = torch.randn(3, 5, 2, 2)
    both = cat([Conditioning(text=torch.randn(3, 2, 4)).with_hint("inpainting", hint) for _ in range(2)])
    assert both.get("inpainting") is hint and len(both.get("text")) == 6


def test_cat_concatenates_a_field_that_all_parts_share() -> None:
    text = torch.randn(3, 2, 4)
    assert len(cat([Conditioning(text=text)] * 2).get("text")) == 6


@pytest.mark.parametrize(
    "other",
    [
        Conditioning(text=torch.zeros(1, 3, 4)),
        Conditioning(text=torch.zeros(1, 2, 4), pooled=torch.zeros(1, 4)),
        Conditioning(text=torch.zeros(1, 2, 4)).with_hint("control", torch.zeros(1, 1, 2, 2)),
    ],
    ids=["other shape", "other field", "other hint"],
)
def test_cat_refuses_conditionings_of_unequal_fields_or_shapes(other: Conditioning) -> None:
    with pytest.raises(ValueError, match="different fields or shapes cannot be batched"):
        cat([Conditioning(text=torch.zeros(1, 2, 4)), other])


def test_a_conditioning_is_a_pytree_of_its_tensors() -> None:
    """FSDP and torch.compile find the tensors in the inputs of a module this way."""
    leaves, spec = _pytree.tree_flatten(full())
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    assert len(tensors) == 6
    assert_same(_pytree.tree_unflatten(leaves, spec), full())
