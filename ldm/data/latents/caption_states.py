"""Computes the text encoder's states of captions for `ldm encode --text-encoder`."""

import numpy as np
import torch

from ldm.data.latents.cache import Frozen, text_settings

BATCH = 64  # captions


class CaptionEncoder:
    """Maps c captions to their text encoder states (c, tokens, d), a NumPy array of type `dtype`."""

    def __init__(self, text: Frozen, dtype: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder, self.dtype = text.network.to(self.device), dtype
        self.settings = {**text_settings(text), "text_dtype": dtype}
        self.shape = self.encoder.context, self.encoder.widths["text"]
        self.bytes = self.shape[0] * self.shape[1] * np.dtype(dtype).itemsize

    def size_message(self, images: int) -> str:
        """Returns a human-readable estimate of the size of the states of `images` captions."""
        total = self.bytes * images / 1e6
        return (
            f"caption states: {self.bytes:,} bytes each, {self.shape[0]} tokens x {self.shape[1]} in {self.dtype}; "
            f"{total:,.0f} MB for {images:,} images with one caption each, in addition to their latents"
        )

    @torch.inference_mode()
    def __call__(self, captions: list[str]) -> np.ndarray:
        """Raises ValueError if a state is not finite in `dtype`."""
        states = np.empty((len(captions), *self.shape), self.dtype)
        for k in range(0, len(captions), BATCH):
            batch = self.encoder.encode(captions[k : k + BATCH]).get("text").to(getattr(torch, self.dtype))
            if not batch.isfinite().all():
                raise ValueError(f"the text encoder's states overflow in {self.dtype}: give --text-dtype float32")
            states[k : k + BATCH] = batch.cpu().numpy()
        return states
