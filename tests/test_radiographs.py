"""Radiographs beyond their pages: damaged files, the window of time, order, layouts, interruptions."""

import gzip
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.radiograph_images import (
    decode_radiograph,
    enhance_contrast,
    fit_square,
    read_dicom,
    read_grey,
    window_grey,
)
from clinfuse.data.radiographs import (
    link_radiographs,
    read_dicom_headers,
    read_radiograph_metadata,
    write_radiograph_cache,
)
from clinfuse.ward.radiographs import draw_radiograph, study_tables, write_radiographs

DATA = Path(__file__).parents[2] / "shared/data"
START = pd.Timestamp("2150-01-01")
HOUR = pd.Timedelta(hours=1)


def jpeg_bytes(pixels, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=90, **options)
    return stream.getvalue()


CHEST = draw_radiograph(0.5, np.random.default_rng(0))
CHEST_JPEG = jpeg_bytes(CHEST)


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize("kept", [0, 1, 20, 300, 0.3, 0.9, 0.999])
def test_truncated_jpeg_is_refused(tmp_path, kept):
    path = tmp_path / "cut.jpg"
    path.write_bytes(CHEST_JPEG[: int(kept * len(CHEST_JPEG)) if kept < 1 else kept])
    with pytest.raises(InputError, match=r"cut\.jpg: unreadable image"):
        decode_radiograph(path)


@pytest.mark.parametrize(
    "mode, name, reason",
    [
        ("I;16", "PNG", "16 bits"),
        ("RGB", "PNG", "PNG of mode RGB"),
        ("L", "PNG", "PNG of mode L"),
        ("CMYK", "JPEG", "JPEG of mode CMYK"),
        ("I;16", "TIFF", "16 bits"),
    ],
)
def test_other_kinds_of_image_are_refused(tmp_path, mode, name, reason):
    path = tmp_path / "renamed.jpg"
    grey = Image.fromarray(CHEST)
    image = Image.fromarray(CHEST.astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    image.save(path, format=name)
    with pytest.raises(InputError, match=rf"renamed\.jpg: .*{reason}"):
        decode_radiograph(path)


def test_a_small_coloured_mark_is_colour(tmp_path):
    marked = np.stack([CHEST] * 3, -1)
    marked[100:140, 100:140] = [255, 0, 0]
    (tmp_path / "marked.jpg").write_bytes(jpeg_bytes(marked))
    with pytest.raises(InputError, match=r"marked\.jpg: a colour image"):
        decode_radiograph(tmp_path / "marked.jpg")


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(InputError, match="unreadable"):
        decode_radiograph(tmp_path)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, len(CHEST_JPEG) - 1), value=st.binary(min_size=1, max_size=30))
def test_damaged_bytes_give_an_image_or_an_input_error(tmp_path_factory, position, value):
    path = tmp_path_factory.mktemp("damaged") / "image.jpg"
    path.write_bytes(CHEST_JPEG[:position] + value + CHEST_JPEG[position + len(value) :])
    try:
        image = decode_radiograph(path)
    except InputError as error:
        assert str(error).startswith(str(path))
    else:
        assert image.shape == (256, 256) and image.dtype == np.uint8


# ---------------------------------------------------------------- scale and shape


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(8, 900),
    width=st.integers(8, 900),
    size=st.sampled_from([32, 64, 256]),
)
def test_any_shape_becomes_a_square_without_distortion(height, width, size):
    flat = np.full((height, width), 77, np.uint8)
    assert (fit_square(flat, size) == 77).all()
    assert fit_square(flat, size).shape == (size, size)


@pytest.mark.parametrize("scale, expected", [(1, (420, 512)), (2, (420, 512)), (4, (420, 512))])
def test_large_images_are_decoded_at_a_smaller_scale(tmp_path, scale, expected):
    large = CHEST.repeat(scale, 0).repeat(scale, 1)
    (tmp_path / "large.jpg").write_bytes(jpeg_bytes(large))
    decoded = read_grey(tmp_path / "large.jpg")
    assert decoded.shape == expected
    assert abs(decoded.astype(float) - CHEST).mean() < 2


def test_progressive_jpeg_is_read(tmp_path):
    (tmp_path / "plain.jpg").write_bytes(CHEST_JPEG)
    (tmp_path / "progressive.jpg").write_bytes(jpeg_bytes(CHEST, progressive=True))
    plain, progressive = (
        decode_radiograph(tmp_path / f"{n}.jpg") for n in ("plain", "progressive")
    )
    np.testing.assert_array_equal(plain, progressive)


