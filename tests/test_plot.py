"""What a picture holds: labels, series, counts."""

import pytest

import mpsearch as mps
from mpsearch.plot import Measured


@pytest.fixture
def drawn(monkeypatch):
    """The figure just before it is written."""
    figures = []
    import mpsearch.plot as plot

    written = plot.save
    monkeypatch.setattr(plot, "save", lambda figure, path: (figures.append(figure), written(figure, path)))
    return figures


def table(unit="nats"):
    layers = tuple(mps.Layer(f"l{i}", weight_shape=(10,)) for i in range(3))
    return mps.CostTable(
        layers,
        mps.precisions("w2 w4 w8"),
        [[9, 3, 1e-3], [4, 2, 1e-3], [5, 1, 1e-3]],
        usage={"memory_bytes": [[10, 20, 40]] * 3},
        unit=unit,
    )


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_front_with_everything(tmp_path, drawn, suffix):
    front = mps.pareto(table())
    mark = mps.solve(table(), mps.Budget(memory_bytes=70))
    measured = [
        Measured("measured", [50, 70], [3.0, 1.0], [0.1, 0.2], ["p", "q"]),
        Measured("all", [30], [9.0], [1.0], uniform=True),
    ]
    front.plot(tmp_path / f"front.{suffix}", mark=mark, measured=measured, title="A front")
    axes = drawn[0].axes[0]
    assert "nats" in axes.get_ylabel()
    assert axes.get_xlabel() == "memory"
    assert axes.get_yscale() == "log"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("exact" in text for text in legend)
    assert {"uniform precision, predicted", "chosen plan", "measured", "all"} <= set(legend)
    steps = axes.lines[0]
    assert len(steps.get_xdata()) == len(front)
    assert {"w2", "w4", "w8", "p", "q"} <= {text.get_text() for text in axes.texts}
    assert (tmp_path / f"front.{suffix}").stat().st_size > 1000


def test_a_relative_table_says_so(tmp_path, drawn):
    mps.pareto(table("relative")).plot(tmp_path / "front.png")
    assert drawn[0].axes[0].get_ylabel() == "damage [relative]"


def test_other_kinds_of_files_are_refused(tmp_path):
    with pytest.raises(mps.MpsearchError, match=r"\.png, \.svg or \.pdf"):
        mps.pareto(table()).plot(tmp_path / "front.gif")
    assert not list(tmp_path.iterdir())
