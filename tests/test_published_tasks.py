"""The `published` protocol gives the benchmark's other three tasks: lists and labels equal, series bit for bit."""

from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference_benchmark import hourly_series, reference_hourly, reference_phenotyping
from test_published_protocol import SLOW, assert_same, random_hospital, timesteps, write_hospital

from clinfuse.conventions import PUBLISHED, InputError
from clinfuse.data.hourly_tasks import decompensation_task, length_of_stay_task
from clinfuse.data.phenotypes import PHENOTYPES
from clinfuse.data.sources import open_source
from clinfuse.data.tasks import phenotyping_task
from clinfuse.ward.synthetic_ward import write_ward

SHARED_DATA = Path(__file__).parents[2] / "shared/data"


def package_phenotyping(folder, timestep_hours):
    """What the package makes of a folder, in the form of `reference_phenotyping`."""
    task = phenotyping_task(open_source(folder), PUBLISHED, timestep_hours)
    names, samples = {phenotype.label: phenotype.name for phenotype in PHENOTYPES}, {}
    for row in task.samples.to_dict("records"):
        series = task.series[row["series_start"] : row["series_start"] + row["series_length"]]
        samples[int(row["stay_id"])] = (series, {names[label] for label in names if row[label]})
    return samples


HOURLY_TASKS = {"decompensation": decompensation_task, "length-of-stay": length_of_stay_task}


def assert_hourly_same(folder, task, timestep_hours, expected):
    """Times and labels of all samples, and the series of the first, the middle and the last of each stay."""
    made = HOURLY_TASKS[task](open_source(folder), PUBLISHED, timestep_hours)
    rows = made.samples.to_dict("records")
    found = {(int(row["stay_id"]), int(row["prediction_hours"])): row for row in rows}
    labels = {(stay, t): label for stay in expected for t, label in expected[stay][1].items()}
    assert len(found) == len(rows)
    assert {key: row[made.labels[0]] for key, row in found.items()} == labels
    for stay, (events, times) in expected.items():
        hours = sorted(times)
        for time in {hours[0], hours[len(hours) // 2], hours[-1]}:
            row = found[stay, time]
            series = made.series[row["series_start"] :][: row["series_length"]]
            assert_same(
                {stay: (series, 0)}, {stay: (hourly_series(events, time, timestep_hours), 0)}
            )
    return len(rows)


@pytest.fixture(scope="module")
def medfuse_groups():
    """Code -> group in the benchmark's own file."""
    file = SHARED_DATA.parent / "tables/raw/icd_9_10_definitions_2.yaml"
    if not file.exists():
        pytest.skip(f"the benchmark's definitions are not at {file}")
    groups = yaml.safe_load(file.read_text(encoding="utf-8"))
    used = {name: group for name, group in groups.items() if group["use_in_benchmark"]}
    return {code: name for name, group in used.items() for code in group["codes"]}


@timesteps
def test_phenotyping_of_the_demo_is_bit_equal(mimic_demo, medfuse_groups, timestep_hours):
    expected = reference_phenotyping(mimic_demo, timestep_hours, medfuse_groups)
    assert len(expected) == 112
    assert_same(package_phenotyping(mimic_demo, timestep_hours), expected)


@pytest.mark.parametrize(("task", "number"), [("length-of-stay", 8710), ("decompensation", 8688)])
def test_hourly_samples_of_the_demo_are_bit_equal(mimic_demo, task, number):
    expected = reference_hourly(mimic_demo, task)
    assert assert_hourly_same(mimic_demo, task, 1, expected) == number


@pytest.mark.parametrize("version", ["1.0", "2.2", "3.1"])
def test_hourly_samples_of_a_ward_are_bit_equal(tmp_path, version):
    write_ward(tmp_path / "ward", 25, seed=4, version=version, images=False, quiet=True)
    folder = tmp_path / "ward" / "mimic-iv"
    for task in HOURLY_TASKS:
        assert assert_hourly_same(folder, task, 1, reference_hourly(folder, task)) > 500


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=SLOW,
    phases=[Phase.generate],
)
@given(
    seed=st.integers(0, 2**32),
    num_patients=st.integers(4, 12),
    num_events=st.sampled_from([50, 100, 200, 5]),
    timestep_hours=st.sampled_from([1, 0.5]),
)
def test_other_tasks_of_random_hospitals_are_bit_equal(
    tmp_path_factory, seed, num_patients, num_events, timestep_hours
):
    tables = random_hospital(seed, num_patients, num_events)
    folder = write_hospital(tmp_path_factory.mktemp("hospital"), tables)
    for task in HOURLY_TASKS:
        expected = reference_hourly(folder, task)
        if expected:
            assert_hourly_same(folder, task, timestep_hours, expected)
        else:
            with pytest.raises(InputError, match="no stay"):
                HOURLY_TASKS[task](open_source(folder), PUBLISHED, timestep_hours)
    expected = reference_phenotyping(folder, 2 * timestep_hours)
    if expected:
        assert_same(package_phenotyping(folder, 2 * timestep_hours), expected)
