"""The weights that a training starts from."""

from torch import nn

from ldm.nn.attention import Attention
from ldm.nn.backbone import Backbone
from ldm.nn.vae import VAE
from ldm.weights.find import find
from ldm.weights.native import fill, fingerprint
from ldm.weights.parts import first_stage


def start_from(backbone: Backbone, start: str) -> dict[str, str]:
    """Fills the network with the weights of the model at the path `start`; returns their "weights" and "fingerprint".

    Raises FileNotFoundError or ValueError for weights that are not there, do not fit or mean something else.
    """
    found = find(start).denoising
    if found.kind != backbone.kind:
        raise ValueError(
            f"training.start={start} holds a {found.kind}, but model is a {backbone.kind}: choose a model of its kind"
        )
    stored = found.load()
    fill(backbone, stored.state_dict(), start)
    check_meaning(backbone, stored, start)
    licence = found.tensors.metadata.get("modelspec.license")
    known = {"licence": licence} if isinstance(licence, str) else {}
    return {"weights": start, "fingerprint": fingerprint(backbone.state_dict()), **known}


def check_meaning(backbone: nn.Module, stored: nn.Module, source: str) -> None:
    """Raises ValueError where weights have the right shapes for the network but another meaning: a different number of
    groups or of attention heads."""
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
    """The autoencoder, filled with the weights of the one at the path `start` if given.

    Raises ValueError for decoder_only without weights, whose encoder would stay random.
    """
    if start is not None:
        fill(vae, first_stage(start).network.state_dict(), start)
    elif decoder_only:
        raise ValueError("training.decoder_only trains the decoder of a file: say which by training.start=FILE")
    return vae
