"""The folder that keeps a result: all of it comes back, and damage is told."""

import dataclasses
import json
import math
import sqlite3

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.checkpoint import Checkpoint
from mpsearch.measured_plans import MeasuredPlans
from mpsearch.search_result import measured_front


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(20, 5, generator=generator), torch.randint(0, 3, (20,), generator=generator)) for _ in range(4)
    ]
    return mps.search(
        model, data, mps.Budget(average_bits=3), mps.precisions("w2 w3 w4"), max_passes=20, progress=False
    )


def test_all_comes_back(result, tmp_path):
    result.save(tmp_path)
    found = mps.SearchResult.load(tmp_path)
    assert found.plan == result.plan
    assert found.plan.predicted == result.predicted == found.predicted
    for name in ("verdict", "wins", "measured", "uniform", "passes", "seconds", "settings", "identity", "finished"):
        assert getattr(found, name) == getattr(result, name), name
    assert list(found.comparison) == list(result.comparison)
    for name, table in result.tables.items():
        assert np.array_equal(found.tables[name].sensitivity, table.sensitivity)
        assert found.tables[name].unit == table.unit
    assert [plan.usage for plan in found.plans.plans] == [plan.usage for plan in result.plans.plans]
    assert np.array_equal(found.plans.damage, result.plans.damage)
    assert np.array_equal(found.plans.damage_se, result.plans.damage_se)
    assert found.front.over == result.front.over
    assert found.front.to_frame().equals(result.front.to_frame())
    assert str(found) == str(result)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "plan.json", "plans.csv", "front.csv", "passes.db", "summary.json",
        *(f"tables/{name}.csv" for name in result.tables),
    }  # fmt: skip
    found.save(tmp_path)  # over itself
    assert str(mps.SearchResult.load(tmp_path)) == str(result)


@pytest.mark.parametrize("name", ["plan.json", "plans.csv", "passes.db", "summary.json", "tables/posterior.csv"])
def test_a_missing_file_is_named(result, tmp_path, name):
    result.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        mps.SearchResult.load(tmp_path)
    assert str(caught.value.filename).endswith(name)
    assert not (tmp_path / name).exists()


def summary(change):
    def damage(path):
        content = json.loads((path / "summary.json").read_text())
        change(content)
        (path / "summary.json").write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "summary.json").write_text("{"), "not JSON"),
        (lambda path: (path / "summary.json").write_bytes(b"\xff\xfe"), "not JSON"),
        (lambda path: (path / "summary.json").write_text("[]"), "no summary of a search"),
        (summary(lambda content: content.update(mpsearch_search=2)), "no summary of a search"),
        (summary(lambda content: content.update(verdikt="")), "unknown key 'verdikt'; did you mean 'verdict'"),
        (summary(lambda content: content.pop("wins")), "the key 'wins' is missing"),
        (summary(lambda content: content["comparison"][0].pop("damage")), "'damage' is missing at $.comparison[0]"),
        (summary(lambda content: content["comparison"][0].update(role="plna")), "comparison does not fit"),
        (summary(lambda content: content.update(comparison=3)), "expected a list at $.comparison, got 3"),
        (summary(lambda content: content["comparison"][0]["evaluation"].update(more=1)), "unknown key 'more'"),
        (lambda path: (path / "passes.db").write_text("nothing" * 999), "no checkpoint"),
        (summary(lambda content: content["identity"].update(weights="other")), "other weights"),
    ],
)
def test_damage_is_told_in_one_line(result, tmp_path, damage, words):
    result.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(mps.MpsearchError) as caught:
        mps.SearchResult.load(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_front_keeps_what_nothing_beats():
    rows = [(2, 0.9), (3, 0.5), (3, 0.6), (4, 0.5), (5, 0.1), (2, 1.0)]
    plans = tuple(
        mps.Plan({"a": mps.Precision("2"), "b": mps.Precision(str(i + 2))}, usage={"memory_bytes": float(use)})
        for i, (use, _) in enumerate(rows)
    )
    measured = MeasuredPlans(plans, np.array([d for _, d in rows]), np.zeros(len(rows)))
    front = measured_front(measured, "memory_bytes")
    kept = [
        row for row in rows
        if not any(o[0] <= row[0] and o[1] <= row[1] and o != row for o in rows)
    ]  # fmt: skip
    assert list(zip(front.usage.tolist(), front.plans.damage.tolist(), strict=True)) == sorted(kept)
    assert len(front.uniforms) == 1


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_picture(result, tmp_path, kind):
    path = tmp_path / f"front.{kind}"
    result.front.plot(path, mark=result.plan, title="A net")
    assert path.stat().st_size > 5000


def test_a_folder_that_may_only_be_read(result, tmp_path, monkeypatch):
    """Such as a colleague's; root may write everywhere, so what is opened is looked at too."""
    folder = tmp_path / "result"
    result.save(folder)
    opened = []
    connect = sqlite3.connect

    def recorded(path, *args, **options):
        opened.append(str(path))
        return connect(path, *args, **options)

    monkeypatch.setattr(sqlite3, "connect", recorded)
    folder.chmod(0o555)
    try:
        assert mps.SearchResult.load(folder).finished == result.finished
    finally:
        folder.chmod(0o755)
    assert {path.partition("passes.db")[2] for path in opened if path != ":memory:"} == {"?immutable=1"}


def test_saving_that_is_cut_short_leaves_the_passes_of_before(result, tmp_path, monkeypatch):
    result.save(tmp_path)

    def killed(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "fill", killed)
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path)
    monkeypatch.undo()
    assert mps.SearchResult.load(tmp_path).finished == result.finished


