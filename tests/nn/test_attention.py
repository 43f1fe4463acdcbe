import torch

from ldm.nn.attention import repeated


def test_a_batch_is_repeated_as_it_lies_in_memory() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    made = repeated(x, torch.empty(6, 1))
    assert torch.equal(made, x.repeat(3, 1, 1, 1)) and made.is_contiguous(memory_format=torch.channels_last)
    assert repeated(x, torch.empty(2, 1)) is x
