import dataclasses
from typing import Any

import numpy as np
import pytest

from mpsearch import CostTable, Interactions, Layer, Peak, TableError, precisions


def full(seed=0):
    """A table that uses every field."""
    generator = np.random.default_rng(seed)
    layers = (
        Layer("conv1", "conv2d", (4, 3, 3, 3), 1000, "", "float32"),
        Layer('block.0, odd "name"', "linear", (5, 7), 35, "tied", "bfloat16"),
        Layer("fc", "linear", (5, 7), 35, "tied", "bfloat16"),
    )
    sensitivity = generator.normal(size=(3, 4)) * 10.0 ** generator.integers(-12, 6, (3, 4))
    sensitivity[0, 0] = np.nan  # the first row lacks the first option: the order of columns must survive
    return CostTable(
        layers,
        precisions("w2 w4a8 w4g128 w16"),
        sensitivity,
        abs(generator.normal(size=(3, 4))),
        {"memory_bytes": generator.integers(1, 10**12, (3, 4)), "latency_s": generator.random((3, 4)) / 3},
        {"memory_bytes": 17.0},
        {"memory_bytes": 1e9, "latency_s": 0.1},
        "nats",
        {"estimator": "test", "passes": {"forward": 3}},
        Interactions([[0, 1]], [[2, 3]], [0.1 / 3]),
        {"activation_bytes": Peak(generator.random((2, 3, 4)), [1.0, 2.0])},
    )


@pytest.mark.parametrize("suffix", [".csv", ".npz"])
@pytest.mark.parametrize("seed", range(5))
def test_round_trips_are_exact(tmp_path, suffix, seed):
    table = full(seed)
    table.save(tmp_path / f"table{suffix}")
    back = CostTable.load(tmp_path / f"table{suffix}")
    assert back == table
    assert back.layers == table.layers
    assert back.precisions == table.precisions
    np.testing.assert_array_equal(back.sensitivity, table.sensitivity)
    np.testing.assert_array_equal(
        np.where(table.allowed, back.usage["latency_s"], 0),
        np.where(table.allowed, table.usage["latency_s"], 0),
    )
    assert back.origin == table.origin
    assert back.fixed_usage == table.fixed_usage


def test_tables_differ_where_one_bit_differs():
    table, other = full(), full()
    values = other.sensitivity.copy()
    values[1, 1] = np.nextafter(values[1, 1], np.inf)
    assert table == other
    assert table != CostTable(**{**other.__dict__, "sensitivity": values})


def test_the_file_starts_as_the_format_says(tmp_path):
    full().save(tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0] == "# mpsearch_table: 1"
    assert lines[1].startswith('# {"unit": "nats"')
    assert lines[2] == "layer,precision,sensitivity,sensitivity_se,kind,group,numel,macs,memory_bytes,latency_s"
    assert len(lines) == 3 + 11  # 12 cells, one not allowed


def test_a_plain_csv_loads(tmp_path):
    (tmp_path / "t.csv").write_text("precision,layer,my_cost,sensitivity\nw4,a,3,0.5\nw8,a,6,0.25\n\nw4,b,1,2\n")
    table = CostTable.load(tmp_path / "t.csv")
    assert [layer.name for layer in table.layers] == ["a", "b"]
    assert table.resources == ("my_cost",)
    assert table.unit == "relative"
    assert table.allowed.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no header"),
        ("layer,precision\na,w4\n", "line 1: no column 'sensitivity'"),
        ("layer,precision,sensitivity\n", "no rows"),
        ("layer,precision,sensitivity\na,w4,nan\n", "line 2: sensitivity of layer 'a' at w4 is nan"),
        ("layer,precision,sensitivity\na,w4,inf\n", "line 2: sensitivity of layer 'a' at w4 is inf"),
        ("layer,precision,sensitivity\na,w4,x\n", "expected a number"),
        ("layer,precision,sensitivity\na,w4,1\na,w4,2\n", "line 3: layer 'a' at w4 occurs twice"),
        ("layer,precision,sensitivity\na,w99,1\n", "line 2: an integer format of 99 bits"),
        ("layer,precision,sensitivity\na,w4\n", "line 2: 2 fields, expected 3"),
        (
            "layer,precision,sensitivity,numel\na,w4,1,5\na,w8,1,6\n",
            "numel of layer 'a' is '6', earlier it was '5'",
        ),
        ("layer,precision,sensitivity,numel\na,w4,1,-5\n", "expected a whole number"),
        ("layer,precision,sensitivity,cost\na,w4,1,inf\n", "cost of layer 'a' at w4 is inf"),
        ("layer,layer,precision,sensitivity\na,a,w4,1\n", "column 'layer' occurs twice"),
        ("# mpsearch_table: 2\n# {}\nlayer,precision,sensitivity\na,w4,1\n", "version 1"),
        ("# something\nlayer,precision,sensitivity\na,w4,1\n", "line 1"),
        ("# mpsearch_table: 1\nlayer,precision,sensitivity\na,w4,1\n", "line 2"),
        ("# mpsearch_table: 1\n# {bad\nlayer,precision,sensitivity\na,w4,1\n", "line 2: not JSON"),
        (
            '# mpsearch_table: 1\n# {"units": "nats"}\nlayer,precision,sensitivity\na,w4,1\n',
            "did you mean 'unit'",
        ),
        ('# mpsearch_table: 1\n# {"unit": "dB"}\nlayer,precision,sensitivity\na,w4,1\n', "unit 'dB'"),
        (
            '# mpsearch_table: 1\n# {"fixed_usage": {"bytes": 1}}\nlayer,precision,sensitivity\na,w4,1\n',
            "no resource of the table",
        ),
    ],
)
def test_a_corrupt_file_is_refused_with_the_place(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TableError) as caught:
        CostTable.load(tmp_path / "t.csv")
    assert words in str(caught.value)
    assert "t.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 10, 1000])
