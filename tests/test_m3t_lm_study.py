"""The study of M3T-LM from the prompt: two protocols side by side, days beside deaths, a record for every cell."""

import math
from dataclasses import replace

import pytest

from clinfuse.conventions import InputError
from clinfuse.training.records import read_record
from clinfuse.use import recipes
from clinfuse.use.command_line import COMMANDS, run_command
from clinfuse.use.m3t_lm_tables import DEATH, STAY, m3t_lm_study
from clinfuse.use.recipes import prepare, study, ward
from clinfuse.use.study_runs import folders_of, prepared_by_task


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The same few patients under both protocols."""
    place = tmp_path_factory.mktemp("stays")
    ward(place / "ward", patients=90, seed=3, quiet=True)
    for protocol in ("safe", "published"):
        options = {"task": "mortality-and-stay", "protocol": protocol, "quiet": True}
        prepare(place / "ward", place / "data" / protocol, **options)
    return place / "data"


@pytest.fixture(scope="module")
def done(prepared):
    """The quick study, one epoch a network."""
    out, train = prepared.parent / "out", recipes.train

    def short(system, *places, set, **options):
        if system in ("m3t-lm", "vgg-1d", "cnn-1d"):
            set = set | {"stage.num_epochs": "1"}
        elif system in ("mlp", "resnet34"):
            set = set | {"mlp": {"num_epochs": "1"}, "resnet34": {"stage.num_epochs": "1"}}[system]
        return train(system, *places, set=set, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "train", short)
        words = ["study", "m3t-lm", str(prepared), str(out), "--quick", "--seeds", "1", "--quiet"]
        assert run_command(COMMANDS, words) == 0
    return out


def test_every_cell_is_trained_on_the_folder_of_its_protocol(done, prepared):
    folders = prepared_by_task(prepared)
    for cell in m3t_lm_study().cells:
        record = read_record(done / "records" / f"{cell.name}.json")
        (key,) = folders_of(cell, folders)
        found = record["config"]["run"]["data"]
        assert key[1] == found["protocol"] == cell.protocol
        of = record["metrics"]["noise 0.00"]
        assert "auroc" in of[DEATH] and "mae" in of[STAY]
        assert "mae" not in of[DEATH] and "auroc" not in of[STAY]
        assert math.isclose(of["macro"]["mae"]["value"], of[STAY]["mae"]["value"])


def test_tables_hold_both_kinds_of_numbers_and_the_time(done):
    tables = read_record(done / "records" / "tables.json")["metrics"]["tables"]
    assert set(tables) == set(m3t_lm_study().tables)
    stay = [row for row in tables["Table III: days of stay, safe"] if row["row"] == "M3T-LM"]
    assert [row["metric"] for row in stay] == ["mae", "rmse", "r2", "explained_variance", "seconds"]
    assert stay[-1]["value"] > 0 and stay[-1]["printed"] == 34 * 60 + 22
    death = [row for row in tables["Table IV: deaths, published"] if row["row"] == "XGBoost"]
    assert {"precision", "recall", "f1_binary", "auroc"} <= {row["metric"] for row in death}


def test_the_cost_of_the_leak_is_told_with_an_interval(done):
    claims = read_record(done / "records" / "tables.json")["metrics"]["claims"]
    assert len(claims) == len(m3t_lm_study().claims)
    flattered = [claim for claim in claims if "flatters M3T-LM, AUROC" in claim["claim"]]
    assert len(flattered) == 1 and flattered[0]["low"] <= flattered[0]["high"]
    assert "Table VI: grid" in (done / "report.html").read_text()


def test_one_protocol_alone_is_a_smaller_study(prepared):
    plan = m3t_lm_study().for_data(prepared_by_task(prepared / "safe"))
    assert {cell.protocol for cell in plan.cells} == {"safe"}
    assert all("published" not in title for title in plan.tables)


def test_a_study_that_leaves_the_protocol_open_takes_no_folder_of_two(prepared):
    plan = m3t_lm_study()
    open_plan = replace(plan, cells=(replace(plan.cells[0], protocol=None),), tables={}, claims=())
    with pytest.raises(InputError, match="prepared as published and safe, and cell"):
        open_plan.for_data(prepared_by_task(prepared))


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no prepared folder"):
        study("m3t-lm", tmp_path / "nothing", tmp_path / "out", quick=True, quiet=True)
