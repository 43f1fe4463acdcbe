import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from ldm.__main__ import main
from ldm.metadata.img2dataset import READY, REQUIREMENT, ensure_environment
from tests.data.web import served, turned

# Writes the files of img2dataset that the command reads: the tar and the statistics of each shard.
REPLACEMENT = """
import json, math, pathlib
import pyarrow.parquet as pq

class Downloader: ...
class Resizer: ...

def download(url_list, output_folder, number_sample_per_shard, **settings):
    print("download", settings["caption_col"], settings["processes_count"], settings["distributor"])
    out, paths = pathlib.Path(output_folder), sorted(pathlib.Path(url_list).glob("*.parquet"))
    out.mkdir(exist_ok=True)
    shard = 0
    for path in paths:
        urls = pq.read_table(path)[settings["url_col"]].to_pylist()
        for first in range(0, len(urls), number_sample_per_shard):
            chunk = urls[first : first + number_sample_per_shard]
            stats = out / f"{shard:05d}_stats.json"
            shard += 1
            if "stop" in chunk[0] and not (out.parent / "go").exists():
                raise SystemExit(3)
            if stats.exists():
                continue
            good = sum("good" in url for url in chunk)
            bad = len(chunk) - good
            content = {"count": len(chunk), "successes": good, "failed_to_download": bad, "failed_to_resize": 0,
                       "duration": 1.0, "status_dict": {"success": good, "gone": bad}}
            (out / f"{shard - 1:05d}.tar").write_bytes(b"new")
            stats.write_text(json.dumps(content))
"""


SPARK = """
class Builder:
    def appName(self, name): return self
    def config(self, name, value): print(name, value); return self
    def getOrCreate(self): print("connected to pyspark")

class SparkSession:
    builder = Builder()
"""


@pytest.fixture
def env(tmp_path: Path) -> Path:
    """Creates an environment that is marked as ready, with a replacement for img2dataset."""
    env = tmp_path / "env"
    command = [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(env)]
    subprocess.run(command, check=True)
    (site,) = env.glob("lib/python*/site-packages")
    dependencies = next(path for path in sys.path if (Path(path) / "pyarrow").is_dir())
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    (site / "img2dataset").mkdir()
    (site / "img2dataset" / "__init__.py").write_text("")
    (site / "img2dataset" / "main.py").write_text(REPLACEMENT)
    (env / READY).write_text(REQUIREMENT)
    return env


def write_metadata(folder: Path, *files: list[str]) -> Path:
    folder.mkdir()
    for i, urls in enumerate(files):
        table = pa.table(
            {"url": urls, "caption": [f"caption {j}" for j in range(len(urls))], "hash": [*range(len(urls))]}
        )
        pq.write_table(table, folder / f"{i:05d}.parquet")
    return folder


def report(out: Path) -> dict[str, Any]:
    return dict(json.loads(out.with_name(f"{out.name}.report.json").read_text()))


def run(source: Path, out: Path, env: Path, *options: str) -> int:
    return main(["download", str(source), "--out", str(out), "--env", str(env), *options])


def test_statistics_of_all_shards_are_added_to_the_filters_report(env: Path, tmp_path: Path) -> None:
    source = write_metadata(tmp_path / "kept", ["http://good/1"] * 5, ["http://bad/1", "http://good/2"])
    before = {"rows": 100, "funnel": [{"reason": "side", "rejected": 93, "left": 7, "alone": 93}]}
    (tmp_path / "kept.report.json").write_text(json.dumps(before))
    assert run(source, tmp_path / "out", env, "--shard-size", "2") == 0
    content = report(tmp_path / "out")
    assert [(s["reason"], s["rejected"], s["left"]) for s in content["funnel"]] == [
        ("side", 93, 7), ("not_tried", 0, 7), ("failed_to_download", 1, 6), ("failed_to_decode", 0, 6)
    ]  # fmt: skip
    assert content["download"]["pictures"] == 6 and content["download"]["shards"] == 4
    assert content["download"]["reasons"] == {"gone": 1}
    assert (tmp_path / "out.report.png").stat().st_size > 0


