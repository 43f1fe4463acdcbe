"""Which pixels attend to which word of the prompt (Tang et al. 2023, "What the DAAM", section 3.1)."""

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
    """While it is open, each layer of the UNet that attends to text tells `watch` its weights, at each call.

    They are computed a second time, beside the network, which runs as ever. A compiled UNet tells nothing.
    """
    with ExitStack() as hooks:
        for name, transformer in _transformers(unet):
            size: list[int] = []  # height and width, which the attention within does not see
            hooks.enter_context(transformer.register_forward_pre_hook(partial(_keep_size, size)))
            for layer, attention in _text_attentions(name, transformer):
                hooks.enter_context(attention.register_forward_hook(partial(_tell, watch, layer, size)))
        yield


def text_layers(unet: UNet) -> list[str]:
    """The names of the layers that attend to text: down, middle_in, up."""
    return [layer for name, within in _transformers(unet) for layer, _ in _text_attentions(name, within)]


@dataclass(frozen=True)
class WordMaps:
    """`maps` float32 (words, h, w): the share of each latent pixel's attention that each word gets; the marks of
    begin and end get the rest. `image` uint8 (3, H, W) is the picture that was drawn meanwhile."""

    words: list[str]
    maps: Tensor
    image: Tensor

    def figure(self) -> Image.Image:
        """The picture, then where each word is attended to, from its least share (black) to its greatest."""
        drawn = to_pil(self.image)
        captions = [" ".join(self.words)]
        for word, shares in zip(self.words, self.maps, strict=True):
            low, high = float(shares.min()), float(shares.max())
            heat = colormaps["inferno"](((shares - low) / max(high - low, 1e-9)).numpy(), bytes=True)
            drawn.append(Image.fromarray(heat).convert("RGB").resize(drawn[0].size, Image.Resampling.NEAREST))
            captions.append(f"{word}: {low:.1%} to {high:.1%}")
        return grid(drawn, captions, columns=5)


def word_maps(
    pipeline: Pipeline,
    prompt: str,
    seed: int = 0,
    layers: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    steps: Collection[int] | None = None,
) -> WordMaps:
    """Each word's map, its mean over layers, heads and steps while the pipeline draws the prompt by its settings.

    `layers` lists beginnings of names in `text_layers`; heads and steps count from 0; all of each by default. Words
    that the text encoder has no room for are left out. Raises ValueError for what the UNet or the walk has not.
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
            maps = _mean(weights[0], heads)  # of the prompt; the second half of the batch is the negative one's
            total.add_(interpolate(maps[None], (height, width), mode="bilinear")[0].cpu())
            added += 1

    def on_step(done: int, _total: int) -> None:
        nonlocal step
        step = done

    with watch_attention(unet, watch):
        image = pipeline(prompt, seeds=seed, chunks=1, on_step=on_step).images[0]
    if not added:
        raise ValueError("no attention was seen: load the pipeline without compiling its UNet")
    return WordMaps(words, torch.stack([total[span].sum(0) for span in spans]) / added, image)


def _transformers(unet: UNet) -> list[tuple[str, SpatialTransformer]]:
    return [(name, module) for name, module in unet.named_modules() if isinstance(module, SpatialTransformer)]


def _text_attentions(name: str, within: SpatialTransformer) -> list[tuple[str, Attention]]:
    found = within.named_modules(prefix=name)
    return [(path, module) for path, module in found if path.endswith(".text_attention")]


def _keep_size(size: list[int], _module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
    size[:] = args[0].shape[2:]


def _tell(
    watch: Watch, layer: str, size: list[int], attention: Attention, args: tuple[Tensor, Tensor], _out: Tensor
) -> None:
    q, k = (
        states.detach().unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # (b, heads, h·w or n, width / heads)
        for states in (attention.to_q(args[0]), attention.to_k(args[1]))
    )
    weights = (q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1)  # (b, heads, h·w, n)
    watch(layer, weights.mT.unflatten(-1, size))


def _mean(weights: Tensor, heads: Sequence[int] | None) -> Tensor:
    """(heads, n, h, w) → (n, h, w), over those heads."""
    if heads is None:
        return weights.mean(0)
    if not heads or not all(0 <= head < len(weights) for head in heads):
        raise ValueError(f"heads are {list(heads)}, but this UNet's layers have heads 0 to {len(weights) - 1}")
    return weights[list(heads)].mean(0)


def _words(tokenizer: Tokenizer, prompt: str) -> tuple[list[str], list[slice]]:
    """The words of a prompt, and which of its tokens each is made of."""
    words, spans, start = [], [], 1  # the first token is the mark of the beginning
    for word in prompt.split():
        tokens = tokenizer([word])[0]
        stop = start + int((tokens == tokenizer.end).nonzero()[0]) - 1
        if stop < tokenizer.context and stop > start:
            words.append(word)
            spans.append(slice(start, stop))
        start = stop
    return words, spans


def _unet_of(pipeline: Pipeline) -> UNet:
    """Raises ValueError for a pipeline whose denoising network is none."""
    if not isinstance(pipeline.backbone, UNet):
        raise ValueError(f"attention maps are of a UNet, but this model has a {pipeline.backbone.kind}")
    return pipeline.backbone


def _check(
    unet: UNet, walked: int, words: list[str], layers: Sequence[str] | None, steps: Collection[int] | None
) -> None:
    if not words:
        raise ValueError("the prompt has no words to map: give one that says what to draw")
    known = text_layers(unet)
    if layers is not None and not (layers and all(any(name.startswith(one) for name in known) for one in layers)):
        raise ValueError(f"layers are {layers}, but each must begin one of {', '.join(known)}")
    if steps is not None and not (steps and all(0 <= step < walked for step in steps)):
        raise ValueError(f"steps are {list(steps)}, but the walk has steps 0 to {walked - 1}")
