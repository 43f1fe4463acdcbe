import json
from pathlib import Path
from typing import Any

import pytest

from ldm.weights.about import about_of
from ldm.weights.storage.tensors import Tensors

MODEL = {"schedule": {"name": "flow"}, "prediction": "v", "time": None, "size": [8, 8], "sampling": {}}
ABOUT = {"kind": "unet", "config": {"width": 8}, "model": MODEL}


def saying(told: Any) -> Tensors:
    return Tensors(Path("m.safetensors"), {}, lambda names: {}, {} if told is None else {"ldm": told})


def test_it_is_read_from_the_text_of_a_file_and_from_the_data_of_a_checkpoint() -> None:
    assert about_of(saying(json.dumps(ABOUT))) == about_of(saying(ABOUT)) == ABOUT


def test_files_of_others_say_nothing() -> None:
    assert about_of(saying(None)) == {}


@pytest.mark.parametrize("told", ["{", "[1]", '"text"', "3"])
def test_what_is_no_record_is_refused(told: str) -> None:
    with pytest.raises(ValueError, match=r"the metadata of m\.safetensors is damaged"):
        about_of(saying(told))


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
def test_what_is_of_another_type_or_missing_is_named(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=rf"is damaged or incomplete \({names}\)"):
        about_of(saying(json.dumps(ABOUT | change)))
