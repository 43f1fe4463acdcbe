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


def test_recorded_weights_reproduce_the_output_of_each_layer():
    """The output is recomputed from the weights by the definition of attention."""
    network, recorded, calls = unet(), defaultdict(list), defaultdict(list)
    modules = dict(network.named_modules())
    for layer in text_layers(network):
        modules[layer].register_forward_hook(lambda _, args, out, layer=layer: calls[layer].append((args[1], out)))
    with watch_attention(network, lambda layer, weights: recorded[layer].append(weights)):
        call(network)
    assert list(recorded) == text_layers(network)
    assert len(recorded) == sum(isinstance(module, TransformerBlock) for module in modules.values())
    for layer, (weights,) in recorded.items():
        ((context, out),) = calls[layer]
        attention = modules[layer]
        values = attention.to_v(context).unflatten(-1, (2, -1)).transpose(1, 2)  # (b, heads, n, d)
        mixed = torch.einsum("bknhw,bknd->bhwkd", weights, values).flatten(3).flatten(1, 2)
        torch.testing.assert_close(attention.to_out(mixed), out, rtol=1e-5, atol=1e-5)


def test_weights_have_the_size_of_their_level_and_sum_to_one():
    network, sizes = unet(), {}

    def watch(layer: str, weights: Tensor) -> None:
        torch.testing.assert_close(weights.sum(2), torch.ones(3, 2, *weights.shape[3:]))
        sizes[layer.split(".")[0]] = tuple(weights.shape)

    with watch_attention(network, watch):
        call(network, size=(7, 4))
    assert sizes == {"down": (3, 2, 7, 4, 2), "middle_in": (3, 2, 7, 4, 2), "up": (3, 2, 7, 7, 4)}


def test_watching_does_not_change_the_output_and_ends_with_the_context():
    network, layers = unet(), []
    before = call(network)
    with pytest.raises(KeyError), watch_attention(network, lambda layer, weights: layers.append(layer)):
        assert torch.equal(call(network), before)
        raise KeyError
    count = len(layers)
    assert count and torch.equal(call(network), before) and len(layers) == count


@torch.no_grad()
def first_weights(pipeline: Pipeline, prompt: str, seed: int) -> dict[str, Tensor]:
    """The weights (heads, n, h, w) by layer in the first UNet call of sampling, for the prompt alone."""
    weights_by_layer = {}
    conditioning = pipeline.text_encoder.encode([prompt])
    with watch_attention(pipeline.backbone, lambda layer, weights: weights_by_layer.update({layer: weights[0]})):
        pipeline.denoiser(normal(0, "initial noise", torch.tensor([seed]), 0, (4, 8, 8)), 1.0, conditioning)
    return weights_by_layer


def test_a_map_is_the_mean_over_the_selected_layers_heads_and_steps(pipeline):
    weights = first_weights(pipeline, PROMPT, seed=5)
    maps = word_maps(pipeline, PROMPT, seed=5, layers=["up"], heads=[1], steps=[0])
    assert maps.words == PROMPT.split()
    of_head_1 = [attention[1] for layer, attention in weights.items() if layer.startswith("up.")]
    selected = torch.stack(of_head_1).mean(0)  # (n, h, w)
    assert len(selected) == 16 and len(weights) > 2
    expected = interpolate(selected[None], (8, 8), mode="bilinear")[0, 1 : 1 + len(maps.words)]
    torch.testing.assert_close(maps.maps, expected)


def test_maps_are_averaged_over_all_steps_by_default(pipeline):
    each = [word_maps(pipeline, PROMPT, steps=[step]).maps for step in range(3)]
    assert not torch.allclose(each[0], each[2])
    torch.testing.assert_close(word_maps(pipeline, PROMPT).maps, torch.stack(each).mean(0))


@pytest.mark.filterwarnings("ignore:the (text encoder|prompt)")
def test_a_word_gets_the_sum_of_its_tokens_and_begin_and_end_get_the_rest(pipeline):
    prompt = "A red-ish  circle's square,"
    (tokenizer,) = pipeline.text_encoder.tokenizers
    end = int((tokenizer([prompt])[0] == tokenizer.end).nonzero()[0])
    maps = word_maps(pipeline, prompt, layers=["middle"], steps=[0])
    assert maps.words == ["A", "red-ish", "circle's", "square,"] and end - 1 > len(maps.words)
    weights = first_weights(pipeline, prompt, seed=0)
    (middle,) = (attention.mean(0) for layer, attention in weights.items() if layer.startswith("middle"))  # (n, h, w)
    rest = interpolate(middle[None, [0, *range(end, 16)]].sum(1, keepdim=True), (8, 8), mode="bilinear")[0, 0]
    torch.testing.assert_close(maps.maps.sum(0), 1 - rest)


@pytest.mark.filterwarnings("ignore:the (text encoder|prompt)")
def test_the_image_is_unchanged_and_words_beyond_the_context_are_left_out(pipeline):
    long = " ".join(["red"] * 30)
    maps = word_maps(pipeline, long, seed=2)
    assert maps.words == ["red"] * 14  # two of the 16 tokens are the begin and end tokens
    assert torch.equal(maps.image, pipeline(long, seeds=2).images[0])


def test_the_figure_has_the_image_and_a_map_for_each_word(pipeline):
    figure = word_maps(pipeline, "red circle").figure()
    assert figure.width == 8 + 3 * (192 + 8)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"prompt": " "}, "the prompt has no words"),
        ({"layers": ["mid", "sideways"]}, r"layers are \['mid', 'sideways'\], .* a prefix of one of down.1.0"),
        ({"layers": []}, r"layers are \[\]"),
        ({"heads": [2]}, r"heads are \[2\], but this UNet's layers have heads 0 to 1"),
        ({"heads": []}, r"heads are \[\]"),
        ({"steps": [1, 3]}, r"steps are \[1, 3\], but must be between 0 and 2"),
        ({"steps": []}, r"steps are \[\]"),
    ],
)
def test_unknown_layers_heads_or_steps_are_refused(pipeline, wrong, message):
    with pytest.raises(ValueError, match=message):
        word_maps(pipeline, **{"prompt": PROMPT} | wrong)


def test_a_model_without_a_unet_is_refused(pipeline):
    with pytest.raises(ValueError, match="attention maps need a UNet, but this model has a dit"):
        word_maps(assembled(pipeline, backbone=tiny_dit()), PROMPT)
