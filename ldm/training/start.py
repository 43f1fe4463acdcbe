"""Loads the weights that training starts from."""

from torch import nn

from ldm.nn.attention import Attention
from ldm.nn.backbone import Backbone
from ldm.nn.vae import VAE
from ldm.weights.contents import open_contents
from ldm.weights.native import fill, fingerprint
from ldm.weights.parts import first_stage


def start_from(backbone: Backbone, start: str) -> dict[str, str]:
    """Loads the weights of the model at the path `start`; returns {"weights": path, "fingerprint": hash}.

    Raises FileNotFoundError if they do not exist, and ValueError if they do not fit or have another meaning.
    """
    found = open_contents(start).denoising
    if found.kind != backbone.kind:
        raise ValueError(
            f"training.start={start} contains a {found.kind}, but model is a {backbone.kind}: choose a model of the "
            "same kind"
        )
    stored = found.load()
    fill(backbone, stored.state_dict(), start)
    check_meaning(backbone, stored, start)
    licence = found.tensors.metadata.get("modelspec.license")
    known = {"licence": licence} if isinstance(licence, str) else {}
    return {"weights": start, "fingerprint": fingerprint(backbone.state_dict()), **known}


def check_meaning(backbone: nn.Module, stored: nn.Module, source: str) -> None:
    """Raises ValueError if weights of fitting shapes have another meaning, because the stored network has a different
    number of groups or attention heads."""
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
