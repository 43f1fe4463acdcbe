"""Maps of the attention that each pixel pays to each word of the prompt (Tang et al. 2023, "What the DAAM", 3.1)."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.image import grid, to_pil
from ldm.nn.attention import Attention, SpatialTransformer
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.unet import UNet
from ldm.pipeline.pipeline import Pipeline

Watch = Callable[[str, Tensor], None]  # (layer, weights (b, heads, n, h, w), which sum to 1 over the n tokens)


@contextmanager
def watch_attention(unet: UNet, watch: Watch) -> Iterator[None]:
    """Within the context, calls `watch` with the weights of each text attention layer at each call of the UNet.

    The weights are computed separately, so that the network runs as before. A compiled UNet does not call `watch`.
    """
    with ExitStack() as hooks:
        for name, transformer in _transformers(unet):
            size: list[int] = []  # height and width, which the attention layer does not receive
            hooks.enter_context(transformer.register_forward_pre_hook(partial(_keep_size, size)))
            for layer, attention in _text_attentions(name, transformer):
                hooks.enter_context(attention.register_forward_hook(partial(_report, watch, layer, size)))
        yield


def text_layers(unet: UNet) -> list[str]:
    """Returns the names of the layers that attend to text, from input to output: down, middle_in, up."""
    return [layer for name, transformer in _transformers(unet) for layer, _ in _text_attentions(name, transformer)]


@dataclass(frozen=True)
class WordMaps:
    """`maps` float32 (words, h, w) holds the fraction of each latent pixel's attention that each word receives.

    The begin and end tokens receive the rest. `image` uint8 (3, H, W) is the image generated from the prompt.
    """

    words: list[str]
    maps: Tensor
    image: Tensor

    def figure(self) -> Image.Image:
        """Returns the image followed by the map of each word, scaled from its minimum (black) to its maximum."""
        images = to_pil(self.image)
        captions = [" ".join(self.words)]
        for word, weights in zip(self.words, self.maps, strict=True):
            low, high = float(weights.min()), float(weights.max())
            heat = colormaps["inferno"](((weights - low) / max(high - low, 1e-9)).numpy(), bytes=True)
            images.append(Image.fromarray(heat).convert("RGB").resize(images[0].size, Image.Resampling.NEAREST))
            captions.append(f"{word}: {low:.1%} to {high:.1%}")
        return grid(images, captions, columns=5)


def word_maps(
    pipeline: Pipeline,
    prompt: str,
    seed: int = 0,
    layers: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    steps: Collection[int] | None = None,
) -> WordMaps:
    """Generates an image with the pipeline's settings, and returns each word's mean map over layers, heads and steps.

    `layers` lists prefixes of names in `text_layers`; heads and steps count from 0; the default is all of each. Words
    beyond the text encoder's context are left out. Raises ValueError for unknown layers, heads or steps.
    """
    words, spans = _words(pipeline.text_encoder.tokenizers[0], prompt)
    unet = _unet_of(pipeline)
    _check(unet, pipeline.settings.steps, words, layers, steps)
    height, width = (length // pipeline.first_stage.factor for length in pipeline.settings.size)
    total = torch.zeros(pipeline.text_encoder.context, height, width)
    step = added = 0

    def watch(layer: str, weights: Tensor) -> None:
        nonlocal added
        if (layers is None or layer.startswith(tuple(layers))) and (steps is None or step in steps):
            maps = _mean(weights[0], heads)  # of the prompt; the other half of the batch is the negative prompt's
            total.add_(interpolate(maps[None], (height, width), mode="bilinear")[0].cpu())
            added += 1

    def on_step(done: int, _total: int) -> None:
        nonlocal step
        step = done

    with watch_attention(unet, watch):
        image = pipeline(prompt, seeds=seed, chunks=1, on_step=on_step).images[0]
    if not added:
        raise ValueError("no attention was recorded: load the pipeline without compiling its UNet")
    return WordMaps(words, torch.stack([total[span].sum(0) for span in spans]) / added, image)


def _transformers(unet: UNet) -> list[tuple[str, SpatialTransformer]]:
    return [(name, module) for name, module in unet.named_modules() if isinstance(module, SpatialTransformer)]


def _text_attentions(name: str, transformer: SpatialTransformer) -> list[tuple[str, Attention]]:
    modules = transformer.named_modules(prefix=name)
    return [(path, module) for path, module in modules if path.endswith(".text_attention")]


def _keep_size(size: list[int], _module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
    size[:] = args[0].shape[2:]


def _report(
    watch: Watch, layer: str, size: list[int], attention: Attention, args: tuple[Tensor, Tensor], _out: Tensor
) -> None:
    q, k = (
        states.detach().unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # (b, heads, h·w or n, width / heads)
        for states in (attention.to_q(args[0]), attention.to_k(args[1]))
    )
    weights = (q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1)  # (b, heads, h·w, n)
    watch(layer, weights.mT.unflatten(-1, size))


def _mean(weights: Tensor, heads: Sequence[int] | None) -> Tensor:
    """Averages (heads, n, h, w) over the given heads, or over all: (n, h, w)."""
    if heads is None:
        return weights.mean(0)
    if not heads or not all(0 <= head < len(weights) for head in heads):
        raise ValueError(f"heads are {list(heads)}, but this UNet's layers have heads 0 to {len(weights) - 1}")
    return weights[list(heads)].mean(0)


def _words(tokenizer: Tokenizer, prompt: str) -> tuple[list[str], list[slice]]:
    """Returns the words of a prompt, and the range of tokens of each."""
    words, spans, start = [], [], 1  # after the begin token
    for word in prompt.split():
        tokens = tokenizer([word])[0]
        stop = start + int((tokens == tokenizer.end).nonzero()[0]) - 1
        if stop < tokenizer.context and stop > start:
            words.append(word)
            spans.append(slice(start, stop))
        start = stop
    return words, spans


def _unet_of(pipeline: Pipeline) -> UNet:
    """Returns the denoising network. Raises ValueError if it is not a UNet."""
    if not isinstance(pipeline.backbone, UNet):
        raise ValueError(f"attention maps need a UNet, but this model has a {pipeline.backbone.kind}")
    return pipeline.backbone


def _check(
    unet: UNet, total: int, words: list[str], layers: Sequence[str] | None, steps: Collection[int] | None
) -> None:
    if not words:
        raise ValueError("the prompt has no words to map: give a prompt with at least one word")
    known = text_layers(unet)
    if layers is not None and not (layers and all(any(name.startswith(layer) for name in known) for layer in layers)):
        raise ValueError(f"layers are {layers}, but each must be a prefix of one of {', '.join(known)}")
    if steps is not None and not (steps and all(0 <= step < total for step in steps)):
        raise ValueError(f"steps are {list(steps)}, but must be between 0 and {total - 1}")
