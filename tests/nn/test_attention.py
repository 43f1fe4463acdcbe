import torch

from ldm.nn.attention import repeat_batch


def test_repeat_batch_keeps_the_memory_format() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    actual = repeat_batch(x, torch.empty(6, 1))
    assert torch.equal(actual, x.repeat(3, 1, 1, 1)) and actual.is_contiguous(memory_format=torch.channels_last)
    assert repeat_batch(x, torch.empty(2, 1)) is x
