from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.data.mapped import map_arrays, write_arrays


def test_a_file_replaced_while_it_is_mapped_keeps_its_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memmap, path = np.memmap, tmp_path / "arrays"
    write_arrays(path, {"x": np.arange(3)}, {"version": 1})

    def replace_before_mapping(*args: Any) -> Any:
        write_arrays(path, {"x": np.arange(10, 40)}, {"version": 2})
        return memmap(*args)

    monkeypatch.setattr(np, "memmap", replace_before_mapping)
    arrays, record = map_arrays(path, ["x"])
    assert arrays["x"].tolist() == [0, 1, 2] and record == {"version": 1}
