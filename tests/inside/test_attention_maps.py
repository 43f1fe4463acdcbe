from collections import defaultdict

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.conditioning import Conditioning
from ldm.inside.attention_maps import text_layers, watch_attention, word_maps
from ldm.nn.attention import TransformerBlock
from ldm.nn.unet import UNet
from ldm.pipeline.pipeline import Pipeline
from ldm.random import normal
from tests.pipeline.tiny import assembled
from tests.tiny import randomised, save_tiny_model, tiny_dit

PROMPT = "a red circle on white background"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.load(str(save_tiny_model(tmp_path_factory.mktemp("model"))), device="cpu")


def unet() -> UNet:
    network = UNet(
        width=8, multipliers=(1, 2), blocks=1, depth=(2, 1), heads=2, context_width=16, groups=4, linear_projection=True
    )
    return randomised(network, 0, std=0.3)  # type: ignore[return-value]


@torch.no_grad()
def call(network: UNet, size: tuple[int, int] = (6, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((3, 4, *size), (3, 7, 16)))
    return network(x, torch.tensor([1.0, 500.0, 900.0]), Conditioning(text=text))


def test_the_weights_that_are_told_are_those_that_the_network_uses():
    """Each layer's own output is made again from them, by the definition of attention."""
    network, told, seen = unet(), defaultdict(list), defaultdict(list)
    modules = dict(network.named_modules())
    for layer in text_layers(network):
        modules[layer].register_forward_hook(lambda _, args, out, layer=layer: seen[layer].append((args[1], out)))
    with watch_attention(network, lambda layer, weights: told[layer].append(weights)):
        call(network)
    assert list(told) == text_layers(network)
    assert len(told) == sum(isinstance(module, TransformerBlock) for module in modules.values())
    for layer, (weights,) in told.items():
        ((context, out),) = seen[layer]
        attention = modules[layer]
        values = attention.to_v(context).unflatten(-1, (2, -1)).transpose(1, 2)  # (b, heads, n, d)
        mixed = torch.einsum("bknhw,bknd->bhwkd", weights, values).flatten(3).flatten(1, 2)
        torch.testing.assert_close(attention.to_out(mixed), out, rtol=1e-5, atol=1e-5)


def test_weights_come_in_the_size_of_each_level_and_sum_to_one():
    network, sizes = unet(), {}

    def watch(layer: str, weights: Tensor) -> None:
        torch.testing.assert_close(weights.sum(2), torch.ones(3, 2, *weights.shape[3:]))
        sizes[layer.split(".")[0]] = tuple(weights.shape)

    with watch_attention(network, watch):
        call(network, size=(7, 4))
    assert sizes == {"down": (3, 2, 7, 4, 2), "middle_in": (3, 2, 7, 4, 2), "up": (3, 2, 7, 7, 4)}


def test_watching_changes_nothing_and_ends_with_the_block_even_by_an_error():
    network, told = unet(), []
    before = call(network)
    with pytest.raises(KeyError), watch_attention(network, lambda layer, weights: told.append(layer)):
        assert torch.equal(call(network), before)
        raise KeyError
    count = len(told)
    assert count and torch.equal(call(network), before) and len(told) == count


@torch.no_grad()
def first_weights(pipeline: Pipeline, prompt: str, seed: int) -> dict[str, Tensor]:
    """Of the prompt alone, in the first call of the UNet, as a walk from pure noise begins: (heads, n, h, w)."""
    told = {}
    conditioning = pipeline.text_encoder.encode([prompt])
    with watch_attention(pipeline.backbone, lambda layer, weights: told.update({layer: weights[0]})):
        pipeline.denoiser(normal(0, "initial noise", torch.tensor([seed]), 0, (4, 8, 8)), 1.0, conditioning)
    return told


def test_a_words_map_is_the_mean_over_the_layers_heads_and_steps_that_are_chosen(pipeline):
    weights = first_weights(pipeline, PROMPT, seed=5)
    found = word_maps(pipeline, PROMPT, seed=5, layers=["up"], heads=[1], steps=[0])
    assert found.words == PROMPT.split()
    chosen = torch.stack([one[1] for layer, one in weights.items() if layer.startswith("up.")]).mean(0)  # (n, h, w)
    assert len(chosen) == 16 and len(weights) > 2
    expected = interpolate(chosen[None], (8, 8), mode="bilinear")[0, 1 : 1 + len(found.words)]
    torch.testing.assert_close(found.maps, expected)


def test_steps_are_averaged_and_all_of_them_by_default(pipeline):
    each = [word_maps(pipeline, PROMPT, steps=[step]).maps for step in range(3)]
    assert not torch.allclose(each[0], each[2])
    torch.testing.assert_close(word_maps(pipeline, PROMPT).maps, torch.stack(each).mean(0))


@pytest.mark.filterwarnings("ignore:the (text encoder|prompt)")
def test_words_of_several_tokens_get_what_all_of_them_get_and_begin_and_end_the_rest(pipeline):
    prompt = "A red-ish  circle's square,"
    (tokenizer,) = pipeline.text_encoder.tokenizers
    end = int((tokenizer([prompt])[0] == tokenizer.end).nonzero()[0])
    found = word_maps(pipeline, prompt, layers=["middle"], steps=[0])
    assert found.words == ["A", "red-ish", "circle's", "square,"] and end - 1 > len(found.words)
    weights = first_weights(pipeline, prompt, seed=0)
    (middle,) = (one.mean(0) for layer, one in weights.items() if layer.startswith("middle"))  # (n, h, w)
    rest = interpolate(middle[None, [0, *range(end, 16)]].sum(1, keepdim=True), (8, 8), mode="bilinear")[0, 0]
    torch.testing.assert_close(found.maps.sum(0), 1 - rest)


@pytest.mark.filterwarnings("ignore:the (text encoder|prompt)")
def test_the_picture_is_the_pipelines_own_and_words_without_room_are_left_out(pipeline):
    long = " ".join(["red"] * 30)
    found = word_maps(pipeline, long, seed=2)
    assert found.words == ["red"] * 14  # of 16 tokens, two are marks
    assert torch.equal(found.image, pipeline(long, seeds=2).images[0])


def test_the_strip_has_the_picture_and_each_word(pipeline):
    strip = word_maps(pipeline, "red circle").figure()
    assert strip.width == 8 + 3 * (192 + 8)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"prompt": " "}, "the prompt has no words"),
        ({"layers": ["mid", "sideways"]}, r"layers are \['mid', 'sideways'\], but each must begin one of down.1.0"),
        ({"layers": []}, r"layers are \[\]"),
        ({"heads": [2]}, r"heads are \[2\], but this UNet's layers have heads 0 to 1"),
        ({"heads": []}, r"heads are \[\]"),
        ({"steps": [1, 3]}, r"steps are \[1, 3\], but the walk has steps 0 to 2"),
        ({"steps": []}, r"steps are \[\]"),
    ],
)
def test_what_the_unet_or_the_walk_does_not_have_is_refused(pipeline, wrong, told):
    with pytest.raises(ValueError, match=told):
        word_maps(pipeline, **{"prompt": PROMPT} | wrong)


def test_a_network_that_is_no_unet_is_refused(pipeline):
    with pytest.raises(ValueError, match="attention maps are of a UNet, but this model has a dit"):
        word_maps(assembled(pipeline, backbone=tiny_dit()), PROMPT)
