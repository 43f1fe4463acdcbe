"""Replaces and counts unreadable samples, and stops the run only if there are too many."""

from collections.abc import Iterator
from typing import Protocol

from torch.utils.data import Dataset

from ldm.data.sources.image import Sample, draw_and_index
from ldm.data.sources.storage import Unreachable

NEAR, FAR = 8, 1000  # candidates in the sample's group, and in the entire data set
OUTAGE = 16  # unreachable samples, each after several attempts, that count as an outage of the storage


class Replaceable(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int | tuple[int, int]) -> Sample: ...

    def group(self, index: int) -> range:
        """Returns the samples that may replace this one, including itself."""


class CheckedSample(Sample):
    bad: list[str]  # why the requested sample could not be read; empty if it was not replaced


class Tolerant(Dataset[CheckedSample]):
    """Replaces each sample of `dataset` that raises ValueError or OSError by a readable one, with the reason in "bad".

    The next few samples of its group (its shard) are tried first, then others spread over the entire data set, so that
    a corrupt shard costs few attempts. Raises ValueError if about 1,000 samples are unreadable, and Unreachable if
    object storage did not answer for `OUTAGE` samples.
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
                        f"object storage did not answer for {OUTAGE} samples; the last error: {error}"
                    ) from error
            else:
                return {**sample, "bad": reasons[:1]}
        raise ValueError(f"none of {len(reasons)} samples could be read; the first error: {reasons[0]}")

    def _candidates(self, position: int) -> Iterator[int]:
        group, total = self.dataset.group(position), len(self)
        yield from (group[(position - group.start + k) % len(group)] for k in range(min(NEAR, len(group))))
        step = round(total * (5**0.5 - 1) / 2)  # golden-section steps are spread evenly over the data set
        yield from ((position + k * step) % total for k in range(1, min(FAR, total)))
        if total <= FAR:
            yield from range(total)


class BadSamples:
    """Counts the bad samples in the batches that reach the main process from all workers.

    The share is relative to at least min(`total`, 1,000) samples, where `total` is the length of the data set, so that
    one bad sample in the first batch does not stop the run.
    """

    def __init__(self, max_share: float, total: int, setting: str = "data.max_bad_share") -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"{setting}={max_share}: expected a share from 0 to 1")
        self.max_share, self.setting = max_share, setting
        self.least = min(total, 1000)
        self.seen = self.bad = 0

    def count(self, reasons: list[list[str]]) -> None:
        """Counts `batch["bad"]`. Raises ValueError once the share of bad samples exceeds `max_share`."""
        found = [reason for reason in reasons if reason]
        self.seen, self.bad = self.seen + len(reasons), self.bad + len(found)
        if found and self.bad > self.max_share * max(self.seen, self.least):
            raise ValueError(
                f"{self.bad} of {self.seen} samples ({self.bad / self.seen:.1%}) could not be read, for example: "
                f"{found[-1][0]}; fix the data or raise {self.setting}, now {self.max_share}"
            )