def test_contrast_grows_with_the_limit():
    contrast = [enhance_contrast(CHEST, limit).std() for limit in (1.0, 2.0, 4.0)]
    assert CHEST.std() < contrast[0] < contrast[1] < contrast[2]


# ---------------------------------------------------------------- DICOM


def dicom_bytes(pixels, **tags):
    pytest.importorskip("pydicom", reason="needs the extra dicom")
    from pydicom.dataset import Dataset, FileMetaDataset

    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    image.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    image.Rows, image.Columns = pixels.shape[:2]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = 8 * pixels.itemsize
    image.BitsStored, image.HighBit = image.BitsAllocated, image.BitsAllocated - 1
    image.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(image, name, value)
    image.PixelData = pixels.tobytes()
    stream = io.BytesIO()
    image.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def naive_window(pixels, slope, intercept, centre, width, is_inverted):
    grey = []
    for stored in pixels.ravel().tolist():
        value = stored * slope + intercept
        if value <= centre - 0.5 - (width - 1) / 2:
            shown = 0.0
        elif value > centre - 0.5 + (width - 1) / 2:
            shown = 255.0
        else:
            shown = ((value - (centre - 0.5)) / (width - 1) + 0.5) * 255
        grey.append(255 - shown if is_inverted else shown)
    return np.reshape(grey, pixels.shape)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(["uint8", "uint16", "int16"]),
    slope=st.sampled_from([1.0, 0.25, 2.0]),
    intercept=st.integers(-1000, 1000),
    centre=st.integers(-500, 3000),
    width=st.integers(2, 4000),
    is_inverted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dicom_is_windowed_as_the_standard_says(
    tmp_path_factory, dtype, slope, intercept, centre, width, is_inverted, seed
):
    low = -2000 if dtype == "int16" else 0
    high = 255 if dtype == "uint8" else 4000
    pixels = np.random.default_rng(seed).integers(low, high, (9, 12)).astype(dtype)
    tags = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    tags |= {"WindowCenter": centre, "WindowWidth": width}
    tags |= {"PhotometricInterpretation": "MONOCHROME1"} if is_inverted else {}
    path = tmp_path_factory.mktemp("dicom") / "image.dcm"
    path.write_bytes(dicom_bytes(pixels, **tags))
    expected = naive_window(pixels, slope, intercept, centre, width, is_inverted)
    np.testing.assert_allclose(read_dicom(path, size=4).shape, (9 // 2, 12 // 2))
    np.testing.assert_allclose(read_dicom(path, size=9), expected, atol=0.52)


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 0.999), value=st.binary(min_size=1, max_size=12))
def test_damaged_dicom_gives_an_image_or_an_input_error(tmp_path_factory, position, value):
    whole = dicom_bytes(CHEST[:40, :40].astype(np.uint16))
    start = int(position * min(len(whole), 900))
    path = tmp_path_factory.mktemp("damaged") / "image.dcm"
    path.write_bytes(whole[:start] + value + whole[start + len(value) :])
    try:
        image = decode_radiograph(path, size=32)
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert image.shape == (32, 32) and image.dtype == np.uint8


@pytest.mark.parametrize(
    "tags, reason",
    [
        ({"NumberOfFrames": 2}, "DICOM of 2 frames"),
        ({"BitsStored": 32}, "DICOM of 32 bits"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "DICOM of PALETTE COLOR"),
    ],
)
def test_other_kinds_of_dicom_are_refused(tmp_path, tags, reason):
    path = tmp_path / "other.dcm"
    path.write_bytes(dicom_bytes(CHEST[:40, :40].astype(np.uint16), **tags))
    with pytest.raises(InputError, match=rf"other\.dcm: {reason}"):
        decode_radiograph(path)


def test_a_window_of_nothing_is_chosen_from_the_values():
    values = np.arange(1000).reshape(20, 50)
    for centre, width in ((None, 100), (100, None), (500, 0)):
        np.testing.assert_array_equal(window_grey(values, centre, width), window_grey(values))


