"""Clinical text beyond its page: the future under the safe protocol, order, bad input."""

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.clinical_text import link_texts
from clinfuse.data.sources import Source, connect

START = pd.Timestamp("2150-01-01")


def at(hours):
    return None if hours is None else START + pd.Timedelta(hours=hours)


def write_source(folder, admissions, diagnoses, notes=None, names=None):
    tables = {
        "hosp/admissions": pd.DataFrame(
            admissions, columns=["subject_id", "hadm_id", "admittime", "dischtime"]
        ).assign(deathtime=None, insurance="Other", race="UNKNOWN", hospital_expire_flag=0),
        "hosp/diagnoses_icd": pd.DataFrame(
            diagnoses, columns=["subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"]
        ),
        "hosp/d_icd_diagnoses": pd.DataFrame(
            names
            or [
                (f"C{i}", version, f"title {i} of {version}")
                for i in range(6)
                for version in (9, 10)
            ],
            columns=["icd_code", "icd_version", "long_title"],
        ),
    }
    if notes is not None:
        tables["note/radiology"] = pd.DataFrame(
            notes, columns=["subject_id", "hadm_id", "charttime", "storetime", "text"]
        )
    files = {}
    for name, table in tables.items():
        files[name] = Path(folder) / f"{name}.csv"
        files[name].parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(files[name], index=False)
    return Source("mimic-iv", "2.1-2.2", Path(folder), files)


ADMISSIONS = [
    (1, 11, at(0), at(50)),
    (1, 12, at(100), at(300)),
    (1, 13, at(400), at(500)),
    (2, 21, at(0), at(300)),
]
SAMPLES = pd.DataFrame(
    {
        "sample_id": ["c", "a", "b"],
        "subject_id": [1, 1, 2],
        "hadm_id": [12, 13, 21],
        "intime": [at(110), at(400), at(20)],
        "outtime": [at(250), at(480), at(200)],
        "prediction_time": [at(158), at(448), at(68)],
    }
)
ADMITTED = {"c": at(100), "a": at(400), "b": at(0)}
reports = st.lists(
    st.tuples(
        st.sampled_from([1, 2]), st.integers(-20, 520), st.one_of(st.none(), st.integers(-5, 60))
    ),
    max_size=15,
)
codes = st.lists(
    st.tuples(st.sampled_from([11, 12, 13, 21]), st.integers(0, 5), st.sampled_from([9, 10])),
    max_size=15,
)


def hospital(folder, drawn_reports, drawn_codes):
    notes = [
        (subject, None, at(hour), at(None if delay is None else hour + delay), f"report {i}.")
        for i, (subject, hour, delay) in enumerate(drawn_reports)
    ]
    diagnoses = [
        (2 if hadm_id == 21 else 1, hadm_id, i + 1, f"C{code}", version)
        for i, (hadm_id, code, version) in enumerate(drawn_codes)
    ]
    return write_source(folder, ADMISSIONS, diagnoses, notes), notes, diagnoses


def linked(source, protocol, samples=SAMPLES):
    return link_texts(connect(source), source, samples, protocol).set_index("sample_id")


slow = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@slow
@given(reports, codes)
def test_safe_texts_are_the_naive_loop(tmp_path_factory, drawn_reports, drawn_codes):
    source, notes, diagnoses = hospital(tmp_path_factory.mktemp("h"), drawn_reports, drawn_codes)
    texts = linked(source, SAFE)
    earlier = {"c": [11], "a": [12, 11], "b": []}
    for sample in SAMPLES.itertuples():
        known = [
            (chart, text)
            for subject, _, chart, store, text in notes
            if subject == sample.subject_id
            and chart >= ADMITTED[sample.sample_id]
            and max(chart, store or chart) <= sample.prediction_time
        ]
        expected = "\n\n".join(text for _, text in sorted(known))
        found = texts.loc[sample.sample_id]
        assert ("" if pd.isna(found["text_radiology"]) else found["text_radiology"]) == expected
        titles = [
            f"title {code[1:]} of {version}"
            for admission in earlier[sample.sample_id]
            for _, hadm_id, _, code, version in diagnoses
            if hadm_id == admission
        ]
        expected = "; ".join(dict.fromkeys(titles))
        assert ("" if pd.isna(found["text_titles"]) else found["text_titles"]) == expected


