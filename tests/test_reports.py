"""The report and the card: whole pages from few facts, nothing trusted, nothing loaded from elsewhere."""

import json
import re
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from clinfuse.conventions import InputError
from clinfuse.evaluation.resampling import evaluate_runs, write_metrics
from clinfuse.use.model_cards import write_card
from clinfuse.use.report_sections import radiograph_table
from clinfuse.use.reports import summary_sentences, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Outline(HTMLParser):
    """Check that tags close in order, and keep elements and headlines."""

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.headlines = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headlines.append(data)


def runs(labels=("in_hospital_mortality",), num_samples=150, names=("robust-fusion", "lstm")):
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(len(labels), num_samples))
    targets = (rng.random(signal.shape) < 1 / (1 + np.exp(1 - 2 * signal))).astype(int)
    base = pd.DataFrame(
        {
            "sample_id": [f"s{i:03d}" for i in range(num_samples)] * len(labels),
            "subject_id": np.tile(np.arange(num_samples) // 2, len(labels)),
            "label": np.repeat(labels, num_samples),
            "target": targets.ravel(),
        }
    )
    noise = rng.normal(size=(len(names), signal.size)) * np.arange(len(names))[:, None] * 3
    return {
        name: base.assign(prediction=1 / (1 + np.exp(1 - 2 * signal.ravel() - extra)))
        for name, extra in zip(names, noise)
    }


def prepared(table, protocol="safe", kind="mimic-iv"):
    samples = table[table["label"] == table["label"].iloc[0]].rename(columns={"target": "death"})
    return SimpleNamespace(
        samples=samples.assign(split="test", radiograph=np.arange(len(samples)) % 3 - 1),
        labels=["death"],
        label_kinds={"death": "binary"},
        manifest={
            "source": {"kind": kind, "version": "2.1-2.2"},
            "task": "in-hospital-mortality",
            "protocol": protocol,
            "labels": ["death"],
            "attrition": [{"step": "all", "stays": 1234567, "admissions": 9, "subjects": 8}],
        },
    )


def read(path):
    outline = Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    assert outline.open == []
    return outline


def test_report_is_whole_and_stands_alone(tmp_path):
    tables = runs()
    data = prepared(tables["lstm"], protocol="published")
    start = time.perf_counter()
    path = write_report(
        tmp_path, evaluate_runs(tables, num_resamples=100), tables, data, reachable={"series": 0.9}
    )
    assert time.perf_counter() - start < 15 and path.stat().st_size < 2_000_000
    outline = read(path)
    assert outline.headlines[0] == "In short" and outline.headlines[-1] == "Limits"
    assert len(outline.headlines) == 9
    names = {tag for tag, _ in outline.elements}
    assert not names & {"script", "link", "iframe", "object", "form"}
    sources = [
        attrs[key] for _, attrs in outline.elements for key in ("src", "href") if key in attrs
    ]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    text = re.sub(r"base64,[^\"]+", "", path.read_text(encoding="utf-8"))
    assert "url(" not in text and "@import" not in text and "://" not in text
    assert "published (used here)" in text and "1,234,567" in text
    assert "not a medical device" in text and "mimic-iv 2.1-2.2" in text
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "curves.png",
        "differences.png",
        "reachable.png",
        "reliability.png",
    }


def test_report_needs_only_predictions(tmp_path):
    tables = {"<b>mine</b>": runs()["lstm"]}
    path = write_report(
        tmp_path, evaluate_runs(tables, num_resamples=30), tables, title="<script>alert(1)</script>"
    )
    outline = read(path)
    assert (
        "The patients" not in outline.headlines
        and "Which system is better" not in outline.headlines
    )
    assert not {"script", "b"} & {tag for tag, _ in outline.elements}
    assert "was not compared with another system" in path.read_text()


def test_report_of_many_outcomes_leads_with_their_mean(tmp_path):
    tables = runs(labels=[f"phenotype_{i}" for i in range(4)])
    metrics = evaluate_runs(tables, num_resamples=30)
    assert "mean AUROC of 4 outcomes" in summary_sentences(metrics)[0]
    text = write_report(tmp_path, metrics, tables).read_text()
    assert "<details>" in text and "phenotype 3" in text


def test_report_reads_metrics_json_with_its_nulls(tmp_path):
    tables = {name: table.assign(target=0) for name, table in runs().items()}
    path = write_metrics(evaluate_runs(tables, num_resamples=5), tmp_path / "metrics.json")
    text = write_report(tmp_path, json.loads(path.read_text()), tables).read_text()
    assert "No system can be judged" in text and "undefined" in text and ">nan<" not in text


def test_verdict_follows_the_interval_and_not_the_order_of_runs():
    tables = runs(num_samples=400)
    forwards = summary_sentences(evaluate_runs(tables, num_resamples=100))
    backwards = summary_sentences(evaluate_runs(dict(reversed(tables.items())), num_resamples=100))
    assert forwards == backwards and "is better than lstm" in forwards[1]


def test_groups_by_radiograph_hold_all_samples():
    tables = runs()
    data = prepared(tables["lstm"])
    found = radiograph_table(tables, data)
    assert list(found.columns) == ["with a radiograph (100)", "without (50)"]
    data.samples["radiograph"] = 0
    assert radiograph_table(tables, data).empty


def test_report_refuses_metrics_of_other_runs(tmp_path):
    tables = runs()
    with pytest.raises(InputError, match="predictions of lstm"):
        write_report(tmp_path, evaluate_runs(tables, num_resamples=5), {"lstm": tables["lstm"]})
    assert list(tmp_path.iterdir()) == []


def test_card_has_a_head_for_hubs_and_says_what_is_missing(tmp_path):
    tables = runs(names=("lstm",))
    data = prepared(tables["lstm"])
    (tmp_path / "config.json").write_text(
        json.dumps({"system": "lstm", "recipe": "safe", "seed": 4})
    )
    first = write_card(tmp_path, data.manifest).read_text()
    assert "Not evaluated yet." in first and "Not recorded by this run." in first
    write_metrics(evaluate_runs(tables, num_resamples=30), tmp_path / "metrics.json")
    text = write_card(tmp_path, data.manifest, samples=data.samples).read_text()
    _, head, body = text.split("---\n", 2)
    results = yaml.safe_load(head)["model-index"][0]["results"]
    assert {"auroc", "brier"} <= {m["type"] for result in results for m in result["metrics"]}
    assert "| seed | 4 |" in body and "| test | death | 150 |" in body
    for line in body.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_card_finds_its_run_among_several(tmp_path):
    tables = runs(names=("a", "b"))
    folder = tmp_path / "b"
    folder.mkdir()
    metrics = evaluate_runs(tables, num_resamples=10)
    data, config = prepared(tables["a"]), {"system": "lstm"}
    text = write_card(folder, data.manifest, config=config, metrics=metrics).read_text()
    found = metrics["runs"]["b"]["labels"]["in_hospital_mortality"]["auroc"]["value"]
    assert f"{found:.3f} (" in text
    other = tmp_path / "c"
    other.mkdir()
    assert (
        "Not evaluated yet." in write_card(other, data.manifest, config, None, metrics).read_text()
    )
