import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from ldm.metadata.filtering import file_groups
from ldm.metadata.forecast import predict, statistics
from ldm.metadata.tables import find, open_sources
from tests.data.dumps import dump, replace_in_footer, rows


@pytest.mark.parametrize(("kept", "sample"), [(0, 50), (3, 1000), (500, 1000), (50, 50)])
def test_the_confidence_interval_is_wilsons(kept: int, sample: int) -> None:
    interval = predict(10**9, sample, kept, 1, 512, 1.0, 1.0)["kept_rows_95"]
    expected = binomtest(kept, sample).proportion_ci(0.95, method="wilson")
    assert interval == pytest.approx([1e9 * expected.low, 1e9 * expected.high], rel=1e-4, abs=2)


def test_costs_are_proportional_to_the_kept_rows() -> None:
    forecast = predict(1000, 100, 20, written_bytes=2000, size=512, alive=0.5, speed=10)
    assert forecast["kept_rows"] == 200 and forecast["metadata_bytes"] == 20_000 and forecast["pictures"] == 100
    assert forecast["cache_bytes"] == 100 * 2 * 4 * 64 * 64 * 2 and forecast["download_hours"] == 20 / 3600


def test_an_empty_sample_predicts_zero() -> None:
    forecast = predict(0, 0, 0, 0, 512, 1.0, 1.0)
    assert forecast["kept_rows"] == forecast["metadata_bytes"] == forecast["cache_bytes"] == 0


def test_numbers_stored_as_text_have_no_minimum(tmp_path: Path) -> None:
    dump(tmp_path / "a.parquet", {"WIDTH": "1000"}, {"WIDTH": "999"})
    (group,) = file_groups(open_sources(find([str(tmp_path)]))[0], [], {})
    assert "width" not in statistics(group) and statistics(group)["height"]["min"] == 512


def test_nan_in_a_footer_is_ignored(tmp_path: Path) -> None:
    for name, score in (("a", 7.25), ("b", 7.125)):
        dump(tmp_path / f"{name}.parquet", {"AESTHETIC_SCORE": 6.5}, {"AESTHETIC_SCORE": score})
    replace_in_footer(tmp_path / "a.parquet", 7.25, math.nan)
    (group,) = file_groups(open_sources(find([str(tmp_path)]))[0], [], {})
    assert statistics(group)["aesthetic"] == {"min": 6.5, "max": 7.125, "nulls": 0}


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.int16(), pa.decimal128(9, 2)], ids=str)
def test_the_minimum_is_a_number_for_every_column_type(kind: pa.DataType, tmp_path: Path) -> None:
    table = rows({}, {}, {})
    values = [np.float16(v) if kind == pa.float16() else v for v in (640, 512, 1000)]
    pq.write_table(table.set_column(2, "WIDTH", pa.array(values, kind)), tmp_path / "a.parquet")
    (group,) = file_groups(open_sources(find([str(tmp_path)]))[0], [], {})
    assert statistics(group)["width"] == {"min": 512, "max": 1000, "nulls": 0}


def test_statistics_combine_the_footers_of_all_files(tmp_path: Path) -> None:
    dump(tmp_path / "a.parquet", {"similarity": 0.25}, {"similarity": None}, {"similarity": 0.5}, row_group_size=1)
    dump(tmp_path / "b.parquet", {"similarity": 0.75})
    (group,) = file_groups(open_sources(find([str(tmp_path)]))[0], [], {})
    assert statistics(group)["similarity"] == {"min": 0.25, "max": 0.75, "nulls": 1}