def test_dicom_with_a_table_is_found_by_the_table(ward, tmp_path):
    metadata = read_radiograph_metadata(ward)
    (tmp_path / "mimic-cxr-2.1.0-metadata.csv.gz").write_bytes(
        (ward / "mimic-cxr-2.0.0-metadata.csv.gz").read_bytes()
    )
    content = dicom_bytes(CHEST.astype(np.uint16), StudyDate="19000101", StudyTime="0")
    for jpeg in metadata["path"]:
        path = tmp_path / Path(jpeg).relative_to(ward).with_suffix(".dcm")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = read_radiograph_metadata(tmp_path)
    pd.testing.assert_frame_equal(found.drop(columns="path"), metadata.drop(columns="path"))
    assert all(path.endswith(".dcm") and Path(path).is_file() for path in found["path"])
    links = links_of(found)[:3]
    cache = write_radiograph_cache(links, tmp_path, quiet=True)
    assert sorted(cache.rows) == [0, 1, 2] and len(cache.bad) == 0
    headers = read_dicom_headers(tmp_path)
    assert set(headers["dicom_id"]) == set(metadata["dicom_id"])
    assert (headers["study_time"] == pd.Timestamp("1900-01-01")).all()


# ---------------------------------------------------------------- link


@st.composite
def hospitals(draw):
    hours = st.integers(0, 30)
    images = draw(
        st.lists(st.tuples(st.integers(1, 3), hours, st.sampled_from(["AP", "PA", "LL", None])))
    )
    stays = draw(st.lists(st.tuples(st.integers(1, 3), hours, hours, hours), min_size=1))
    metadata = pd.DataFrame(
        {
            "dicom_id": [f"d{i:03}" for i in range(len(images))],
            "subject_id": pd.array([image[0] for image in images], dtype="int64"),
            "study_id": np.arange(len(images)),
            "view": pd.array([image[2] for image in images], dtype="str"),
            "study_time": pd.Series(
                [START + image[1] * HOUR for image in images], dtype="datetime64[us]"
            ),
            "path": "x.jpg",
        }
    )
    samples = pd.DataFrame(
        {
            "sample_id": [f"s{i:03}" for i in range(len(stays))],
            "subject_id": [stay[0] for stay in stays],
            "intime": [START + stay[1] * HOUR for stay in stays],
            "outtime": [START + (stay[1] + stay[2]) * HOUR for stay in stays],
            "prediction_time": [START + (stay[1] + min(stay[2], stay[3])) * HOUR for stay in stays],
        }
    )
    return samples, metadata


def naive_link(samples, metadata, protocol):
    links = {}
    for sample in samples.itertuples():
        end = sample.outtime if protocol is PUBLISHED else sample.prediction_time
        inside = [
            (image.study_time, image.dicom_id)
            for image in metadata.itertuples()
            if image.subject_id == sample.subject_id
            and sample.intime <= image.study_time <= end
            and image.view in protocol.views
        ]
        if inside:
            links[sample.sample_id] = max(inside)[1]
    return links


@settings(max_examples=80, deadline=None)
@given(hospitals(), st.sampled_from([SAFE, PUBLISHED]), st.randoms())
def test_link_is_the_naive_loop_in_any_order(hospital, protocol, chance):
    samples, metadata = hospital
    shuffled = [
        table.iloc[chance.sample(range(len(table)), len(table))] for table in (samples, metadata)
    ]
    links = link_radiographs(*shuffled, protocol)
    assert links.set_index("sample_id")["dicom_id"].to_dict() == naive_link(*hospital, protocol)
    pd.testing.assert_frame_equal(links, link_radiographs(samples, metadata, protocol))
    assert list(links["sample_id"]) == sorted(links["sample_id"])


@settings(max_examples=50, deadline=None)
@given(hospitals())
def test_safe_never_looks_ahead_and_the_future_cannot_change_it(hospital):
    samples, metadata = hospital
    links = link_radiographs(samples, metadata, SAFE)
    predicted = samples.set_index("sample_id").loc[links["sample_id"], "prediction_time"]
    assert (links["study_time"].to_numpy() <= predicted.to_numpy()).all()
    last = samples["prediction_time"].max()
    past = metadata[metadata["study_time"] <= last]
    without_future = link_radiographs(samples, past, SAFE)
    pd.testing.assert_frame_equal(links, without_future)


