"""Explanations of one stay: they add up, they find what was planted, and they fall apart without the weights."""

import re

import numpy as np
import pytest
import torch

from clinfuse.conventions import InputError
from clinfuse.data.privacy_guard import scan
from clinfuse.evaluation.mixed_stays import MixedStays, background_stays, kind_shares
from clinfuse.evaluation.stay_maps import batch_of_stay, series_map
from clinfuse.systems.batches import invented_patients
from clinfuse.systems.contract import build_system, system_class, why_not
from clinfuse.use.explanations import explain_stay, explanation_html
from clinfuse.use.recipes import explain, train

LABEL = "in_hospital_mortality"
TABLES = ("logistic-regression", "random-forest")
NETWORKS = ("lstm", "resnet34", "robust-fusion", "medfuse", "mlp")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return invented_patients(tmp_path_factory.mktemp("invented") / "data", 90)


@pytest.fixture(scope="module")
def stay(data):
    return data.samples.loc[data.samples["radiograph"] >= 0, "sample_id"].iloc[-1]


def fitted(name, data):
    system = build_system(name, data, "quick")
    if hasattr(system, "fit"):
        system.fit(data, data.rows("train"), data.rows("validation"))
    return system


@pytest.mark.parametrize("name", [*TABLES, *NETWORKS])
def test_shares_add_up_for_every_system(name, data, stay):
    assert not why_not(system_class(name), data)
    system = fitted(name, data)
    explained = explain_stay(system, data, stay)
    whole = explained.subsets[frozenset(explained.shares)]
    assert abs(sum(explained.shares.values()) - whole + explained.subsets[frozenset()]) < 1e-9
    row = np.array([data.position(stay)])
    answer = system.predict(data, row)[0, 0]
    assert abs(np.log(answer / (1 - answer)) - whole) < 1e-5
    if name in (*TABLES, "lstm", "mlp"):
        assert abs(explained.shares["radiograph"]) < 1e-6
    if name == "resnet34":
        assert abs(explained.shares["series"]) < 1e-6 and explained.film is not None


def test_a_planted_rise_is_found_in_its_channel_and_its_hours(data, stay):
    system = build_system("lstm", data, "quick").eval()
    batch = batch_of_stay(system, data, stay)
    column = data.channels.index("Temperature")

    class Late(type(system)):
        def logits(self, stage, batch):
            return 2 * batch.series[:, 3:5, column].sum(dim=1, keepdim=True)

    late = Late(system.config, system.description).eval()
    found, names, missed = series_map(late, data, batch, 0)
    assert missed < 1e-4
    assert set(np.flatnonzero(np.abs(found).sum(axis=0) > 1e-6)) <= {3, 4}
    assert np.abs(found[names.index("Heart rate")]).max() == 0


def test_the_planted_kind_of_data_ranks_first(data):
    series, film = fitted("lstm", data), fitted("resnet34", data)

    class Both(type(series)):
        def predict(self, data, rows):
            odds = [np.log(p / (1 - p)) for p in (s.predict(data, rows) for s in (series, film))]
            return 1 / (1 + np.exp(-self.series * odds[0] - self.film * odds[1]))

    for planted, weights in {"series": (1, 0.001), "radiograph": (0.001, 1)}.items():
        system = Both(series.config, series.description)
        system.series, system.film = weights
        stays = data.samples.loc[data.samples["radiograph"] >= 0, "sample_id"].head(10)
        first = []
        for each in stays:
            shares, _ = kind_shares(system, data, each, LABEL, background_stays(data, each, 6))
            first.append(max(shares, key=lambda kind: abs(shares[kind])))
        assert first.count(planted) >= 9


def test_shuffled_weights_destroy_the_maps(data, tmp_path):
    train("robust-fusion", data.path, tmp_path / "run", recipe="quick", quiet=True)
    stays = data.samples.loc[data.samples["radiograph"] >= 0, "sample_id"].tail(4)
    agreed = []
    for number, each in enumerate(stays):
        out = tmp_path / f"{number}.html"
        explained = explain(tmp_path / "run", data=data.path, sample=each, out=out, quiet=True)
        assert explained.seconds < 20
        agreed.append([explained.sanity["series"], explained.sanity.get("film", 0.0)])
    assert np.abs(np.mean(agreed, axis=0)).max() < 0.5
    page = out.read_text()
    assert "Whether to believe it" in page and "<script" not in page
    assert "://" not in re.sub(r"base64,[^\"]+", "", page)
    assert "must not be shared" in page
    with pytest.raises(InputError, match="exists already"):
        explain(tmp_path / "run", data=data.path, sample=each, out=out)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/page.html").write_text(page)
    assert not scan([tmp_path / "shared"]).ok


def test_mixing_leaves_the_stays_as_they_were(data, stay):
    before = data.series(stay).copy(), data.radiograph(stay).copy(), data.samples.copy()
    mixed = MixedStays(
        data, [stay, *background_stays(data, stay, 3)], [{"series": 2}], ["Temperature"]
    )
    mixed.series_array[:] = 0
    assert np.array_equal(data.series(stay), before[0])
    assert np.array_equal(data.radiograph(stay), before[1]) and data.samples.equals(before[2])


def test_background_is_of_other_patients_with_the_same_kinds(data, stay):
    for name in background_stays(data, stay, 200):
        row = data.samples.iloc[data.position(name)]
        assert row["split"] == "train" and row["radiograph"] >= 0 and name != stay


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": "nobody"}, "unknown sample_id 'nobody'"),
        ({"label": "love"}, "'love'"),
    ],
)
def test_wrong_questions_leave_no_page(data, stay, tmp_path, options, message):
    train("logistic-regression", data.path, tmp_path / "run", quiet=True)
    asked = {"sample": stay, "out": tmp_path / "x.html", "quiet": True} | options
    with pytest.raises(InputError, match=message):
        explain(tmp_path / "run", data=data.path, **asked)
    assert not (tmp_path / "x.html").exists() and torch.is_grad_enabled()


def test_numbers_words_and_films_of_a_stay_are_explained(tmp_path):
    data = invented_patients(tmp_path / "data", 60, task="mortality-and-stay")
    changes = {"titles": "diagnoses", "num_words": "50", "num_tokens": "8"}
    system = build_system("m3t-lm", data, "quick", changes)
    has_all = (data.samples["radiograph"] >= 0) & data.samples["text_diagnoses"].notna()
    explained = explain_stay(system, data, data.samples.loc[has_all, "sample_id"].iloc[0])
    assert set(explained.shares) == {"series", "radiograph", "text", "attributes", "numbers"}
    assert len(explained.subsets) == 32 and abs(explained.shares["series"]) < 1e-6
    assert len(explained.words["diagnoses"]) > 1 and explained.film is not None
    page = explanation_html(explained)
    assert all(f">{word}</span>" in page for word, _ in explained.words["diagnoses"])