def test_an_interrupted_download_resumes(env: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_metadata(tmp_path / "kept", ["http://good/1"] * 4 + ["http://stop/good"] * 2)
    assert run(source, tmp_path / "out", env, "--shard-size", "2") == 1
    error = capsys.readouterr().err
    assert "img2dataset did not finish 1 shards (exit code 3): see" in error and report(tmp_path / "out")["rows"] == 6
    assert report(tmp_path / "out")["funnel"][0]["rejected"] == 2
    (tmp_path / "out" / "00000.tar").write_bytes(b"old")
    (tmp_path / "out" / "00001_stats.json").write_text('{"count": 2, ')  # as after a kill during writing
    (tmp_path / "go").touch()
    assert run(source, tmp_path / "out", env, "--shard-size", "2", "--processes", "3") == 0
    assert "resuming after 2 URLs in 1 shards" in capsys.readouterr().out
    assert (tmp_path / "out" / "00000.tar").read_bytes() == b"old"
    assert (tmp_path / "out" / "00001.tar").read_bytes() == b"new"
    assert report(tmp_path / "out")["download"]["pictures"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-size", "3"], "with number_sample_per_shard=2, not 3"),
        (["--size", "64"], "with image_size=512, not 64"),
    ],
)
def test_resuming_with_other_settings_or_rows_is_refused(
    options: list[str], message: str, env: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, shards = write_metadata(tmp_path / "kept", ["http://good/1"] * 3), ["--shard-size", "2"]
    assert run(source, tmp_path / "out", env, *shards) == 0
    assert run(source, tmp_path / "out", env, *shards, *options) == 1
    assert message in capsys.readouterr().err
    pq.write_table(pa.table({"url": ["http://good/2"], "caption": ["x"], "hash": [1]}), source / "00001.parquet")
    assert run(source, tmp_path / "out", env, *shards) == 1
    assert "began with rows=" in capsys.readouterr().err


def test_a_folder_with_other_content_is_not_used_as_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_metadata(tmp_path / "kept", ["http://good/1"])
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "thesis.tex").touch()
    assert run(source, tmp_path / "out", tmp_path / "env") == 1
    assert "is a folder with other content" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "env").iterdir()] == ["thesis.tex"]


def test_a_virtual_environment_that_ldm_did_not_create_is_not_emptied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_metadata(tmp_path / "kept", ["http://good/1"])
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    before = sorted(tmp_path.rglob("*"))
    assert run(source, tmp_path / "out", tmp_path / "env") == 1
    assert "is a virtual environment that ldm did not create: give a new folder" in capsys.readouterr().err
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "out.download.json") == before