@slow
@given(reports, codes, st.randoms())
def test_order_of_rows_changes_nothing(tmp_path_factory, drawn_reports, drawn_codes, chance):
    source, _, _ = hospital(tmp_path_factory.mktemp("a"), drawn_reports, drawn_codes)
    before = {protocol.name: linked(source, protocol) for protocol in (SAFE, PUBLISHED)}
    for name in ("note/radiology", "hosp/diagnoses_icd", "hosp/admissions"):
        header, *rows = source.files[name].read_text().splitlines()
        chance.shuffle(rows)
        source.files[name].write_text("\n".join([header, *rows]) + "\n")
    for protocol in (SAFE, PUBLISHED):
        after = linked(source, protocol, SAMPLES.sample(frac=1, random_state=1))
        pd.testing.assert_frame_equal(after.loc[SAMPLES["sample_id"]], before[protocol.name])


def test_published_reads_this_admission(tmp_path):
    source, _, _ = hospital(
        tmp_path, [(1, 240, 5), (1, 105, 1), (1, 260, 1)], [(12, 3, 9), (11, 4, 10)]
    )
    texts = linked(source, PUBLISHED).loc["c"]
    assert texts.to_list() == ["title 3 of 9", "report 0."]


def test_source_without_notes_has_no_reports(tmp_path):
    source = write_source(tmp_path, ADMISSIONS, [(1, 11, 1, "C1", 9)])
    texts = linked(source, SAFE)
    assert texts["text_radiology"].isna().all()
    assert texts.loc["c", "text_titles"] == "title 1 of 9"


def test_samples_without_an_admission_have_no_text(tmp_path):
    source, _, _ = hospital(tmp_path, [(1, 120, 1)], [(11, 1, 9)])
    samples = SAMPLES.assign(hadm_id=pd.array([None, 13, None], dtype="Int64"))
    texts = linked(source, SAFE, samples)
    assert texts.loc[["c", "b"]].isna().all(axis=None)
    assert texts.loc["a", "text_titles"] == "title 1 of 9"


def test_padded_codes_and_quoted_titles(tmp_path):
    names = [("C1  ", 9, 'A title, with "quotes"; and a semicolon')]
    source = write_source(tmp_path, ADMISSIONS, [(1, 11, 1, "C1    ", 9)], names=names)
    assert linked(source, SAFE).loc["c", "text_titles"] == names[0][2]


def test_reports_with_line_breaks_and_quotes_stay_whole(tmp_path):
    text = 'FINDINGS:\nNo "acute" process,\n\nunchanged.'
    source = write_source(
        tmp_path, ADMISSIONS, [(1, 11, 1, "C1", 9)], notes=[(1, 12, at(120), at(121), text)]
    )
    assert linked(source, SAFE).loc["c", "text_radiology"] == text


@pytest.mark.parametrize("name", ["hosp/diagnoses_icd", "hosp/d_icd_diagnoses", "hosp/admissions"])
def test_missing_table_is_named(tmp_path, name):
    source, _, _ = hospital(tmp_path, [], [])
    del source.files[name]
    with pytest.raises(InputError, match=f"table {name} is missing"):
        linked(source, SAFE)


def test_unreadable_time_is_named(tmp_path):
    source, _, _ = hospital(tmp_path, [(1, 120, 1)], [(11, 1, 9)])
    file = source.files["note/radiology"]
    file.write_text(file.read_text().replace("2150-01-06", "yesterday"))
    with pytest.raises(InputError, match=r"radiology\.csv.*yesterday"):
        linked(source, SAFE)