def test_a_damaged_npz_is_refused(tmp_path, cut):
    full().save(tmp_path / "t.npz")
    (tmp_path / "t.npz").write_bytes((tmp_path / "t.npz").read_bytes()[:cut])
    with pytest.raises(TableError, match=r"t\.npz"):
        CostTable.load(tmp_path / "t.npz")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TableError, match="UTF-8"):
        CostTable.load(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sensitivity": np.ones((2, 4))}, "expected (3, 4)"),
        ({"sensitivity": np.full((3, 4), np.nan)}, "has no allowed precision"),
        ({"sensitivity": np.full((3, 4), np.inf)}, "is inf"),
        ({"sensitivity_se": -np.ones((3, 4))}, "0 or more"),
        ({"usage": {"x": np.full((3, 4), np.nan)}}, "x of layer 'conv1'"),
        ({"fixed_usage": {"nothing": 1.0}}, "no resource of the table"),
        ({"precisions": ()}, "0 precisions"),
        ({"interactions": Interactions([[0, 9]], [[1, 0]], [1.0])}, "outside the 3 x 4 table"),
    ],
)
def test_bad_tables_are_refused(change, words):
    fields = {**full().__dict__, **change}
    if "usage" in change:
        fields |= {"fixed_usage": {}, "reference_usage": {}}
    with pytest.raises(TableError) as caught:
        CostTable(**fields)
    assert words in str(caught.value)


def test_the_arrays_are_read_only_and_the_callers_are_not_touched():
    mine = np.ones((1, 1))
    table = CostTable((Layer("a"),), precisions("w4"), mine)
    mine[0, 0] = 5
    assert table.sensitivity[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        table.sensitivity[0, 0] = 2


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    full(0).save(path)
    old = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match=r"disk full: .*t.csv"):
        full(1).save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_to_frame_has_the_columns_of_the_file():
    frame = full().to_frame()
    assert len(frame) == 11
    assert list(frame.columns[:3]) == ["layer", "precision", "sensitivity"]


def test_tables_are_equal_where_their_files_are() -> None:
    """What is not allowed does not count, nor the order of names, nor what no file keeps; every number counts to its last bit."""

    def table(**more: Any) -> CostTable:
        layers = (Layer("a", weight_shape=(4,)), Layer("b", weight_shape=(2, 2)))
        fields: dict[str, Any] = {
            "sensitivity": [[0.5, np.nan], [0.1, 0.2]],
            "usage": {"x": [[1, 2], [3, 4]], "y": [[1, 1], [1, 1]]},
            "origin": {"seeds": (1, 2), "by": "hand"},
        }
        return CostTable(layers, precisions("w4 w8"), **{**fields, **more})

    one = table()
    assert one == table(usage={"y": [[1, 7], [1, 1]], "x": [[1, 9], [3, 4]]}, origin={"by": "hand", "seeds": [1, 2]})
    assert one == dataclasses.replace(one, layers=(dataclasses.replace(one.layers[0], target="gguf"), one.layers[1]))
    others = [
        table(sensitivity=[[0.5, np.nan], [0.1, np.nextafter(0.2, 1)]]),
        table(sensitivity=[[0.5, 0.5], [0.1, 0.2]]),
        table(sensitivity_se=[[0.5, 0.5], [0.1, 0.2]]),
        table(usage={"x": [[1, 2], [3, 4]]}),
        table(usage={"x": [[1, 2], [3, 5]], "y": [[1, 1], [1, 1]]}),
        table(origin={}),
        table(unit="nats"),
        table(fixed_usage={"x": 1.0}),
        table(peaks={"z": Peak(np.zeros((1, 2, 2)), np.zeros(1))}),
        table(interactions=Interactions(np.array([[0, 0]]), np.array([[1, 0]]), np.array([1.0]))),
        dataclasses.replace(one, layers=(one.layers[1], one.layers[0])),
        dataclasses.replace(one, precisions=precisions("w4 w6")),
    ]
    for other in others:
        assert one != other
