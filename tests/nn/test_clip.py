import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from ldm.nn.clip import CLIP, ImageTower, TextTower
from ldm.nn.tokenizer import Tokenizer

WIDTH, LAYERS, HEADS, CONTEXT, PROJECTION = 32, 3, 4, 12, 24
VOCAB = 49408
SIZE, PATCH = 28, 7
CAPTIONS = ["a photo of a cat", "", "two red squares above a blue circle, 8k and many more words than fit"]

LEAVES = {
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.out_proj": "attention.out",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.": "",
    "encoder.layers": "blocks",
    "embeddings.": "",
    "position_embedding.weight": "position_embedding",
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "post_norm",
    "final_layer_norm": "norm",
    "text_model": "text",
    "vision_model": "image",
    "text_projection": "text.projection",
    "visual_projection": "image.projection",
}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of transformers' CLIPModel with the names of ldm's CLIP."""
    out = {}
    for key, value in state.items():
        for theirs, ours in LEAVES.items():
            key = key.replace(theirs, ours)
        out[key] = value
    return out


def pair() -> tuple[CLIPModel, CLIP]:
    """transformers' CLIP with large random weights, and ldm's CLIP with the same weights."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    shared |= {"intermediate_size": 4 * WIDTH, "hidden_act": "quick_gelu"}
    text = CLIPTextConfig(vocab_size=VOCAB, max_position_embeddings=CONTEXT, eos_token_id=49407, **shared)
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, **shared)
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION)).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=0.02, std=0.2)
    ours = CLIP(
        TextTower(VOCAB, WIDTH, LAYERS, HEADS, CONTEXT, projection=PROJECTION),
        ImageTower(SIZE, PATCH, WIDTH, LAYERS, HEADS, PROJECTION),
    )
    ours.load_state_dict(renamed(theirs.state_dict()))
    return theirs, ours


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return Tokenizer(context=CONTEXT)(CAPTIONS)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_pooled_and_projected_text_equals_that_of_transformers(tokens: Tensor) -> None:
    theirs, ours = pair()
    close(ours.text.pooled(tokens), theirs.text_model(tokens).pooler_output)
    close(ours.text.embed(tokens), theirs.get_text_features(tokens).pooler_output)


def test_logits_equal_those_of_transformers(tokens: Tensor, images: Tensor) -> None:
    theirs, ours = pair()
    close(ours(tokens, images), theirs(tokens, images).logits_per_text)


def test_gradients_equal_those_of_transformers(tokens: Tensor, images: Tensor) -> None:
    theirs, ours = pair()
    target = torch.randn(len(tokens), len(images))
    expected = renamed(gradients(theirs, (theirs(tokens, images).logits_per_text * target).sum()))
    actual = gradients(ours, (ours(tokens, images) * target).sum())
    assert actual.keys() == expected.keys()
    # the bias of a key shifts all scores alike, which the softmax ignores: its gradient is zero up to rounding
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in actual.items():
        if name.endswith("attention.k.bias"):
            assert gradient.abs().max() < 1e-5 * scale
        else:
            close(gradient, expected[name], 1e-4)


def test_a_token_does_not_attend_to_later_tokens(tokens: Tensor) -> None:
    tower = TextTower(VOCAB, WIDTH, LAYERS, HEADS, CONTEXT)
    changed = tokens.clone()
    changed[:, 5:] = 320
    assert torch.allclose(tower(tokens)[:, :5], tower(changed)[:, :5], atol=1e-6)
    assert not torch.allclose(tower(tokens)[:, 5:], tower(changed)[:, 5:], atol=1e-3)


def test_padding_after_the_first_end_token_does_not_change_the_pooled_state() -> None:
    tower = TextTower(VOCAB, WIDTH, LAYERS, HEADS, CONTEXT)
    ends, zeros = (Tokenizer(context=CONTEXT, pad=pad)(["a cat"]) for pad in (49407, 0))
    assert torch.allclose(tower.pooled(ends), tower.pooled(zeros), atol=1e-6)


def test_the_default_tower_has_the_parameters_of_stable_diffusion_1() -> None:
    with torch.device("meta"):
        tower = TextTower()
    assert sum(p.numel() for p in tower.parameters()) == 123_060_480


def test_skip_1_returns_the_penultimate_layer_as_in_stable_diffusion_2() -> None:
    full, penultimate = (TextTower(VOCAB, WIDTH, LAYERS, HEADS, CONTEXT, "gelu", skip=skip) for skip in (0, 1))
    penultimate.load_state_dict(full.state_dict())
    tokens = Tokenizer(context=CONTEXT)(CAPTIONS)
    assert torch.equal(penultimate(tokens), full(tokens, skip=1))
    assert torch.equal(penultimate(tokens, skip=1), full(tokens, skip=2))
    assert torch.equal(penultimate.pooled(tokens), full.pooled(tokens))


