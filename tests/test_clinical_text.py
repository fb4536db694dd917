"""Clinical text beyond its page: the future under the safe protocol, order, bad input."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.clinical_text import (
    describe_patient,
    describe_patients,
    last_measurements,
    link_texts,
    texts_by_then,
)
from clinfuse.data.sources import Source, connect

START = pd.Timestamp("2150-01-01")


def at(hours):
    return None if hours is None else START + pd.Timedelta(hours=hours)


def write_source(
    folder, admissions, diagnoses, notes=None, names=None, discharge=None, procedures=None
):
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
    if discharge is not None:
        tables["note/discharge"] = pd.DataFrame(
            discharge, columns=["subject_id", "hadm_id", "charttime", "storetime", "text"]
        )
    if procedures is not None:
        columns = ["subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"]
        procedures = pd.DataFrame(procedures, columns=columns).assign(chartdate="2150-01-02")
        tables["hosp/procedures_icd"] = procedures
        known = [(f"P{i}", 10, f"procedure {i}") for i in range(6)]
        tables["hosp/d_icd_procedures"] = pd.DataFrame(
            known, columns=["icd_code", "icd_version", "long_title"]
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


fewer = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


@fewer
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
        assert list(after["text_radiology"].cat.categories) == list(
            before[protocol.name]["text_radiology"].cat.categories
        )


def test_published_reads_this_admission(tmp_path):
    source, _, _ = hospital(
        tmp_path, [(1, 240, 5), (1, 105, 1), (1, 260, 1)], [(12, 3, 9), (11, 4, 10)]
    )
    texts = linked(source, PUBLISHED).loc["c"]
    assert list(texts[["text_titles", "text_radiology"]]) == ["title 3 of 9", "report 0."]
    assert list(texts[["text_titles_time", "text_radiology_time"]]) == [at(300), at(245)]


def test_source_without_notes_has_no_reports(tmp_path):
    source = write_source(tmp_path, ADMISSIONS, [(1, 11, 1, "C1", 9)])
    texts = linked(source, SAFE)
    assert texts["text_radiology"].isna().all()
    assert texts.loc["c", "text_titles"] == "title 1 of 9"


def test_samples_without_an_admission_have_no_text(tmp_path):
    source, _, _ = hospital(tmp_path, [(1, 120, 1)], [(11, 1, 9)])
    samples = SAMPLES.assign(hadm_id=pd.array([None, 13, None], dtype="Int64"))
    texts = linked(source, SAFE, samples)
    without = texts.loc[["c", "b"], ["text_titles", "text_radiology", "text_radiology_time"]]
    assert without.isna().all(axis=None)
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


# ---------------------------------------------------------------- the time of knowing

STAY = {"subject_id": 1, "hadm_id": 12, "intime": at(110), "outtime": at(250)}


def hourly(hours):
    samples = pd.DataFrame([STAY] * len(hours), index=range(len(hours)))
    samples["sample_id"] = [f"900_{hour:03d}" for hour in hours]
    return samples.assign(prediction_time=[at(110 + hour) for hour in hours])


notes_of_stay = st.lists(
    st.tuples(st.integers(90, 260), st.one_of(st.none(), st.integers(-5, 60))),
    min_size=1,
    max_size=8,
)


@fewer
@given(notes_of_stay, st.lists(st.integers(-5, 60), max_size=4), st.data())
def test_a_note_stored_after_the_prediction_is_removed_and_nothing_else(
    tmp_path_factory, drawn, delays, data
):
    folder = tmp_path_factory.mktemp("h")
    reports = [
        [1, None, at(hour), at(None if delay is None else hour + delay), f"report {i}."]
        for i, (hour, delay) in enumerate(drawn)
    ]
    discharge = [[1, 11, at(48), at(50 + delay), f"letter {i}."] for i, delay in enumerate(delays)]
    question = data.draw(st.integers(0, 130))
    samples = hourly([question])

    def read(kind):
        source = write_source(folder, ADMISSIONS, [], notes=reports, discharge=discharge)
        texts = linked(source, SAFE, samples).iloc[0]
        found = texts[f"text_{kind}"]
        return [] if pd.isna(found) else found.split("\n\n"), texts[f"text_{kind}_time"]

    for kind, notes in (("radiology", reports), ("discharge", discharge)):
        before, time = read(kind)
        assert pd.isna(time) if not before else time <= at(110 + question)
        if notes:
            moved = data.draw(st.sampled_from(notes))
            moved[3] = at(110 + question + 1)
            after, time = read(kind)
            assert after == [text for text in before if text != moved[4]]
            assert pd.isna(time) or time <= at(110 + question)


@fewer
@given(notes_of_stay)
def test_hourly_samples_read_what_each_would_read_alone(tmp_path_factory, drawn):
    notes = [
        (1, None, at(hour), at(None if delay is None else hour + delay), f"report {i}.")
        for i, (hour, delay) in enumerate(drawn)
    ]
    source = write_source(
        tmp_path_factory.mktemp("h"), ADMISSIONS, [(1, 11, 1, "C1", 9)], notes=notes
    )
    hours, connection = [0, 7, 41, 139], connect(source)
    together = link_texts(connection, source, hourly(hours), SAFE)
    for row, hour in enumerate(hours):
        alone = link_texts(connection, source, hourly([hour]), SAFE)
        assert alone.astype(object).iloc[0].equals(together.astype(object).iloc[row].rename(0))


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.sampled_from("abc"))),
    asked=st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 10)), min_size=1),
    is_said_once=st.booleans(),
)
def test_texts_by_then_is_the_naive_loop(pieces, asked, is_said_once):
    table = pd.DataFrame(pieces, columns=["place", "hour", "text"]).astype({"text": str})
    table["known"] = pd.to_datetime([at(hour) for hour in table["hour"]])
    place = np.array([place for place, _ in asked])
    until = pd.Series([at(hour) for _, hour in asked])
    found = texts_by_then(table, place, until, " ", is_said_once)
    for row, (stay, hour) in enumerate(asked):
        own = [(known, text) for p, known, text in pieces if p == stay and known <= hour]
        words = [text for _, text in own]
        words = list(dict.fromkeys(words)) if is_said_once else words
        text, time = found.iloc[row]
        assert (text == " ".join(words)) if own else pd.isna(text)
        assert (time == at(max(known for known, _ in own))) if own else pd.isna(time)


def test_other_kinds_and_their_times(tmp_path):
    source = write_source(
        tmp_path,
        ADMISSIONS,
        [(1, 11, 1, "C1", 9), (1, 12, 1, "C2", 9)],
        discharge=[
            (1, 11, at(48), at(112), "Late letter."),
            (1, 11, at(24), None, "Letter."),
            (1, 12, at(300), at(301), "Died."),
        ],
        procedures=[(1, 11, 1, "P1", 10), (1, 12, 1, "P2", 10), (1, 11, 2, "P9", 10)],
    )
    texts = linked(source, SAFE, hourly([1, 2]))
    assert list(texts["text_discharge"]) == ["Letter.", "Letter.\n\nLate letter."]
    assert list(texts["text_discharge_time"]) == [at(50), at(112)]
    assert list(texts["text_procedures"]) == ["procedure 1"] * 2
    assert list(texts["text_procedures_time"]) == [at(50)] * 2
    published = link_texts(connect(source), source, hourly([1]), PUBLISHED)
    assert published.loc[0, ["text_discharge", "text_procedures"]].to_list() == [
        "Died.",
        "procedure 2",
    ]
    assert published.attrs == {"codes_without_title": 0, "procedures_without_title": 0}
    assert "title 1 of 9" in published["text_description"][0]
    assert "title 2 of 9" not in published["text_description"][0]


def test_no_sample_at_all(tmp_path):
    source, _, _ = hospital(tmp_path, [(1, 120, 1)], [(11, 1, 9)])
    assert len(link_texts(connect(source), source, SAMPLES[:0], SAFE)) == 0


def test_millions_of_samples_share_their_texts():
    place = np.repeat(np.arange(1000), 1000)
    until = pd.Series(np.datetime64(START, "us") + np.tile(np.arange(1000), 1000).astype("m8[h]"))
    pieces = pd.DataFrame({"place": np.arange(5000) // 5, "text": "x" * 10_000})
    pieces["known"] = START + pd.to_timedelta(pd.Series(np.arange(5000) % 5 * 100), unit="h")
    found = texts_by_then(pieces, place, until)
    assert len(found["text"].cat.categories) == 5
    assert found["text"].cat.codes.nbytes + found["time"].nbytes < 20_000_000


# ---------------------------------------------------------------- descriptions

unknown = st.sampled_from([None, float("nan"), pd.NA, ""])
attributes = st.fixed_dictionaries(
    {
        "age_years": unknown | st.floats(18, 120),
        "is_female": unknown | st.sampled_from([0.0, 1.0]),
        "admission_type": unknown | st.sampled_from(["URGENT", "EW EMER."]),
        "first_careunit": unknown | st.just("Trauma SICU (TSICU)"),
        "race": unknown | st.just("OTHER"),
        "height_cm": unknown | st.floats(100, 220),
        "weight_kg": unknown | st.floats(30, 200),
        "diagnoses": unknown | st.just("Gout; Asthma"),
    }
)


@settings(max_examples=200, deadline=None)
@given(attributes, st.booleans())
def test_descriptions_say_what_is_known_and_nothing_else(known, with_race):
    text = describe_patient(known, with_race)
    assert text == describe_patient(dict(reversed(known.items())), with_race)
    assert "nan" not in text and "None" not in text and "<NA>" not in text
    assert text.startswith("A") and text.endswith(".") and "  " not in text

    def is_known(name):
        return not pd.isna(known[name]) and known[name] != ""

    assert ("OTHER" in text) == (with_race and is_known("race"))
    for name, word in {"height_cm": "eight", "weight_kg": "eight", "diagnoses": "Gout"}.items():
        if is_known(name):
            assert word in text
    assert ("kg" in text) == is_known("weight_kg") and (" cm" in text) == is_known("height_cm")


def test_a_weight_measured_later_is_not_described():
    samples = hourly([1, 5]).assign(weight_kg=80.0, weight_kg_time=at(113), age_years=50.0)
    history = pd.DataFrame({"text": pd.Categorical([None, None]), "time": pd.NaT}, index=[0, 1])
    found = describe_patients(samples, history)
    assert ["80 kg" in text for text in found["text"]] == [False, True]
    assert list(found["time"]) == [at(110), at(113)]


def test_measurements_of_samples_with_their_own_series():
    events = pd.DataFrame(
        {
            "sample_id": pd.Categorical(["a", "b", "b"]),
            "hours": np.float32([3, 1, 2]),
            "channel": pd.Categorical(["Height", "Weight", "Weight"]),
            "value": np.float32([170, 81, 79]),
            "available_hours": np.float32([4, 1, 49]),
        }
    )
    samples = SAMPLES.set_index("sample_id", drop=False)
    found = last_measurements(events, samples, SAFE)
    assert found["height_cm"].dropna().to_dict() == {"a": 170}
    assert found["weight_kg"].dropna().to_dict() == {"b": 81}
    assert found.loc["a", "height_cm_time"] == at(404)
    assert last_measurements(events, samples, PUBLISHED)["weight_kg"]["b"] == 79