@pytest.mark.parametrize(
    ("over", "settings", "header", "above"),
    [
        ("average_bits", {"budget": {"average_bits": 3}}, "bits  memory  ", "w4 (over budget)"),
        ("bitops", {"budget": {"bitops": "50%"}}, "bits  memory  bitops  ", "w4 (over budget)"),
        ("memory_bytes", {"budget": {}}, "bits  memory  ", "w4 (larger)"),
    ],
)
def test_the_text_tells_what_was_limited(result, over, settings, header, above):
    shown = dataclasses.replace(result, front=dataclasses.replace(result.front, over=over), settings=settings)
    assert header in str(shown)
    assert above in str(shown)
    assert "metric" not in str(shown)
    assert max(map(len, shown.text(80).splitlines())) <= 100


def test_the_text_tells_a_metric_of_ones_own_and_leaves_out_what_there_is_not(result):
    def own(found):
        rest = None if found.reference is None else own(found.reference)
        return dataclasses.replace(
            found, kl=math.nan, kl_se=math.nan, loss=None, accuracy=None, metric=0.125, metric_se=0.5, reference=rest
        )

    rows = [dataclasses.replace(one, evaluation=own(one.evaluation)) for one in result.comparison]
    lines = dataclasses.replace(result, measured=own(result.measured), comparison=rows).text().splitlines()
    header = next(line for line in lines if line.startswith("held-out"))
    assert header.split()[-3:] == ["KL", "[nats]", "metric"]
    assert "loss" not in header
    assert [line.split()[-2:] for line in lines if line.startswith("unquantized")] == [["-", "0.125"]]


def test_the_text_fits_narrow_terminals(result):
    """Columns go where there is no room, from the loss on; bits and KL stay."""
    left = []
    for width in (80, 70, 60, 50, 40):
        table = result.text(width).split("\n\n")[1].splitlines()
        assert max(map(len, table)) <= width
        assert len(table) == 2 + len(result.comparison) + 1
        left.append(table[0].split()[2:])
    assert left[0] == ["bits", "memory", "KL", "[nats]", "loss", "right"]
    assert left[-1] == ["bits", "KL", "[nats]"]
    assert [len(one) for one in left] == sorted((len(one) for one in left), reverse=True)
