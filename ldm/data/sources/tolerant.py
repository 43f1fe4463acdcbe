"""A few unreadable samples among millions: replaced, counted, and refused only when there are too many."""

from collections.abc import Iterator
from typing import Protocol, TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.sources.image import Sample, draw_and_index
from ldm.data.sources.storage import Unreachable

NEAR, FAR = 8, 1000
OUTAGE = 16  # samples, of which each was waited for


class Replaceable(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int | tuple[int, int]) -> Sample: ...

    def group(self, index: int) -> range:
        """The samples that may stand in for this one, itself among them."""


class CheckedSample(TypedDict):
    image: Tensor
    caption: str
    key: str
    id: int
    bad: list[str]  # why the sample asked for could not be read; empty if it is this one


class Tolerant(Dataset[CheckedSample]):
    """`dataset` with each sample that raises ValueError or OSError replaced by a good one, and "bad" saying why.

    The next few of its group (its shard) are tried, then others spread over the whole data set, so that a
    wholly damaged shard costs little. Raises ValueError when none of 1,000 can be read, and Unreachable when object
    storage answered for none of `OUTAGE`.
    """

    def __init__(self, dataset: Replaceable) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> CheckedSample:
        draw, position = draw_and_index(index, len(self))
        reasons: list[str] = []
        unanswered = 0
        for candidate in self._candidates(position):
            try:
                sample = self.dataset[draw, candidate]
            except (ValueError, OSError) as error:
                reasons.append(str(error))
                unanswered += isinstance(error, Unreachable)
                if unanswered == OUTAGE:
                    raise Unreachable(
                        f"none of {OUTAGE} samples came from object storage; the last: {error}"
                    ) from error
            else:
                return {**sample, "bad": reasons[:1]}
        raise ValueError(f"none of {len(reasons)} samples tried could be read; the first: {reasons[0]}")

    def _candidates(self, position: int) -> Iterator[int]:
        group, total = self.dataset.group(position), len(self)
        yield from (group[(position - group.start + k) % len(group)] for k in range(min(NEAR, len(group))))
        step = round(total * (5**0.5 - 1) / 2)  # the golden section: any run of steps is spread evenly
        yield from ((position + k * step) % total for k in range(1, min(FAR, total)))
        if total <= FAR:
            yield from range(total)


class BadSamples:
    """Counts the bad samples of the batches that reach the main process, whichever worker read them.

    The share is judged over at least `total` samples (the data set's length), or 1,000 if that is less, so that
    one bad sample in the first batch is not yet a verdict.
    """

    def __init__(self, max_share: float, total: int, setting: str = "data.max_bad_share") -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"{setting}={max_share}: expected a share from 0 to 1")
        self.max_share, self.setting = max_share, setting
        self.least = min(total, 1000)
        self.seen = self.bad = 0

    def count(self, reasons: list[list[str]]) -> None:
        """Take `batch["bad"]`; raises ValueError once the share of bad samples passes `max_share`."""
        found = [reason for reason in reasons if reason]
        self.seen, self.bad = self.seen + len(reasons), self.bad + len(found)
        if found and self.bad > self.max_share * max(self.seen, self.least):
            raise ValueError(
                f"{self.bad} of {self.seen} samples ({self.bad / self.seen:.1%}) could not be read, as in: "
                f"{found[-1][0]}; mend the data or raise {self.setting}, now {self.max_share}"
            )