def pruned(full: TextTower, token_ids: list[int]) -> TextTower:
    """A tower with only `token_ids` in its vocabulary, and the weights of `full`."""
    small = TextTower(**{**full.config, "token_ids": token_ids})
    state = full.state_dict()
    table = state["token_embedding.weight"]
    state["token_embedding.weight"] = torch.cat([table[token_ids], torch.zeros(1, WIDTH)])
    small.load_state_dict(state | {"known": torch.tensor(token_ids)})
    return small


def test_a_pruned_vocabulary_gives_the_output_of_the_full_vocabulary(tokens: Tensor) -> None:
    full = TextTower(VOCAB, WIDTH, LAYERS, HEADS, CONTEXT, projection=PROJECTION)
    small = pruned(full, tokens.unique().tolist())
    assert len(small.token_embedding.weight) < 40
    assert torch.equal(small(tokens), full(tokens))
    assert torch.equal(small.embed(tokens), full.embed(tokens))


def test_all_unknown_tokens_share_one_embedding(tokens: Tensor) -> None:
    small = pruned(TextTower(VOCAB, WIDTH, LAYERS, HEADS, CONTEXT), tokens.unique().tolist())
    below, between, above = (Tokenizer(context=CONTEXT)([f"a photo of a {word}"]) for word in ("!", "zebra", "🦒🦒"))
    assert not torch.isin(torch.stack([t[0, 5] for t in (below, between, above)]), tokens).any()
    for other in (between, above):
        assert torch.equal(small(below)[:, :6], small(other)[:, :6])


def test_unknown_tokens_can_be_decoded_to_words() -> None:
    tokenizer = Tokenizer(context=CONTEXT)
    corpus = tokenizer(["a photo of a cat"]).unique().tolist()
    tower = TextTower(VOCAB, WIDTH, LAYERS, HEADS, CONTEXT, token_ids=corpus)
    unknown = tower.unknown_tokens(tokenizer(["a zebra and a cat", "photo of a Dog and zebra"]))
    assert tokenizer.words(unknown) == ["zebra", "and", "dog"]


def test_a_tower_with_the_full_vocabulary_knows_every_token(tokens: Tensor) -> None:
    assert TextTower(VOCAB, WIDTH, 1, HEADS, CONTEXT).unknown_tokens(tokens) == []


def test_a_clip_can_be_rebuilt_from_its_config_as_json() -> None:
    text = TextTower(VOCAB, WIDTH, LAYERS, HEADS, CONTEXT, projection=8, token_ids=(1, 5, 49407))
    clip = CLIP(text, ImageTower(SIZE, PATCH, WIDTH, LAYERS, HEADS, 8))
    config = json.loads(json.dumps(clip.config))
    with torch.device("meta"):
        copy = CLIP(TextTower(**config["text"]), ImageTower(**config["image"]))
    copy.load_state_dict(clip.state_dict(), assign=True)
    tokens, images = torch.tensor([[1, 7, 49407]]), torch.randn(1, 3, SIZE, SIZE)
    assert copy.config == clip.config
    assert torch.equal(copy(tokens, images), clip(tokens, images))


def test_initialisation_preserves_the_scale_of_the_residual_stream() -> None:
    torch.manual_seed(0)
    tower = ImageTower(SIZE, PATCH, 64, 24, HEADS)
    x = tower(torch.randn(8, 3, SIZE, SIZE))
    assert 0.5 < x.std() < 3  # unit variance after the pre-norm, then 24 blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 30, "heads": 4}, "width 30 cannot be split into 4 heads"),
        ({"activation": "relu"}, "'relu', but must be one of quick_gelu, gelu"),
        ({"token_ids": [3, 2]}, "strictly increasing"),
        ({"token_ids": [2, 2]}, "strictly increasing"),
        ({"token_ids": []}, "at least one id"),
        ({"token_ids": [49408]}, "from 0 to 49407"),
    ],
)
def test_an_impossible_text_tower_is_refused(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        TextTower(**{"layers": 1, **arguments})


def test_skipping_every_layer_is_refused(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="2 layers cannot skip 2"):
        TextTower(VOCAB, WIDTH, 2, HEADS, CONTEXT)(tokens, skip=2)


def test_captions_longer_than_the_context_are_refused(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="have 12 tokens, but this text tower takes at most 8"):
        TextTower(VOCAB, WIDTH, 1, HEADS, context=8)(tokens)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \(3, 28, 28\)"):
        ImageTower(SIZE, PATCH, WIDTH, 1, HEADS)(torch.zeros(1, 3, 32, 28))


def test_patches_that_do_not_tile_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match="28 pixels cannot be cut into patches of 8"):
        ImageTower(SIZE, 8, WIDTH, 1, HEADS)


def test_towers_without_a_projection_cannot_be_compared(tokens: Tensor, images: Tensor) -> None:
    text = TextTower(VOCAB, WIDTH, 1, HEADS, CONTEXT)
    image = ImageTower(SIZE, PATCH, WIDTH, 1, HEADS)
    with pytest.raises(ValueError, match="projection=P"):
        text.embed(tokens)
    with pytest.raises(ValueError, match="projection=P"):
        image.embed(images)
    with pytest.raises(ValueError, match="same projection"):
        CLIP(text, image)