@pytest.mark.parametrize(
    "name", ["out/00000.tar", "out/thesis.tex", "out.report.json", "out.report.png", "out.img2dataset.log"]
)
def test_a_folder_that_ldm_download_did_not_create_is_not_changed(
    tmp_path: Path, name: str, env: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_metadata(tmp_path / "kept", ["http://good/1"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("theirs")
    assert run(source, tmp_path / "out", env) == 1
    assert f"{name} was not written by ldm download" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "theirs" and not (tmp_path / "out.download.json").exists()


def test_statistics_that_img2dataset_did_not_write_are_not_replaced(
    tmp_path: Path, env: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_metadata(tmp_path / "kept", ["http://good/1"])
    assert run(source, tmp_path / "out", env) == 0
    (tmp_path / "out" / "my_stats.json").write_text("theirs")
    assert run(source, tmp_path / "out", env) == 1
    assert "my_stats.json was not written by ldm download" in capsys.readouterr().err
    assert (tmp_path / "out" / "my_stats.json").read_text() == "theirs"


@pytest.mark.parametrize(
    ("out", "message"),
    [("kept", "is in the input"), ("kept/shards", "is in the input"), ("kept/00000.parquet", "is a file")],
)
def test_an_output_folder_in_the_input_is_refused(
    tmp_path: Path, out: str, message: str, env: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_metadata(tmp_path / "kept", ["http://good/1"])
    before = (source / "00000.parquet").read_bytes()
    assert run(source, tmp_path / out, env) != 0
    assert message in capsys.readouterr().err
    assert (source / "00000.parquet").read_bytes() == before and os.listdir(source) == ["00000.parquet"]


# A Python that copies itself into new environments, and whose pip finds no package, as without a network.
OFFLINE = """#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$4/bin" && touch "$4/pyvenv.cfg" && cp "$0" "$4/bin/python"
else echo "looking around" >&2; echo "ERROR: No matching distribution found for $5" >&2; exit 1; fi
"""


def test_creating_the_environment_is_announced_and_failures_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(OFFLINE)
    python.chmod(0o755)
    source = write_metadata(tmp_path / "kept", ["http://good/1"])
    assert run(source, tmp_path / "out", tmp_path / "env", "--python", str(python)) == 1
    output = capsys.readouterr()
    assert f"needs its own environment: creating it in {tmp_path}/env" in output.out
    assert f"cannot create the environment {tmp_path}/env: ERROR: No matching distribution found for" in output.err
    assert REQUIREMENT in output.err and output.err.count("\n") == 1 and not (tmp_path / "env" / READY).exists()
    assert run(source, tmp_path / "out", tmp_path / "env", "--python", str(python)) == 1  # starts over
    assert capsys.readouterr().err == output.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--threads", "0"], 2, "--threads 0: expected 1 or more"),
        (["--column", "url"], 2, "expected name=COLUMN"),
        (["--column", "url=link"], 1, "has no column link"),
        (["--python", "/nowhere/python", "--env", "{tmp}/new"], 1, "/nowhere/python cannot be run"),
    ],
)
def test_invalid_options_are_reported_in_one_sentence(
    options: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_metadata(tmp_path / "kept", ["http://good/1"])
    filled = [option.replace("{tmp}", str(tmp_path)) for option in options]
    assert run(source, tmp_path / "out", tmp_path / "env", *filled) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kept [v2]", "what?"])
def test_folders_with_names_like_patterns_are_read_and_resumed(
    name: str, env: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_metadata(tmp_path / name, ["http://good/1"] * 3)
    assert run(source, tmp_path / "out [v2]", env, "--shard-size", "2") == 0
    assert report(tmp_path / "out [v2]")["download"]["pictures"] == 3
    assert sorted(path.name for path in (tmp_path / "out [v2]").glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert run(source, tmp_path / "out [v2]", env, "--shard-size", "2") == 0
    assert "resuming after 3 URLs in 2 shards" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("distributor", ["ray", "pyspark"])
def test_the_distributor_is_passed_to_img2dataset(distributor: str, env: Path, tmp_path: Path) -> None:
    (site,) = env.glob("lib/python*/site-packages")
    (site / "ray.py").write_text("def init(**options): print('connected to ray', options)")
    (site / "pyspark").mkdir()
    (site / "pyspark" / "__init__.py").write_text("")
    (site / "pyspark" / "sql.py").write_text(SPARK)
    source = write_metadata(tmp_path / "kept", ["http://good/1"] * 3)
    assert run(source, tmp_path / "out", env, "--distributor", distributor) == 0
    log = (tmp_path / "out.img2dataset.log").read_text()
    assert f"connected to {distributor}" in log and f"download caption 16 {distributor}" in log
    assert "OPENCV_IO_MAX_IMAGE_PIXELS" in log


@pytest.mark.slow
def test_the_package_of_a_distributor_is_installed_with_pip(
    env: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site,) = env.glob("lib/python*/site-packages")
    (site / "pip.py").write_text("import sys; sys.exit(f'ERROR: No matching distribution for {sys.argv[-1]}')")
    source = write_metadata(tmp_path / "kept", ["http://good/1"])
    assert run(source, tmp_path / "out", env, "--distributor", "pyspark") == 1
    output = capsys.readouterr()
    assert "--distributor pyspark needs pyspark>=3.4,<5: installing it into" in output.out
    assert "ERROR: No matching distribution for pyspark>=3.4,<5" in output.err and output.err.count("\n") == 1


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installs img2dataset from the package index; LDM_TEST_ENV is a folder to keep the environment between runs."""
    folder = Path(os.environ.get("LDM_TEST_ENV", tmp_path_factory.mktemp("img2dataset") / "env"))
    ensure_environment(folder, sys.executable, print)
    return folder


KINDS = [
    "large",
    "missing",
    "failing",
    "silent",
    "trickle",
    "endless",
    "short",
    "cut",
    "page",
    "empty",
    "moved",
    "circle",
    "disk",
    "garbage",
    "private",
]
LIMITS = ["--timeout", "2", "--deadline", "3", "--max-bytes", "1000000", "--processes", "1", "--threads", "8"]


def members(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    return found


@pytest.mark.full_size
def test_only_images_are_stored_whatever_a_server_responds(real: Path, tmp_path: Path) -> None:
    with served() as web:
        good = [f"{web}/good/{i}.jpg" for i in range(6)]
        bad = [f"{web}/{kind}/1.jpg" for kind in KINDS] + ["file:///etc/passwd", "not an address"]
        source = write_metadata(tmp_path / "kept", good[:3] + bad, good[3:])
        assert run(source, tmp_path / "out", real, "--shard-size", "10", "--size", "64", *LIMITS) == 0
    statistics = report(tmp_path / "out")["download"]
    # Two in addition to the good ones: the large image, scaled down, and the redirected one.
    assert statistics["pictures"] == 8 and statistics["tried"] == 6 + len(bad)
    assert statistics["failed_to_decode"] == 2  # half an image and an HTML page
    found = members(tmp_path / "out")
    entries = [json.loads(data) for name, data in found.items() if name.endswith(".json")]
    names = {re.sub(r"http://[^/]*/", "", entry["url"]) for entry in entries}
    assert names == {*(f"good/{i}.jpg" for i in range(6)), "large/1.jpg", "moved/1.jpg"}
    for entry in entries:
        assert found[f"{entry['key']}.txt"].decode() == entry["caption"].strip()
        assert min(entry["width"], entry["height"]) == 64 and found[f"{entry['key']}.jpg"][:2] == b"\xff\xd8"
    reasons = " ".join(statistics["reasons"])
    for reason in (
        "404",
        "503",
        "timed out",
        "deadline",
        "limit",
        "shorter than its Content-Length",
        "not allowed",
        "X-Robots-Tag",
    ):
        assert reason in reasons, reason


@pytest.mark.full_size
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_images_are_stored_upright_with_the_hash_of_the_original(form: str, real: Path, tmp_path: Path) -> None:
    with served() as web:
        source = write_metadata(tmp_path / "kept", [f"{web}/turned/{form}/{i}" for i in range(1, 10)])
        assert run(source, tmp_path / "out", real, "--size", "64", *LIMITS) == 0
    found = members(tmp_path / "out")
    entries = {json.loads(data)["url"][-1]: json.loads(data) for name, data in found.items() if name.endswith(".json")}
    assert len(entries) == 9
    for orientation, entry in entries.items():
        original = turned(int(orientation), form)
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(original)))
        stored = Image.open(io.BytesIO(found[f"{entry['key']}.jpg"]))
        assert stored.size == shown.size == (entry["original_width"], entry["original_height"])
        # Both are compressed once more than the original: 4 of 255 is the error of quality 95 on flat colours.
        assert np.abs(np.asarray(stored, int) - np.asarray(shown, int))[8::16, 8::16].max() <= 4
        assert entry["sha256"] == hashlib.sha256(original).hexdigest() and 0x0112 not in stored.getexif()


@pytest.mark.full_size
@pytest.mark.parametrize("distributor", ["ray", "pyspark"])
def test_a_cluster_downloads_within_the_same_limits(distributor: str, real: Path, tmp_path: Path) -> None:
    """Ray and Spark start on this machine if none is configured; Spark needs Java."""
    if distributor == "pyspark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    with served() as web:
        urls = [f"{web}/good/{i} é.jpg" for i in range(4)] + [
            f"{web}/turned/JPEG/6",
            f"{web}/endless/1",
            "file:///etc/passwd",
        ]
        source = write_metadata(tmp_path / "kept", urls)
        options = ["--shard-size", "3", "--size", "64", *LIMITS, "--distributor", distributor]
        assert run(source, tmp_path / "out", real, *options) == 0
    statistics = report(tmp_path / "out")["download"]
    assert statistics["pictures"] == 5 and statistics["shards"] == 3
    assert any("larger than the limit" in reason for reason in statistics["reasons"])
    found = members(tmp_path / "out")
    (entry,) = (json.loads(data) for name, data in found.items() if name.endswith(".json") and b"turned" in data)
    assert (entry["original_width"], entry["original_height"]) == (64, 128)


@pytest.mark.full_size
def test_killing_the_command_stops_the_download_which_can_be_resumed(real: Path, tmp_path: Path) -> None:
    with served() as web:
        urls = [
            [f"{web}/good/{i}.jpg" for i in range(8)] + [f"{web}/silent/{j}.jpg" for j in range(4)] for _ in range(3)
        ]
        source = write_metadata(tmp_path / "kept", *urls)
        options = ["--shard-size", "4", *LIMITS, "--threads", "1"]
        command = [sys.executable, "-m", "ldm", "download", str(source), "--out", str(tmp_path / "out")]
        child = subprocess.Popen([*command, "--env", str(real), *options])
        while not list((tmp_path / "out").glob("*_stats.json")):
            assert child.poll() is None
            time.sleep(0.1)
        child.kill()
        child.wait()
        time.sleep(3)
        done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_stats.json")}
        time.sleep(6)
        assert done == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_stats.json")}
        assert 0 < len(done) < 9
        assert run(source, tmp_path / "out", real, *options) == 0
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == when for name, when in done.items())
    statistics = report(tmp_path / "out")["download"]
    assert statistics["pictures"] == 24 and statistics["failed_to_download"] == 12 and statistics["shards"] == 9
