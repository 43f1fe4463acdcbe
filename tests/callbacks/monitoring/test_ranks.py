import json
from dataclasses import asdict
from typing import Any

import pytest
from torch.distributed import HashStore

from ldm.callbacks.monitoring.ranks import Failure, Member, Ranks, is_consequence, own_failure


def ranks(store: Any, host: str = "there", others: int = 1) -> Ranks:
    """Returns rank 0, whose other ranks are processes of another machine."""
    for rank in range(1, others + 1):
        store.set(f"member {rank}", json.dumps(asdict(Member(rank, others + 1, host, 1234, "another kernel"))))
    return Ranks(store, 0, others + 1)


def test_a_rank_on_another_machine_is_dead_only_after_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = HashStore(), [100.0]
    monkeypatch.setattr("ldm.callbacks.monitoring.ranks.time.monotonic", lambda: now[0])
    rank = ranks(store)
    for beat in range(3):
        store.set("beat 1", f"{beat} 0")
        now[0] += 9
        assert rank.failure(silence=10) is None
    now[0] += 9
    assert rank.failure(silence=10) is None
    now[0] += 2
    failure = rank.failure(silence=10)
    assert failure is not None and failure.rank == 1
    assert failure.sentence.startswith(
        "rank 1 of 2 (host there, process 1234) has not answered for 10 s: its process or "
    )


def test_a_rank_that_left_is_not_taken_for_dead() -> None:
    store = HashStore()
    rank = ranks(store)
    store.set("left 1", "")
    assert rank.failure(silence=-1) is None


def test_the_earliest_failure_is_the_one_that_every_rank_gets() -> None:
    store = HashStore()
    rank, first = ranks(store), Failure("rank 1 of 2 failed", 1, reports=True)
    assert rank.publish(first) == first
    assert rank.publish(Failure("rank 0 of 2 failed", 0)) == first == rank.failure(silence=60)


def test_a_failure_is_printed_once_on_each_host() -> None:
    elsewhere, same = ranks(HashStore(), "there", 2), ranks(HashStore(), "there", 2)
    same.members = [Member(rank, 3, "here", rank, "") for rank in range(3)]
    same.own = same.members[0]
    failed, killed = Failure("rank 1 failed", 1, reports=True), Failure("rank 1 died", 1)
    assert elsewhere.reports(failed) and elsewhere.reports(killed)
    assert not same.reports(failed) and same.reports(killed)
    same.own = same.members[2]
    assert not same.reports(killed) and not same.reports(failed)


def test_a_message_that_says_how_to_continue_is_not_extended() -> None:
    member = Member(0, 2, "here", 7, "")
    text = own_failure(member, OSError("the disk is full: free space, and run again with resume=auto")).sentence
    assert (
        text
        == "rank 0 of 2 (host here, process 7) failed: the disk is full: free space, and run again with resume=auto"
    )


def test_errors_of_communication_are_told_from_those_of_a_rank() -> None:
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:47382"
    assert is_consequence(RuntimeError(lost)) and not is_consequence(RuntimeError("shapes do not match"))
    assert not is_consequence(ValueError("NCCL is not a sampler"))
