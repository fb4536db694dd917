"""Radiographs beyond their pages: damaged files, the window of time, order, the folder layout."""

import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.radiographs import (
    decode_radiograph,
    enhance_contrast,
    fit_square,
    link_radiographs,
    read_grey,
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
