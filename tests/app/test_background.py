from threading import Event

import pytest

from ldm.app.background import in_background


def test_what_is_told_comes_in_order():
    def work(tell, cancelled):
        for k in range(3):
            tell(k)

    assert list(in_background(work)) == [0, 1, 2]


def test_an_error_reaches_the_reader_after_what_was_told():
    def work(tell, cancelled):
        tell("begun")
        raise ValueError("no more")

    told = in_background(work)
    assert next(told) == "begun"
    with pytest.raises(ValueError, match="no more"):
        next(told)


def test_the_work_learns_that_nobody_reads_any_longer():
    learned = Event()

    def work(tell, cancelled):
        tell("begun")
        while not cancelled():
            pass
        learned.set()

    told = in_background(work)
    next(told)
    told.close()
    assert learned.wait(10)
