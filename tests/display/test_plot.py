"""What a picture holds: labels, series, counts; and the file."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import mpsearch as mps
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.display import figures
from mpsearch.display.blocks import blocks
from mpsearch.display.figures.figure import COLOURS, empty, styles
from mpsearch.display.figures.pareto import certified
from mpsearch.plan_search.results.measured_front import measured_front
from mpsearch.solvers import Greedy


def table(count=6, precisions="w2 w4 w8", unit="nats", seed=0, **fields):
    """Decoder layers of 7 to a block, the first three of a block in one group."""
    rng = np.random.default_rng(seed)
    names = ["q", "k", "v", "o", "gate", "up", "down"]
    layers = [
        mps.Layer(
            f"model.layers.{i // 7}.{names[i % 7]}",
            weight_shape=(8 * (1 + i % 3), 8),
            macs=640 * (1 + i % 3),
            group=f"qkv {i // 7}" if i % 7 < 3 else "",
        )
        for i in range(count)
    ]
    kinds = mps.precisions(precisions)
    bits = np.array([kind.weight_bits for kind in kinds])
    damage = rng.lognormal(-3, 1, count)[:, None] * 4.0 ** (2.0 - bits)
    memory = np.outer([layer.numel for layer in layers], bits) / 8
    settings = {"usage": {"memory_bytes": memory}, "fixed_usage": {"memory_bytes": 100.0}, "unit": unit} | fields
    return mps.CostTable(layers, kinds, settings.pop("sensitivity", damage), **settings)


def measured_plans(of, count=12, seed=0):
    """All uniform plans, then random ones; measured to do 1.5 times the damage that the table says."""
    rng = np.random.default_rng(seed)
    kinds = len(of.precisions)
    rows = [np.full(len(of.layers), i) if i < kinds else rng.integers(0, kinds, len(of.layers)) for i in range(count)]
    plans = tuple(
        mps.Plan(
            {layer.name: of.precisions[p] for layer, p in zip(of.layers, row, strict=True)},
            usage={"memory_bytes": sum(of.usage["memory_bytes"][i, p] for i, p in enumerate(row))},
        )
        for row in rows
    )
    damage = [1.5 * sum(of.sensitivity[i, p] for i, p in enumerate(row)) for row in rows]
    return MeasuredPlans(plans, damage, 0.1 * np.array(damage), unit="nats")


def legend(figure):
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def ticks(axes):
    return [text.get_text() for text in axes.get_xticklabels()]


def texts(axes):
    return {text.get_text() for text in axes.texts}


def line(axes, label):
    """The points of a series."""
    handles, labels = axes.get_legend_handles_labels()
    handle = handles[labels.index(label)]
    return handle.lines[0] if hasattr(handle, "lines") else handle


# names and blocks


@pytest.mark.parametrize("count", [1, 6, 40, 41, 224, 1000])
@pytest.mark.parametrize("name", ["model.layers.{}.{}", "conv{0}_{1}", "a.b.c.d.{0}.{1}.weight", "layer{0}.{1}.x{1}"])
def test_blocks_hold_every_layer_once_and_are_few(count, name):
    names = [name.format(i // 7, i % 7) for i in range(count)]
    found = blocks(names)
    assert [i for block in found for i in range(block.start, block.stop)] == list(range(count))
    assert len(found) <= 40
    assert len(found) >= min(count, 8)
    if count <= 40:
        assert [block.label for block in found] == names


def test_blocks_follow_the_names():
    names = ["embed"] + [f"h.{i}.{part}" for i in range(24) for part in ("attn.qkv", "attn.out", "mlp")] + ["head"]
    assert [block.label for block in blocks(names)] == ["embed", *(f"h.{i}" for i in range(24)), "head"]


@pytest.mark.parametrize(
    "text", ["w2 w4 w8", "w4 w4a8 w4g32 wnvfp4", "w1 w7 w9 w10", "w2 w3 w4 w5 w6 w7 w8 w16 w4a8 w4g32 w8a8"]
)
def test_precisions_are_told_apart(text):
    kinds = mps.precisions(text)
    found = list(styles(kinds).values())
    assert len({(style.colour, style.marker) for style in found}) == len(kinds)
    assert len({(style.colour, style.hatch) for style in found}) == len(kinds)
    if len(kinds) <= len(COLOURS):
        assert len({style.colour for style in found}) == len(kinds)


def test_a_precision_looks_the_same_in_every_picture():
    assert styles(mps.precisions("w2 w4"))[mps.Precision("4")] == dataclasses.replace(
        styles(mps.precisions("w4 w8"))[mps.Precision("4")], marker="s"
    )


# a table


def test_every_layer_at_every_precision():
    of = table(9, sensitivity_se=np.full((9, 3), 1e-4))
    figure = of.plot(title="A net")
    brackets, axes = figure.axes
    assert brackets.get_title(loc="left") == "A net"
    assert texts(brackets) == {"qkv 0", "qkv 1"}
    assert axes.get_xlabel() == "layer; those in brackets share a precision"
    assert ticks(axes) == [layer.name for layer in of.layers]
    assert legend(figure) == ["w2", "w4", "w8"]
    assert axes.get_yscale() == "log"
    assert "nats" in axes.get_ylabel()
    for column, name in enumerate(("w2", "w4", "w8")):
        assert np.array_equal(line(axes, name).get_ydata(), of.sensitivity[:, column])
        assert len(axes.containers[column].lines[2][0].get_segments()) == 9  # error bars


def test_groups_that_overlap_have_lanes_of_their_own():
    layers = [mps.Layer(f"l{i}", weight_shape=(2,), group="ab"[i % 2]) for i in range(4)]
    of = mps.CostTable(layers, mps.precisions("w2 w4"), [[2, 1]] * 4)
    brackets = of.plot().axes[0]
    spans = [brackets.lines[0], brackets.lines[2]]
    assert [(list(one.get_xdata()), one.get_ydata()[0]) for one in spans] == [([0, 2], 0), ([1, 3], 1)]


def test_a_name_that_is_too_long_for_its_bracket_is_left_out():
    layers = [mps.Layer(f"l{i}", weight_shape=(2,), group="model.layers.0.self_attn.q_proj") for i in range(2)]
    brackets = mps.CostTable(layers, mps.precisions("w2 w4"), [[2, 1]] * 2).plot().axes[0]
    assert not texts(brackets)
    assert len(brackets.lines) == 2


@pytest.mark.parametrize("count", [224, 1000])
def test_many_layers_are_put_together(count):
    sensitivity = table(count).sensitivity.copy()
    sensitivity[7:14, 0] = np.nan  # a whole block without w2
    sensitivity[15, 1] = np.nan
    of = table(count, sensitivity=sensitivity)
    figure = of.plot()
    (axes,) = figure.axes
    found = blocks([layer.name for layer in of.layers])
    assert len(ticks(axes)) == len(found) <= 40
    assert f"{count} layers, by block" in axes.get_xlabel()
    assert f"{-(-count // 7)} groups" in axes.get_xlabel()
    for column, name in enumerate(("w2", "w4", "w8")):
        truth = []
        for block in found:
            cells = [v for v in of.sensitivity[block.start : block.stop, column] if not math.isnan(v)]
            truth.append(sum(cells) / len(cells) if cells else math.nan)
        assert np.allclose(line(axes, name).get_ydata(), truth, equal_nan=True)
    dots = [one for one in axes.lines if one.get_marker() == "."]
    assert [len(one.get_xdata()) for one in dots] == [count] * 3


def test_the_error_of_a_block_is_that_of_its_mean():
    of = table(70, sensitivity_se=np.arange(210.0).reshape(70, 3) * 1e-6)
    axes = of.plot().axes[0]
    segments = axes.containers[0].lines[2][0].get_segments()
    for block, segment in zip(blocks([layer.name for layer in of.layers]), segments, strict=True):
        se = of.sensitivity_se[block.start : block.stop, 0]
        truth = math.sqrt(sum(v * v for v in se)) / len(se)
        assert (segment[1][1] - segment[0][1]) / 2 == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([[2, 1], [3, 1]], "log"),
        ([[2, 0], [3, 1]], "symlog"),
        ([[2, -1], [3, 1]], "symlog"),
        ([[0, 0], [0, 0]], "linear"),
    ],
)
def test_zero_and_negative_damages_are_on_the_axis(values, scale):
    of = mps.CostTable((mps.Layer("a", weight_shape=(2,)), mps.Layer("b")), mps.precisions("w2 w4"), values)
    axes = of.plot().axes[0]
    assert axes.get_yscale() == scale
    assert axes.get_ylabel() == "damage [relative]"
    low, high = axes.get_ylim()
    assert all(low <= value <= high for row in values for value in row)


# a plan


def test_bits_over_the_depth():
    plan = mps.Plan({"a": mps.Precision("4", "8"), "b": mps.Precision("4"), "c": mps.Precision("2")})
    figure = plan.plot()
    (axes,) = figure.axes
    assert legend(figure) == ["activation bits", "w2: 1 layer", "w4: 1 layer", "w4a8: 1 layer"]
    assert {bar.get_x() + 0.4: bar.get_height() for one in axes.containers for bar in one} == {0.0: 4, 1.0: 4, 2.0: 2}
    assert list(line(axes, "activation bits").get_ydata()) == [8]
    assert axes.get_ylabel() == "weight bits"
    assert ticks(axes) == ["a", "b", "c"]


def test_parameters_and_macs_under_the_bits():
    of = table(6)
    plan = mps.solve(of, mps.Budget(average_bits=4)).plan
    bits, parameters, macs = plan.plot(layers=of.layers).axes
    assert [bar.get_height() for bar in parameters.containers[0]] == [layer.numel for layer in of.layers]
    assert [bar.get_height() for bar in macs.containers[0]] == [layer.macs for layer in of.layers]
    assert (parameters.get_ylabel(), macs.get_ylabel()) == ("parameters", "MACs\n(one sample)")
    assert ticks(macs) == [layer.name for layer in of.layers]
    assert not any(label.get_visible() for label in bits.get_xticklabels())
    without_macs = [dataclasses.replace(layer, macs=0) for layer in of.layers]
    assert len(plan.plot(layers=without_macs).axes) == 2


def test_the_mean_bits_of_a_block():
    of = table(70)
    plan = mps.solve(of, mps.Budget(average_bits=4)).plan
    figure = plan.plot(layers=of.layers)
    steps = next(one for one in figure.axes[0].patches if one.get_label() == "mean of the block").get_data()
    parameters = [bar.get_height() for bar in figure.axes[1].containers[0]]
    for block, mean, total in zip(blocks(list(plan)), steps.values, parameters, strict=True):
        part = of.layers[block.start : block.stop]
        weights = sum(layer.numel for layer in part)
        assert total == weights
        assert mean == pytest.approx(sum(plan[layer.name].weight_bits * layer.numel for layer in part) / weights)


def test_layers_of_another_model_are_refused():
    plan = mps.Plan({"fc1": mps.Precision("4")})
    with pytest.raises(mps.PlanError, match=r"'fc1'.*did you mean 'fc'"):
        plan.plot(layers=[mps.Layer("fc")])


# the use of a budget


@pytest.mark.parametrize("count", [6, 224])
def test_the_stacked_bytes_add_up(count):
    of = table(count)
    plan = mps.solve(of, mps.Budget(memory_bytes=100 + 4.1 * of.usage["memory_bytes"][:, 0].sum() / 2)).plan
    figure = figures.usage_figure(of, plan)
    whole, depth = figure.axes
    parts = [bar for one in whole.containers for bar in one]
    assert parts[0].get_width() == 100  # the fixed part
    assert sum(bar.get_width() for bar in parts) == pytest.approx(plan.budget["memory_bytes"])
    assert sum(bar.get_width() for bar in parts[:-1]) == pytest.approx(plan.usage["memory_bytes"])
    assert legend(figure)[0].startswith("budget, ")
    assert legend(figure)[-1].startswith("left of the budget, ")
    stacked = np.sum([[bar.get_height() for bar in one] for one in depth.containers], axis=0)
    used = [of.usage["memory_bytes"][i, of.precisions.index(plan[layer.name])] for i, layer in enumerate(of.layers)]
    truth = [sum(used[block.start : block.stop]) for block in blocks([layer.name for layer in of.layers])]
    assert np.allclose(stacked, truth)
    assert (whole.get_xlabel(), depth.get_ylabel()) == (
        "memory, whole model",
        f"memory, each {'layer' if count == 6 else 'block'}",
    )


def test_a_budget_of_average_bits():
    of = table(6)
    plan = mps.solve(of, mps.Budget(average_bits=4)).plan
    whole = figures.usage_figure(of, plan).axes[0]
    assert sum(bar.get_width() for one in whole.containers for bar in one) == pytest.approx(4)
    memory = figures.usage_figure(of, plan, "memory_bytes")
    assert not any("budget" in label for label in legend(memory))


def test_what_does_not_fit_a_table_is_refused():
    of = table(6)
    plan = mps.solve(of, mps.Budget(average_bits=4)).plan
    with pytest.raises(mps.BudgetError, match=r"no resource 'memory'.*did you mean 'memory_bytes'"):
        figures.usage_figure(of, plan, "memory")
    with pytest.raises(mps.PlanError, match=r"says nothing of layer 'model\.layers\.0\.k'"):
        figures.usage_figure(of, mps.Plan({of.layers[0].name: mps.Precision("2")}))
    with pytest.raises(mps.PlanError, match="at w5, the table has w2 w4 w8"):
        figures.usage_figure(of, mps.Plan({layer.name: mps.Precision("5") for layer in of.layers}))


# fronts


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_front_with_everything(tmp_path, suffix):
    of = table()
    front = mps.pareto(of)
    measured = [
        figures.Measured("measured", [150, 170], [0.3, 0.1], [0.1, 0.2], ["p", "q"]),
        figures.Measured("all", [130], [9.0], [1.0], uniform=True),
    ]
    mark = mps.solve(of, mps.Budget(average_bits=4))
    figure = front.plot(tmp_path / f"front.{suffix}", mark=mark, measured=measured, title="A front")
    (axes,) = figure.axes
    assert "nats" in axes.get_ylabel()
    assert axes.get_xlabel() == "memory"
    assert axes.get_yscale() == "log"
    assert axes.get_title(loc="left") == "A front"
    best = f"best plans, predicted (exact, {len(front)} points)"
    assert set(legend(figure)) == {best, "uniform precision, predicted", "chosen plan", "measured", "all"}
    assert len(line(axes, best).get_xdata()) == len(front)
    assert {"w2", "w4", "w8", "p", "q"} <= texts(axes)
    assert line(axes, "chosen plan").get_ydata()[0] == mark.sensitivity
    assert (tmp_path / f"front.{suffix}").stat().st_size > 1000


def test_a_relative_table_says_so():
    (axes,) = mps.pareto(table(unit="relative")).plot().axes
    assert axes.get_ylabel() == "predicted damage [relative]"


def test_several_fronts():
    a, b = table(), table(seed=1)
    fronts = {"a": mps.pareto(a), "a by hull": mps.pareto(a, method="hull"), "b": mps.pareto(b)}
    figure = figures.fronts_figure(fronts)
    (axes,) = figure.axes
    assert legend(figure) == ["a", "a by hull", "b", "proven: no plan lies below the band", "uniform, a", "uniform, b"]
    assert len({line(axes, name).get_color() for name in fronts}) == 3
    with pytest.raises(mps.MpsearchError, match="average_bits in nats, memory_bytes in nats"):
        figures.fronts_figure({"a": mps.pareto(a), "b": mps.pareto(b, "average_bits")})
    with pytest.raises(mps.MpsearchError, match=r"in nats.*in relative"):
        figures.fronts_figure({"a": mps.pareto(a), "b": mps.pareto(table(unit="relative"))})
    with pytest.raises(mps.MpsearchError, match="over none"):
        figures.fronts_figure({})


@pytest.mark.parametrize(
    "settings", [{"method": "hull"}, {"solver": Greedy(), "points": 7}, {"method": "epsilon", "epsilon": 0.5}]
)
def test_no_plan_lies_below_the_band(settings):
    of = table(5, seed=3)
    front = mps.pareto(of, **settings)
    usage, damage, bound = certified(front)
    exact = mps.pareto(of)
    for use, most, least in zip(usage, damage, bound, strict=True):
        best = min(d for u, d in zip(exact.usage, exact.sensitivity, strict=True) if u <= use + 1e-9)
        assert least <= best * (1 + 1e-9)
        assert best <= most * (1 + 1e-9)
    assert (bound < damage).any()
    assert "proven: no plan lies below the band" in legend(front.plot())


def test_an_exact_front_has_no_band():
    assert not len(certified(mps.pareto(table()))[0])
    assert not any("proven" in label for label in legend(mps.pareto(table()).plot()))


def test_a_plan_that_is_not_proven_shows_its_bound():
    of = table(9)
    mark = mps.solve(of, mps.Budget(average_bits=4.1), Greedy())
    assert mark.gap > 0
    (axes,) = mps.pareto(of).plot(mark=mark).axes
    assert list(line(axes, "its proven bound").get_ydata()) == [mark.bound, mark.sensitivity]


def test_a_plan_without_a_prediction_cannot_be_marked():
    with pytest.raises(mps.MpsearchError, match="no table has predicted it"):
        mps.pareto(table()).plot(mark=mps.Plan({"a": mps.Precision("4")}, usage={"memory_bytes": 1.0}))


def test_the_measured_front():
    plans = measured_plans(table())
    front = measured_front(plans, "memory_bytes")
    chosen = dataclasses.replace(front.plans.plans[0], origin={"search": {"select": {"damage": 0.5}}})
    figure = figures.measured_front_figure(front, plans=plans, mark=chosen, title="Measured")
    (axes,) = figure.axes
    best = f"best plans, measured ({len(front.plans)})"
    assert set(legend(figure)) == {best, "uniform precision, measured", "all plans measured (12)", "chosen plan"}
    assert list(line(axes, best).get_ydata()) == list(front.plans.damage)
    assert len(line(axes, "uniform precision, measured").get_xdata()) == 3
    assert list(line(axes, "chosen plan").get_ydata()) == [0.5]
    assert texts(axes) == {"w2", "w4", "w8"}


# tables against each other and the truth


def test_rank_agreement():
    tables = {"a": table(), "b": table(seed=1), "upside down": table(sensitivity=1 - table().sensitivity)}
    plans = measured_plans(table())
    figure = figures.agreement_figure(tables, plans)
    matrix, column = figure.axes[:2]
    values = matrix.images[0].get_array()
    assert values.shape == (3, 3)
    assert values[0, 2] == values[2, 0] == pytest.approx(-1)

    def order(of):
        return np.argsort(np.argsort(of.sensitivity.ravel()))

    truth = np.corrcoef(order(tables["a"]), order(tables["b"]))[0, 1]  # no ties, so ranks correlate
    assert values[0, 1] == pytest.approx(truth)
    assert column.images[0].get_array()[0, 0] == pytest.approx(1)  # the plans were made from the first
    assert [text.get_text() for text in matrix.get_yticklabels()] == list(tables)
    assert "Spearman" in matrix.get_xlabel()
    assert column.get_xlabel() == "12 measured\nplans: Spearman"
    assert len(matrix.texts) == 9
    with pytest.raises(mps.TableError, match="1 table, expected 2"):
        figures.agreement_figure({"a": table()})


def test_cell_by_cell():
    a, b = table(), table(seed=1, precisions="w8 w2 w4", unit="relative")
    figure = figures.cells_figure(a, b, ("kl", "hessian"))
    (axes,) = figure.axes
    assert axes.get_xlabel() == "kl: damage, KL to the unquantized model [nats]"
    assert axes.get_ylabel() == "hessian: damage [relative]"
    assert legend(figure) == ["w2", "w4", "w8"]
    assert list(line(axes, "w2").get_ydata()) == list(b.sensitivity[:, 1])
    assert "18 cells" in axes.get_title(loc="left")


def test_predicted_against_measured():
    of = table()
    figure = figures.prediction_figure(of, measured_plans(of), title="kl")
    (axes,) = figure.axes
    assert set(legend(figure)) == {"mixed precision (9 plans)", "uniform precision (3 plans)", "predicted = measured"}
    mixed = line(axes, "mixed precision (9 plans)")
    assert np.allclose(np.array(mixed.get_ydata()), 1.5 * np.array(mixed.get_xdata()))
    assert axes.get_title(loc="left") == "kl: Spearman 1 ± 0, 12 plans"
    identity = line(axes, "predicted = measured")
    assert list(identity.get_xdata()) == list(identity.get_ydata())
    assert texts(axes) == {"w2", "w4", "w8"}
    relative = figures.prediction_figure(table(unit="relative"), measured_plans(of))
    assert "predicted = measured" not in legend(relative)


# a search


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    data = [(torch.randn(20, 5), torch.randint(0, 3, (20,))) for _ in range(4)]
    return mps.search(
        model, data, mps.Budget(average_bits=3), mps.precisions("w2 w3 w4"), front=True, max_passes=40, progress=False
    )


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("front", ["measured damage, KL to the unquantized model [nats]"]),
        ("plan", ["weight bits", "parameters", "MACs\n(one sample)"]),
        ("sensitivity", ["damage, KL to the unquantized model [nats]"]),
        ("usage", ["", "average weight bits, each layer"]),
        ("agreement", ["", "", "rank correlation"]),
        ("prediction", ["measured damage, KL to the unquantized model [nats]"]),
    ],
)
def test_all_sides_of_a_search(result, tmp_path, kind, labels):
    figure = result.plot(tmp_path / "picture.svg", kind=kind, title="A net")
    assert [axes.get_ylabel() for axes in figure.axes] == labels
    assert any("A net" in axes.get_title(loc="left") for axes in figure.axes)
    assert (tmp_path / "picture.svg").stat().st_size > 1000


def test_the_picture_of_a_search_is_its_measured_front(result):
    figure = result.plot()
    assert {f"all plans measured ({len(result.plans)})", "uniform precision, measured", "chosen plan"} <= set(
        legend(figure)
    )
    assert list(line(figure.axes[0], "chosen plan").get_xdata()) == [result.plan.usage[result.front.over]]


def test_a_picture_that_there_is_not(result):
    with pytest.raises(mps.MpsearchError, match=r"no picture of kind 'sensitivities'; did you mean 'sensitivity'"):
        result.plot(kind="sensitivities")


# the file


def test_other_kinds_of_files_are_refused(tmp_path):
    with pytest.raises(mps.MpsearchError, match=r"\.png, \.svg or \.pdf"):
        mps.pareto(table()).plot(tmp_path / "front.gif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 6, 224])
def test_nothing_is_clipped(count):
    """Everything lies inside the figure, also long names."""
    layers = [dataclasses.replace(one, name=f"a_model.with_long_names.{one.name}") for one in table(count).layers]
    of = dataclasses.replace(table(count), layers=tuple(layers))
    plan = mps.solve(of, mps.Budget(average_bits=8)).plan
    for figure in (
        of.plot(title="A title"),
        plan.plot(layers=layers),
        figures.usage_figure(of, plan),
        mps.pareto(of, method="hull").plot(),
        figures.agreement_figure({"a long name of an estimator": of, "another long name": of}),
    ):
        renderer = figure.canvas.get_renderer()
        figure.draw(renderer)
        drawn = figure.get_tightbbox(renderer)  # of all that is visible, in inches
        assert drawn.x0 >= 0
        assert drawn.y0 >= 0
        assert drawn.x1 <= figure.get_figwidth()
        assert drawn.y1 <= figure.get_figheight()


def test_a_notebook_shows_a_picture_by_itself():
    figure = empty(2.0, 1.0)
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("unit", "origin", "label"),
    [
        ("nats", {}, "measured damage, KL to the unquantized model [nats]"),
        ("nats", {"metric": "kl"}, "measured damage, KL to the unquantized model [nats]"),
        ("nats", {"metric": "loss"}, "measured damage, rise of the loss [nats]"),
        ("relative", {"metric": "accuracy"}, "measured damage, drop of the accuracy"),
        ("relative", {"metric": "own"}, "measured damage [relative]"),
        ("relative", {}, "measured damage [relative]"),
    ],
)
def test_a_damage_is_called_what_was_measured(unit, origin, label):
    plans = dataclasses.replace(measured_plans(table()), unit=unit, origin=origin)
    figure = figures.measured_front_figure(measured_front(plans, "memory_bytes"))
    assert figure.axes[0].get_ylabel() == label
