"""What Jupyter shows: escaped, short, with units, and the numbers of the objects themselves."""

import base64
import dataclasses
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.core.measured_plans import MeasuredPlans

EVIL = "<script>alert('x')</script>&amp;\""


class Parsed(HTMLParser):
    """Rows of all tables as text, all text, all tags; every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.text, self.tags, self.stack, self.images = [], "", [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
            return
        self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.stack and self.stack[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def shown(value):
    return Parsed(value._repr_html_())


def table(count, name="layer {}"):
    layers = tuple(mps.Layer(name.format(i), "linear", (4, i + 1)) for i in range(count))
    sensitivity = np.outer(np.arange(1, count + 1), [0.5, 0.1])
    numel = np.array([layer.numel for layer in layers])
    return mps.CostTable(
        layers, mps.precisions("w4 w8"), sensitivity, usage={"memory_bytes": np.outer(numel, [0.5, 1.0])},
        unit="nats", origin={"estimator": "kl-divergence"},
    )  # fmt: skip


def test_a_table():
    made = table(3)
    cells = made.sensitivity.copy()
    cells[1, 0] = np.nan
    layers = (made.layers[0], *(dataclasses.replace(layer, group="pair") for layer in made.layers[1:]))
    found = shown(dataclasses.replace(made, layers=layers, sensitivity=cells))
    assert found.rows == [
        ["layer", "kind", "group", "parameters", "w4", "w8"],
        ["layer 0", "linear", "", "4", "0.5", "0.1"],
        ["layer 1", "linear", "pair", "8", "-", "0.2"],
        ["layer 2", "linear", "pair", "12", "1.5", "0.3"],
    ]
    assert "Sensitivity [nats] by kl-divergence" in found.text
    assert "memory 12.0 B to 24.0 B" in shown(made).text


def test_a_long_table_is_cut():
    found = shown(table(1000))
    assert len(found.rows) == 22
    names = [row[0] for row in found.rows[1:]]
    assert names == [*(f"layer {i}" for i in range(10)), "… 980 more …", *(f"layer {i}" for i in range(990, 1000))]
    plan = mps.solve(table(1000), mps.Budget(average_bits=6)).plan
    assert [row[0] for row in shown(plan).rows[1:]] == names


def test_a_plan():
    plan = mps.Plan(
        {"conv": mps.Precision("4"), "fc": mps.Precision("8")}, {"memory_bytes": 2000.0, "bitops": "25%"},
        usage={"memory_bytes": 1500.0, "bitops": 3e6},
    )  # fmt: skip
    found = shown(plan)
    assert found.rows[1:] == [["conv", "w4", "█" * 6], ["fc", "w8", "█" * 12]]
    assert "2 layers: 1 at w4, 1 at w8" in found.text
    assert "memory 1.50 kB of 2.00 kB, bitops 3.00 M" in found.text


def test_a_solution():
    found = shown(mps.solve(table(3), mps.Budget(average_bits=6)))
    assert "nats, proven optimal" in found.text
    assert len(found.rows) == 4
    assert "infeasible: no plan" in shown(mps.solve(table(3), mps.Budget(average_bits=1), throw=False)).text


def test_a_front_has_a_picture_and_its_points():
    front = mps.pareto(table(5))
    found = shown(front)
    assert len(found.rows) == 1 + min(len(front), 21)
    assert found.rows[1][0] == "30.0 B"
    assert float(found.rows[1][1]) == pytest.approx(front.sensitivity[0], rel=5e-3)
    (image,) = found.images
    assert image["alt"]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")


def test_measured_plans():
    plans = tuple(mps.Plan({"fc": mps.Precision(bits)}, usage={"memory_bytes": 100.0}) for bits in "48")
    found = shown(MeasuredPlans(plans, [0.5, 0.1], [0.01, np.nan], "nats"))
    assert found.rows == [
        ["plan", "damage [nats]", "memory", "layers at"],
        ["0", "0.5 ± 0.01", "100 B", "w4 × 1"],
        ["1", "0.1", "100 B", "w8 × 1"],
    ]


def test_an_evaluation():
    before = mps.Evaluation(0.0, 0.0, 0.2, 0.01, 0.9, 0.02, 50)
    found = shown(mps.Evaluation(0.1, 0.03, 0.25, 0.02, 0.85, 0.01, 50, reference=before))
    assert found.rows == [
        ["50 samples", "plan", "unquantized"],
        ["KL to the unquantized model [nats]", "0.1 ± 0.03", "0"],
        ["loss", "0.25 ± 0.02", "0.2 ± 0.01"],
        ["accuracy", "85.0 ± 1.0 %", "90.0 ± 2.0 %"],
    ]
    assert len(shown(mps.Evaluation(0.1, 0.03, None, None, None, None, 50)).rows) == 2


def test_a_result_of_a_search():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = [torch.randn(20, 5) for _ in range(4)]
    result = mps.search(
        model, data, mps.Budget(average_bits=3), mps.precisions("w2 w3 w4"), max_passes=20, progress=False
    )
    found = shown(result)
    assert result.verdict in found.text
    assert f"{len(result.plans)} plans measured" in found.text
    assert [row[0] for row in found.rows[1 : len(result.comparison) + 2]][::-1][0] == "unquantized"
    assert [row[:2] for row in found.rows[-2:]] == [[name, str(chosen)] for name, chosen in result.plan.items()]
    assert len(shown(result.front).images) == 1


def test_names_are_escaped():
    made = table(2, EVIL + "{}")
    made = dataclasses.replace(made, layers=[dataclasses.replace(x, kind=EVIL, group=EVIL) for x in made.layers])
    plan = mps.solve(made, mps.Budget(average_bits=6)).plan
    measured = MeasuredPlans((plan,), [0.5], unit="nats")
    for value in (made, plan, mps.solve(made, mps.Budget(average_bits=6)), mps.pareto(made), measured):
        assert "script" not in shown(value).tags
    assert shown(made).rows[1][:3] == [f"{EVIL}0", EVIL, EVIL]
