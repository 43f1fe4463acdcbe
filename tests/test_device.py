import pytest
import torch

from ldm.device import choose_device, has_bf16


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx2": True, "avx512_bf16": True}, True),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
    ],
)
def test_bf16_is_fast_where_there_are_instructions_for_it(
    cpu: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert has_bf16(torch.device("cpu")) == expected


def test_each_gpu_is_asked_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {0: (7, 5), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: known[device.index])
    assert [has_bf16(torch.device("cuda", index)) for index in known] == [False, True]


@pytest.mark.parametrize(
    ("name", "message"), [("gpu", "must be auto, cpu, cuda"), ("cuda:99", "there is no device cuda:99")]
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_device(name)
