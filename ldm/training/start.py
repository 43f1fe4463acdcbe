"""Loads the weights that training starts from."""

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import pad

from ldm.nn.attention import Attention
from ldm.nn.backbone import Backbone
from ldm.nn.inpainting import INPAINTING
from ldm.nn.vae import VAE
from ldm.weights.contents import open_contents
from ldm.weights.native import fill, fingerprint
from ldm.weights.parts import first_stage


def start_from(backbone: Backbone, start: str) -> dict[str, str]:
    """Loads the weights of the model at the path `start` into `backbone`, see `widened`.

    Returns {"weights": path, "fingerprint": hash}, and "licence" if it is known.

    Raises FileNotFoundError if the file does not exist, and ValueError if its weights do not fit the backbone.
    """
    found = open_contents(start).denoising
    if found.kind != backbone.kind:
        raise ValueError(
            f"training.start={start} contains a {found.kind}, but model is a {backbone.kind}: choose a model of the "
            "same kind"
        )
    stored = found.load()
    fill(backbone, widened(stored.state_dict(), backbone, cast(Backbone, stored)), start)
    check_meaning(backbone, stored, start)
    licence = found.tensors.metadata.get("modelspec.license")
    known = {"licence": licence} if isinstance(licence, str) else {}
    return {"weights": start, "fingerprint": fingerprint(backbone.state_dict()), **known}


def check_adaptable(backbone: Backbone, start: str) -> None:
    """Raises ValueError if the input channels of an adapter's network differ from those of the starting weights."""
    stored = cast(Backbone, open_contents(start).denoising.blueprint)
    if (INPAINTING in backbone.reads) != (INPAINTING in stored.reads):
        raise ValueError(
            f"training.start={start} does not read masks, but model has input channels for them, whose weights an "
            "adapter would not train: choose adapter=none, or start from inpainting weights"
        )


def widened(state: dict[str, Tensor], backbone: Backbone, stored: Backbone) -> dict[str, Tensor]:
    """Returns the weights of `stored`, with zeros for the hint's input channels that only `backbone` has.

    An inpainting network that starts from them initially ignores the hint and predicts the same as `stored`.
    """
    if INPAINTING not in backbone.reads or INPAINTING in stored.reads:
        return state
    own = backbone.state_dict()
    more = {
        name: own[name].shape[1] - tensor.shape[1]
        for name, tensor in state.items()
        if name in own and tensor.ndim == 4 and own[name].shape[1] > tensor.shape[1]
    }
    return state | {name: pad(state[name], (0, 0, 0, 0, 0, count)) for name, count in more.items()}


def check_meaning(backbone: nn.Module, stored: nn.Module, source: str) -> None:
    """Raises ValueError if weights whose shapes fit belong to a network with other numbers of groups or heads."""
    kinds: dict[str, tuple[type[nn.Module], str]] = {
        "groups": (nn.GroupNorm, "num_groups"),
        "heads": (Attention, "heads"),
    }
    for key, (kind, name) in kinds.items():
        ours, theirs = (
            [getattr(m, name) for m in part.modules() if isinstance(m, kind)] for part in (backbone, stored)
        )
        if ours != theirs:
            raise ValueError(
                f"training.start={source} was trained with {key} {theirs[0]}, and model.{key} is {ours[0]}: "
                "make them equal"
            )


def first_stage_from(vae: VAE, start: str | None, decoder_only: bool) -> VAE:
    """Loads the weights at the path `start`, if given, into the autoencoder.

    Raises ValueError for decoder_only without weights, because the encoder would stay random.
    """
    if start is not None:
        fill(vae, first_stage(start).network.state_dict(), start)
    elif decoder_only:
        raise ValueError("training.decoder_only needs a trained autoencoder: give training.start=FILE")
    return vae
