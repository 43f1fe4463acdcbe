import math
from pathlib import Path

import pytest
from scipy.stats import binomtest

from ldm.metadata.filtering import file_groups
from ldm.metadata.forecast import predicted, statistics
from ldm.metadata.tables import find, open_sources
from tests.data.dumps import dump, replace_in_footer


@pytest.mark.parametrize(("kept", "sample"), [(0, 50), (3, 1000), (500, 1000), (50, 50)])
def test_the_interval_is_wilsons(kept: int, sample: int) -> None:
    told = predicted(10**9, sample, kept, 1, 512, 1.0, 1.0)["kept_rows_95"]
    expected = binomtest(kept, sample).proportion_ci(0.95, method="wilson")
    assert told == pytest.approx([1e9 * expected.low, 1e9 * expected.high], rel=1e-4, abs=2)


def test_costs_follow_the_kept_rows() -> None:
    told = predicted(1000, 100, 20, written_bytes=2000, size=512, alive=0.5, speed=10)
    assert told["kept_rows"] == 200 and told["metadata_bytes"] == 20_000 and told["pictures"] == 100
    assert told["cache_bytes"] == 100 * 2 * 4 * 64 * 64 * 2 and told["download_hours"] == 20 / 3600


def test_nothing_sampled_predicts_nothing() -> None:
    told = predicted(0, 0, 0, 0, 512, 1.0, 1.0)
    assert told["kept_rows"] == told["metadata_bytes"] == told["cache_bytes"] == 0


def test_a_footer_of_text_has_no_minimum_of_numbers(tmp_path: Path) -> None:
    dump(tmp_path / "a.parquet", {"WIDTH": "1000"}, {"WIDTH": "999"})
    (group,) = file_groups(open_sources(find([str(tmp_path)]))[0], [], {})
    assert "width" not in statistics(group) and statistics(group)["height"]["min"] == 512


def test_nan_in_a_footer_is_ignored(tmp_path: Path) -> None:
    for name, score in (("a", 7.25), ("b", 7.125)):
        dump(tmp_path / f"{name}.parquet", {"AESTHETIC_SCORE": 6.5}, {"AESTHETIC_SCORE": score})
    replace_in_footer(tmp_path / "a.parquet", 7.25, math.nan)
    (group,) = file_groups(open_sources(find([str(tmp_path)]))[0], [], {})
    assert statistics(group)["aesthetic"] == {"min": 6.5, "max": 7.125, "nulls": 0}


def test_footers_tell_ends_and_nulls_of_all_files_together(tmp_path: Path) -> None:
    dump(tmp_path / "a.parquet", {"similarity": 0.25}, {"similarity": None}, {"similarity": 0.5}, row_group_size=1)
    dump(tmp_path / "b.parquet", {"similarity": 0.75})
    (group,) = file_groups(open_sources(find([str(tmp_path)]))[0], [], {})
    assert statistics(group)["similarity"] == {"min": 0.25, "max": 0.75, "nulls": 1}
