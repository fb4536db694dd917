"""A preparation may be killed, repeated and asked for something else: one folder, whole, of what it says."""

import contextlib
import gzip
import random
import shutil
import subprocess
import sys

import pytest

from clinfuse.conventions import PUBLISHED, InputError
from clinfuse.data.preparation import prepare_folder, resumable_folder
from clinfuse.data.sources import open_source
from clinfuse.ward.synthetic_ward import write_ward


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ward") / "ward"
    write_ward(folder, num_stays=40, seed=2, quiet=True)
    return folder


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_is_kept_or_refused(ward, tmp_path):
    hospital = shutil.copytree(ward, tmp_path / "hospital")
    options = {"out": tmp_path / "x", "task": "mortality-and-stay", "quiet": True}
    prepare_folder(open_source(hospital), **options)
    before = contents(tmp_path / "x")
    prepare_folder(open_source(hospital), **options)
    assert contents(tmp_path / "x") == before
    for other, message in (
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"protocol": PUBLISHED}, "protocol was 'safe' and is 'published' now"),
        ({"task": "phenotyping"}, "task was 'mortality-and-stay' and is 'phenotyping' now"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_folder(open_source(hospital), **(options | other))
    file = open_source(hospital).files["hosp/patients"]
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    file.write_bytes(gzip.compress(text + b"\n") if file.suffix == ".gz" else text + b"\n")
    with pytest.raises(InputError, match="the source has changed: other files for hosp/patients"):
        prepare_folder(open_source(hospital), **options)
    assert contents(tmp_path / "x") == before


def test_another_request_begins_anew(tmp_path):
    out = tmp_path / "x"
    for request, kept in (({"seed": 1}, []), ({"seed": 1}, ["part"]), ({"seed": 2}, [])):
        with pytest.raises(KeyboardInterrupt), resumable_folder(out, request) as (folder, parts):
            assert [file.name for file in parts.iterdir()] == kept
            assert list(folder.iterdir()) == []
            (parts / "part").write_text("done")
            (folder / "half").write_text("")
            raise KeyboardInterrupt
        assert not out.exists()
    with pytest.raises(InputError, match="No space left"), resumable_folder(out, {"seed": 2}):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import sys
from clinfuse.data.preparation import prepare_folder
from clinfuse.data.sources import open_source
prepare_folder(open_source(sys.argv[1]), sys.argv[2], task="phenotyping", quiet=True)
"""


def test_killed_at_any_moment_the_next_run_finishes(ward, tmp_path):
    whole = prepare_folder(open_source(ward), tmp_path / "whole", task="phenotyping", quiet=True)
    out, chance = tmp_path / "killed" / "whole", random.Random(0)
    for _ in range(4):
        run = subprocess.Popen([sys.executable, "-c", PROGRAM, ward, out])
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(chance.uniform(1.2, 3.5))
        run.kill()
        run.wait()
        if out.exists():
            assert contents(out) == contents(whole.path)
    prepare_folder(open_source(ward), out, task="phenotyping", quiet=True)
    assert contents(out) == contents(whole.path)
    assert sorted(file.name for file in out.parent.iterdir()) == [".clinfuse-extracts", "whole"]