@pytest.mark.parametrize(
    "content, wrong",
    [
        (b"", "unreadable"),
        (b"dicom_id,subject_id\na,1\n", "no column study_id"),
        (
            b"dicom_id,subject_id,study_id,StudyDate,StudyTime,ViewPosition\n"
            b"a,1,2,21800506,1,AP\nb,1,2,06.05.2180,1,AP\n",
            r"column StudyDate, row 3: '06\.05\.2180'",
        ),
        (
            b"dicom_id,subject_id,study_id,StudyDate,StudyTime,ViewPosition\n,1,2,21800506,1,AP\n",
            "column dicom_id, row 2: nan",
        ),
    ],
)
def test_bad_metadata_is_named(tmp_path, content, wrong):
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv").write_bytes(content)
    with pytest.raises(InputError, match=rf"mimic-cxr-2\.0\.0-metadata\.csv.*{wrong}"):
        read_radiograph_metadata(tmp_path)


def test_truncated_gzip_is_named(tmp_path):
    whole = gzip.compress(b"dicom_id,subject_id\n" + b"a,1\n" * 5000)
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"metadata\.csv\.gz: unreadable"):
        read_radiograph_metadata(tmp_path)


# ---------------------------------------------------------------- ward and cache


def ward_images(num_images):
    chance = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "subject_id": 10000000 + np.arange(num_images) // 2,
            "study_id": 50000000 + np.arange(num_images),
            "dicom_id": [f"{i:08x}" for i in chance.permutation(num_images)],
            "study_time": START + HOUR * pd.Series(np.arange(num_images)),
            "view": chance.choice(np.array(["AP", "PA", None], dtype=object), num_images),
            "opacity": chance.standard_normal(num_images),
            "betrays": np.arange(num_images) % 5 == 0,
        }
    )


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ward")
    write_radiographs(folder, ward_images(24), seed=3, quiet=True)
    return folder


def links_of(metadata):
    return pd.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(len(metadata))],
            "dicom_id": metadata["dicom_id"],
            "path": metadata["path"],
        }
    )


def test_ward_is_read_back(ward):
    images, metadata = ward_images(24), read_radiograph_metadata(ward)
    for column in ("dicom_id", "subject_id", "study_id"):
        assert list(metadata[column]) == list(images[column])
    assert (metadata["study_time"] == images["study_time"]).all()
    assert (metadata["view"].fillna("none") == images["view"].fillna("none")).all()
    assert all(Path(path).is_file() for path in metadata["path"])
    findings = pd.read_csv(ward / "mimic-cxr-2.0.0-chexpert.csv.gz")
    assert findings.shape == (24, 16)
    assert findings.iloc[:, 2:].isin([1.0, 0.0, -1.0, np.nan]).all(axis=None)


def test_findings_follow_the_opacity():
    images = ward_images(300)
    findings = study_tables(images, seed=1)["chexpert"]
    hazy = images["opacity"].to_numpy() > 0.85
    assert (findings.loc[hazy, "Lung Opacity"] == 1).all()
    assert not (findings.loc[images["opacity"].to_numpy() < 0.35, "Lung Opacity"] == 1).any()


