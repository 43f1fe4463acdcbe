"""Changes files at random, as damage, older versions or attackers would."""

import json
import math
from copy import deepcopy
from random import Random
from typing import Any

DEEP = json.loads("[" * 60 + "]" * 60)
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf, 2**31, 2**63, 10**12,
    10**30, 10**400, "", "x", "0", "1000", "true", "\ud800", "\x00", "../../etc/passwd", "a" * 5000, [], {}, [[]],
    [None], [1, 2], [0] * 1000, ["a"], {"": 1}, {"name": "x"}, {"content": 5}, DEEP,
]  # fmt: skip


def changed_json(value: Any, random: Random) -> Any:
    """Returns a copy of JSON data with one to three members replaced, removed, added or swapped."""
    copy = json.loads(json.dumps(value))
    for _ in range(random.randint(1, 3)):
        containers = [found for found in _containers(copy) if found]
        if not containers:
            return deepcopy(random.choice(VALUES))
        chosen = random.choice(containers)
        keys = list(chosen) if isinstance(chosen, dict) else list(range(len(chosen)))
        key, change = random.choice(keys), random.random()
        if change < 0.15:
            del chosen[key]
        elif change < 0.25 and isinstance(chosen, dict):
            chosen[random.choice([*keys, "unknown", "_private"])] = deepcopy(random.choice(VALUES))
        elif change < 0.35 and len(keys) > 1:
            other = random.choice(keys)
            chosen[key], chosen[other] = chosen[other], chosen[key]
        elif change < 0.5 and isinstance(chosen[key], int | float) and not isinstance(chosen[key], bool):
            chosen[key] = random.choice([-1, 2, 10, 1000]) * chosen[key]
        else:
            chosen[key] = deepcopy(random.choice(VALUES))
    return copy


def _containers(value: Any) -> list[Any]:
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    inner = [found for member in members for found in _containers(member)]
    return [value, *inner] if isinstance(value, dict | list) else inner


def changed_bytes(data: bytes, random: Random) -> bytes:
    """Returns a copy that is truncated or extended, or has bytes flipped, zeroed, repeated or removed."""
    copy = bytearray(data)
    for _ in range(random.randint(1, 4)):
        if not copy:
            break
        # headers are at the start or, in zip files, at the end
        at = random.choice([random.randrange(len(copy)), random.randrange(min(len(copy), 400)), len(copy) - 1])
        end = min(len(copy), at + random.choice([1, 1, 2, 8, 64, 1024]))
        change = random.randrange(6)
        if change == 0:
            copy[at] ^= 1 << random.randrange(8)
        elif change == 1:
            copy[at:end] = bytes(end - at)
        elif change == 2:
            copy[at:end] = random.randbytes(end - at)
        elif change == 3:
            del copy[at:end]
        elif change == 4:
            copy[at:at] = copy[at:end]
        else:
            del copy[at:]
    return bytes(copy)
