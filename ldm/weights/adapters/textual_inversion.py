"""Reads and writes textual inversions (Gal et al. 2022), the vectors of a new token, in the formats of all tools."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.nn.text_encoder import TextEncoder
from ldm.weights.adapters.names import TEXT, TEXT_2
from ldm.weights.adapters.recognise import embedding_at
from ldm.weights.storage.opening import open_tensors
from ldm.weights.storage.pickled import read_pickled
from ldm.weights.storage.tensors import PICKLED
from ldm.weights.storage.values import check_finite, in_memory, write_safetensors

SECOND = "learned_embeds_2"  # the file of SDXL's second text encoder in a folder of diffusers
KOHYA = "emb_params"  # the only tensor in kohya's files, whose token is the file name
BY_ENCODER = {"clip_l": TEXT, "clip_g": TEXT_2}  # in files of SDXL
NO_TOKENS = {KOHYA, *BY_ENCODER}
Given = str | Path | tuple[str | Path, str | None]  # a file, or a file and its token in prompts


@dataclass(frozen=True)
class Embedding:
    """The vectors (n, d) of a token for each text encoder."""

    token: str
    vectors: Mapping[str, Tensor]
    source: Path
    layout: str
    metadata: Mapping[str, Any]


def read_embedding(path: str | Path) -> Embedding:
    """Reads the textual inversion in a file, or in a folder of a run or of diffusers.

    Raises FileNotFoundError, or ValueError if the file is not a textual inversion.
    """
    file = embedding_at(path)
    state, metadata = _contents(file)
    token, layout, vectors = _named(file, state, metadata)
    second = file.with_name(f"{SECOND}{file.suffix}")
    if layout == "diffusers" and file.stem == "learned_embeds" and second.is_file():
        vectors |= {TEXT_2: _named(second, *_contents(second))[2][TEXT]}
    found = {}
    for network, tensor in vectors.items():
        rows = tensor[None] if tensor.ndim == 1 else tensor
        if rows.ndim != 2 or not len(rows) or not rows.is_floating_point():
            raise ValueError(f"{file} holds {list(tensor.shape)} numbers for {token}, but needs vectors (n, width)")
        check_finite(token, rows, file)
        found[network] = rows.detach()
    return Embedding(token, found, file, layout, metadata)


def _contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the tensors, which may be in nested dictionaries, and the plain data."""
    if file.suffix in PICKLED:
        saved = read_pickled(file)
        if not isinstance(saved, dict):
            raise ValueError(f"{file} is no textual inversion; give one of A1111, kohya, ai-toolkit or diffusers")
        plain = {name: value for name, value in saved.items() if isinstance(value, str | int | float)}
        return {str(name): value for name, value in saved.items() if isinstance(value, Tensor | dict)}, plain
    tensors = open_tensors(file)
    return dict(tensors.read(tensors)), dict(tensors.metadata)


def _named(file: Path, state: dict[str, Any], metadata: dict[str, Any]) -> tuple[str, str, dict[str, Tensor]]:
    """Returns the token, the layout and the vectors of each text encoder."""
    own = str(metadata["name"]) if metadata.get("name") else file.stem
    if isinstance(state.get("string_to_param"), dict):
        (vectors,) = _one(file, _tensors(state["string_to_param"])).values()
        return own, "A1111", {TEXT: vectors}
    state = _tensors(state)
    if state and state.keys() <= BY_ENCODER.keys():
        return own, "kohya (SDXL)", {network: state[name] for name, network in BY_ENCODER.items() if name in state}
    if "string_to_param" in metadata and KOHYA in state:
        (name,) = _one(file, _parsed(file, metadata["string_to_param"])).values()
        if name not in state:
            raise ValueError(
                f"{file} says that its vectors are {name!r}, but holds {', '.join(state)}: export it again"
            )
        return own, "ai-toolkit", {TEXT: state[name]}
    ((token, vectors),) = _one(file, state).items()
    return (own, "kohya", {TEXT: vectors}) if token == KOHYA else (token, "diffusers", {TEXT: vectors})


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _parsed(file: Path, text: Any) -> dict[str, str]:
    try:
        return dict(json.loads(text) if isinstance(text, str) else text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"what {file} says of its token is damaged; fetch or export it again") from error


