import json
from pathlib import Path
from typing import Any

import pytest

from ldm.weights.about import about_of
from ldm.weights.storage.tensors import Tensors

MODEL = {"schedule": {"name": "flow"}, "prediction": "v", "time": None, "size": [8, 8], "sampling": {}}
ABOUT = {"kind": "unet", "config": {"width": 8}, "model": MODEL}


def with_metadata(value: Any) -> Tensors:
    return Tensors(Path("m.safetensors"), {}, lambda names: {}, {} if value is None else {"ldm": value})


def test_metadata_is_read_from_json_text_and_from_plain_data() -> None:
    assert about_of(with_metadata(json.dumps(ABOUT))) == about_of(with_metadata(ABOUT)) == ABOUT


def test_a_file_that_ldm_did_not_write_has_no_metadata() -> None:
    assert about_of(with_metadata(None)) == {}


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "3"])
def test_metadata_that_is_not_an_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"the metadata of m\.safetensors is corrupt"):
        about_of(with_metadata(text))


@pytest.mark.parametrize(
    "change, names",
    [
        ({"kind": ["unet"]}, "kind"),
        ({"config": [1], "pad": "0"}, "config, pad"),
        ({"configs": {"vae": 3}}, r"configs\.vae"),
        ({"model": MODEL | {"schedule": "flow", "size": 8}}, r"model\.schedule, model\.size"),
        ({"model": {"schedule": {}, "size": [8, 8], "sampling": {}}}, r"model\.prediction"),
        ({"kind": "adapter"}, r"base\.fingerprint, base\.network, base\.weights"),
        ({"kind": "adapter", "base": {"weights": "m", "fingerprint": 1, "network": {}}}, r"base\.fingerprint"),
    ],
)
def test_values_that_are_missing_or_of_the_wrong_type_are_named(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=rf"is corrupt or incomplete \({names}\)"):
        about_of(with_metadata(json.dumps(ABOUT | change)))
