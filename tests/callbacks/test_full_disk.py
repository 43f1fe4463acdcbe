import errno

import pytest

from ldm.callbacks.full_disk import tolerate_full_disk


def test_a_full_disk_is_told_and_survived_also_behind_another_error() -> None:
    with (
        pytest.warns(UserWarning, match="PICTURE WAS NOT SAVED, because the disk is full"),
        tolerate_full_disk("THE PICTURE"),
    ):
        raise OSError(errno.ENOSPC, "no space")
    with pytest.warns(UserWarning, match="THE PICTURE"), tolerate_full_disk("THE PICTURE"):
        try:
            raise OSError(errno.EDQUOT, "no quota")
        except OSError as error:
            raise RuntimeError("unexpected pos") from error


def test_other_errors_are_raised() -> None:
    with pytest.raises(PermissionError), tolerate_full_disk("THE PICTURE"):
        raise PermissionError(errno.EACCES, "not yours")
