import pytest
from torch import nn

from ldm.training.fitting import check_fits


def test_the_weights_of_another_network_are_refused_in_one_sentence() -> None:
    network = nn.Linear(2, 3)
    check_fits(network, {"state_dict": network.state_dict()})
    for other, told in (
        (nn.Linear(2, 4), r"weight \[4, 2\] instead of \[3, 2\]"),
        (nn.Linear(2, 3, bias=False), "bias"),
    ):
        with pytest.raises(ValueError, match=rf"the weights in the checkpoint are those of another Linear .*{told}"):
            check_fits(network, {"state_dict": other.state_dict()})
