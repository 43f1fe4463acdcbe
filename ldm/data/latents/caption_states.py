"""What a text encoder says of captions, as `ldm encode --text-encoder` keeps it."""

import numpy as np
import torch

from ldm.data.latents.cache import Frozen, text_settings

BATCH = 64  # captions


class CaptionEncoder:
    """What a text encoder says of captions, (c, tokens, d) in the `dtype` named, on the CPU."""

    def __init__(self, text: Frozen, dtype: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder, self.dtype = text.network.to(self.device), dtype
        self.settings = {**text_settings(text), "text_dtype": dtype}
        self.shape = self.encoder.context, self.encoder.widths["text"]
        self.bytes = self.shape[0] * self.shape[1] * np.dtype(dtype).itemsize

    def size_message(self, images: int) -> str:
        """How much they will be, for people."""
        total = self.bytes * images / 1e6
        return (
            f"states of captions: {self.bytes:,} bytes each, {self.shape[0]} tokens x {self.shape[1]} in {self.dtype}; "
            f"{total:,.0f} MB for {images:,} images with one caption each, besides their latents"
        )

    @torch.inference_mode()
    def __call__(self, captions: list[str]) -> np.ndarray:
        """ValueError where the type does not hold a state."""
        states = np.empty((len(captions), *self.shape), self.dtype)
        for k in range(0, len(captions), BATCH):
            part = self.encoder.encode(captions[k : k + BATCH]).get("text").to(getattr(torch, self.dtype))
            if not part.isfinite().all():
                raise ValueError(f"the text encoder's states do not fit in {self.dtype}: give --text-dtype float32")
            states[k : k + BATCH] = part.cpu().numpy()
        return states