def test_cache_bytes_depend_on_nothing_but_the_images(ward, tmp_path):
    links = links_of(read_radiograph_metadata(ward))
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, rows in ((first, links), (second, links[::-1])):
        folder.mkdir()
        cache = write_radiograph_cache(rows, folder, quiet=True)
        assert len(cache.bad) == 0
        for sample_id, row in cache.rows.items():
            path = links.set_index("sample_id").loc[sample_id, "path"]
            stored = np.load(folder / "radiographs.npy", mmap_mode="r")[row]
            np.testing.assert_array_equal(stored, decode_radiograph(path))
    for name in ("radiographs.npy", "radiographs_clahe.npy"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_bad_image_is_as_if_it_were_missing(ward, tmp_path):
    links = links_of(read_radiograph_metadata(ward))
    with_bad, without = tmp_path / "with", tmp_path / "without"
    with_bad.mkdir(), without.mkdir()
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(CHEST_JPEG[:5000])
    broken = links.copy()
    broken.loc[5, "path"] = str(cut)
    cache = write_radiograph_cache(broken, with_bad, quiet=True)
    write_radiograph_cache(links.drop(index=5), without, quiet=True)
    assert list(cache.bad["path"]) == [str(cut)] and cache.rows["s5"] == -1
    assert sorted(cache.rows[cache.rows >= 0]) == list(range(23))
    for name in ("radiographs.npy", "radiographs_clahe.npy"):
        assert (with_bad / name).read_bytes() == (without / name).read_bytes()


PREPARE = """
import sys
import pandas as pd
from clinfuse.data.radiographs import write_radiograph_cache
links = pd.read_parquet(sys.argv[1])
write_radiograph_cache(links, sys.argv[2], True, parts=sys.argv[3], part_images=2)
"""


def test_killed_at_any_moment_the_next_run_continues(ward, tmp_path):
    links = links_of(read_radiograph_metadata(ward))
    rows = [(f"{row.dicom_id}-{i}", row.path) for row in links.itertuples() for i in range(20)]
    links = pd.DataFrame(rows, columns=["dicom_id", "path"])
    links["sample_id"] = [f"s{i:04d}" for i in range(len(links))]
    for row in links.itertuples():
        (tmp_path / f"{row.dicom_id}.jpg").write_bytes(Path(row.path).read_bytes())
    links["path"] = str(tmp_path) + "/" + links["dicom_id"] + ".jpg"
    links.to_parquet(tmp_path / "links.parquet")
    parts, folder, calm = tmp_path / "parts", tmp_path / "folder", tmp_path / "calm"
    folder.mkdir(), calm.mkdir(), parts.mkdir()
    write_radiograph_cache(links, calm, quiet=True)
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "links.parquet"), folder, parts]
    for wanted in (3, 40):
        process = subprocess.Popen(command)
        while process.poll() is None and len(list(parts.glob("[!.]*.npz"))) < wanted:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not list(folder.glob("[!.]*"))
    done = len(list(parts.glob("[!.]*.npz")))
    cache = write_radiograph_cache(links, folder, quiet=True, parts=parts, part_images=2)
    assert cache.num_reused == 2 * done >= 80
    for name in ("radiographs.npy", "radiographs_clahe.npy"):
        assert (folder / name).read_bytes() == (calm / name).read_bytes()


@settings(max_examples=10, deadline=None)
@given(part_images=st.integers(1, 30), bad=st.sets(st.integers(0, 23), max_size=5))
def test_parts_of_any_length_give_the_same_arrays(ward, tmp_path_factory, part_images, bad):
    links = links_of(read_radiograph_metadata(ward))
    links.loc[sorted(bad), "path"] += ".missing"
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    whole = write_radiograph_cache(links, one, quiet=True, size=16)
    in_parts = write_radiograph_cache(links, other, quiet=True, size=16, part_images=part_images)
    pd.testing.assert_series_equal(whole.rows, in_parts.rows)
    pd.testing.assert_frame_equal(whole.bad, in_parts.bad)
    assert len(whole.bad) == len(bad) and not (one / "radiograph_parts").exists()
    assert (one / "radiographs.npy").read_bytes() == (other / "radiographs.npy").read_bytes()


def test_a_full_disk_leaves_no_array(ward, tmp_path, monkeypatch):
    links = links_of(read_radiograph_metadata(ward))

    def full(*arguments, **values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match="could not write"):
        write_radiograph_cache(links, tmp_path, quiet=True)
    assert not list(tmp_path.rglob("*.np*"))


def test_no_image_at_all_leaves_empty_arrays(tmp_path):
    links = pd.DataFrame({"sample_id": ["a"], "dicom_id": ["x"], "path": [str(tmp_path / "x.jpg")]})
    for rows, num_bad in ((links, 1), (links[:0], 0)):
        cache = write_radiograph_cache(rows, tmp_path, quiet=True)
        assert len(cache.bad) == num_bad and (cache.rows == -1).all()
        assert np.load(tmp_path / "radiographs.npy", mmap_mode="r").shape == (0, 256, 256)


def test_real_radiographs_are_read(tmp_path):
    folder = DATA / "hannover-cxr/images"
    if not folder.is_dir():
        pytest.skip(f"needs real radiographs in {folder}")
    paths = sorted(folder.glob("*.jpg"))[:40]
    names = [path.stem for path in paths]
    links = pd.DataFrame({"sample_id": names, "dicom_id": names, "path": [str(p) for p in paths]})
    cache = write_radiograph_cache(links, tmp_path, quiet=True)
    plain = np.load(tmp_path / "radiographs.npy")
    assert len(cache.bad) == 0 and plain.shape == (40, 256, 256)
    assert (plain.reshape(40, -1).std(1) > 10).all()
