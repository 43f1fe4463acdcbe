import errno

import pytest

from ldm.callbacks.full_disk import tolerate_full_disk


def test_a_full_disk_only_warns_even_if_another_error_wraps_it() -> None:
    with (
        pytest.warns(UserWarning, match="image was not saved because the disk is full"),
        tolerate_full_disk("the image"),
    ):
        raise OSError(errno.ENOSPC, "no space")
    with pytest.warns(UserWarning, match="the image"), tolerate_full_disk("the image"):
        try:
            raise OSError(errno.EDQUOT, "no quota")
        except OSError as error:
            raise RuntimeError("unexpected pos") from error


def test_other_errors_are_raised() -> None:
    with pytest.raises(PermissionError), tolerate_full_disk("the image"):
        raise PermissionError(errno.EACCES, "not yours")