def _one(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    if len(found) != 1:
        names = ", ".join(list(found)[:3]) or "none"
        raise ValueError(
            f"{file} is no textual inversion of one token (it holds {len(found)} tensors: {names}); give one of A1111, "
            "kohya, ai-toolkit or diffusers"
        )
    return found


def write_embedding(path: Path, embedding: Embedding, layout: str, metadata: Mapping[str, str]) -> None:
    """Writes `path` in the layout "diffusers", with a second file for SDXL, or "kohya", which A1111 and ComfyUI read.

    Raises ValueError if the layout cannot store the token.
    """
    if layout == "diffusers":
        if embedding.token in NO_TOKENS:
            raise ValueError(f"the token {embedding.token} is no token in a file of diffusers: give another")
        files = {TEXT: path, TEXT_2: path.with_name(f"{SECOND}{path.suffix}")}
        if TEXT_2 in embedding.vectors and path.stem != "learned_embeds":
            raise ValueError(
                f"an embedding of two text encoders is looked for in learned_embeds.safetensors, not {path}"
            )
        for network, vectors in embedding.vectors.items():
            _write(files[network], {embedding.token: vectors}, metadata)
        return
    if embedding.token != path.stem:
        raise ValueError(
            f"in this layout the file's name is the token: write to {embedding.token}{path.suffix}, not to {path.name}"
        )
    names = {network: name for name, network in BY_ENCODER.items()}
    both = TEXT_2 in embedding.vectors
    state = {names[network] if both else KOHYA: vectors for network, vectors in embedding.vectors.items()}
    _write(path, state, {**metadata, "name": embedding.token})


def _write(path: Path, state: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    write_safetensors(path, in_memory(path, state), {**metadata, "ldm": json.dumps({"kind": "embedding"})})


def named(given: Given) -> tuple[str | Path, str | None]:
    """Returns the file and the token that stands for it, or None for its own token.

    Raises ValueError if it is neither a file nor a pair of both.
    """
    path, token = given if isinstance(given, tuple | list) and len(given) == 2 else (given, None)
    if not isinstance(path, str | Path) or not isinstance(token, str | None):
        raise ValueError(f'an embedding is given as {given!r}, but must be a file, or a pair such as ("a.pt", "<cat>")')
    return path, token


def add_embedding(text_encoder: TextEncoder, given: Given) -> str:
    """Adds the token of a textual inversion to a text encoder and returns the token.

    Raises ValueError if the token exists, or if the vectors do not match the text encoders or their width.
    """
    path, token = named(given)
    embedding = read_embedding(path)
    token = token or embedding.token
    names = (TEXT, TEXT_2)[: len(text_encoder.towers)]
    if {*names} != {*embedding.vectors}:
        raise ValueError(
            f"{embedding.source} is for the text encoders {', '.join(embedding.vectors)}, but this model has "
            f"{', '.join(names)}: give one that was made for this model"
        )
    for tower, name in zip(text_encoder.towers, names, strict=True):
        vectors, width = embedding.vectors[name], tower.config["width"]
        if vectors.shape[1] != width:
            raise ValueError(
                f"{embedding.source} holds vectors {list(vectors.shape)}, but the text encoder's are {width} wide: "
                "give one that was made for this model"
            )
    for tokenizer in text_encoder.tokenizers:
        try:
            tokenizer.check_new(token)
        except ValueError as error:
            raise ValueError(
                f"{embedding.source} stands for the token {token!r}: {error}, such as embedding={path}:<my-{token}>"
            ) from error
    for tower, tokenizer, name in zip(text_encoder.towers, text_encoder.tokenizers, names, strict=True):
        tokenizer.add(token, tower.add_tokens(embedding.vectors[name].to(torch.float32)))
    return token
