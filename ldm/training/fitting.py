"""Whether a checkpoint is one of this training."""

from typing import Any

from torch import nn

from ldm.weights.native import refuse_misfits


def check_fits(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Raises ValueError, in one sentence, where the checkpoint holds the weights of another network."""
    expected, state = module.state_dict(), checkpoint["state_dict"]
    refuse_misfits(
        "the checkpoint",
        type(module).__name__,
        missing=expected.keys() - state.keys(),
        unexpected=state.keys() - expected.keys(),
        misshapen=[
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    )
