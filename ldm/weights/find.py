"""What lies at a path, ready to be loaded."""

from pathlib import Path

from ldm.weights.compvis.reader import Choices
from ldm.weights.contents import Contents, StoredNetwork
from ldm.weights.recognise import DEFAULT as DEFAULT
from ldm.weights.recognise import READABLE as READABLE
from ldm.weights.recognise import recognise


def find(path: str | Path, choices: Choices = Choices(), variant: str | None = None) -> Contents:  # noqa: B008 - a constant
    """The networks at `path`, see `recognise`."""
    found = recognise(path, choices, variant)
    networks = {kind: StoredNetwork(**vars(network)) for kind, network in found.networks.items()}
    return Contents(**vars(found) | {"networks": networks})
