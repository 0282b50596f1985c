"""`latency_s` from a CSV: looked up, interpolated, refused."""

import math

import pytest
from torch import nn

import mpsearch as mps
from mpsearch.resources import LatencyTable

LAYERS = [
    mps.Layer("a", "linear", (8, 4), 100),
    mps.Layer("b", "linear", (8, 8), 200),
    mps.Layer("c", "linear", (8, 16), 400),
]
OPTIONS = mps.precisions("w4 w8")
BY_LAYER = "layer,precision,latency_s\na,w4,1\na,w8,3\nb,w4,2\nb,w8,5\nc,w4,6\nc,w8,nan\n"


def look(tmp_path, text, layers=LAYERS, options=OPTIONS, **settings):
    (tmp_path / "latency.csv").write_text(text)
    return LatencyTable(tmp_path / "latency.csv", **settings)(nn.Identity(), layers, options)


def test_by_layer(tmp_path):
    found = look(tmp_path, BY_LAYER, fixed_s=0.5)
    assert found.usage.tolist()[:2] == [[1, 3], [2, 5]]
    assert found.usage[2, 0] == 6
    assert math.isnan(found.usage[2, 1])
    assert found.fixed == 0.5
    assert math.isnan(found.reference)


def test_the_unquantized_model_where_the_file_tells(tmp_path):
    text = BY_LAYER + "a,w16,10\nb,w16,20\nc,w16,30\n"
    assert look(tmp_path, text, fixed_s=1.0).reference == 61


def test_by_shape_serves_every_layer_of_that_shape(tmp_path):
    text = "kind,weight_shape,macs,precision,latency_s\nlinear,8x4,100,w4,1\nlinear,8x4,100,w8,2\n"
    twins = [LAYERS[0], mps.Layer("twin", "linear", (8, 4), 100)]
    assert look(tmp_path, text, twins).usage.tolist() == [[1, 2], [1, 2]]


def test_interpolation_is_exact_at_the_points_and_linear_between(tmp_path):
    text = "layer,precision,latency_s\na,w4,1\na,w8,3\nc,w4,7\nc,w8,3\n"
    with pytest.raises(mps.TableError, match=r"no latency_s of 'b' at w4 \(layer 'b'\); measure it"):
        look(tmp_path, text)
    assert look(tmp_path, text, interpolate=True).usage.tolist() == [[1, 3], [3, 3], [7, 3]]  # a third of the way
    shapes = (
        "kind,weight_shape,macs,precision,latency_s\nlinear,8x4,100,w4,1\nlinear,8x16,400,w4,7\nconv2d,8x16,200,w4,99\n"
    )
    assert look(tmp_path, shapes, options=OPTIONS[:1], interpolate=True).usage.tolist() == [[1], [3], [7]]


def test_no_guess_beyond_the_points(tmp_path):
    text = "layer,precision,latency_s\na,w4,1\nb,w4,7\n"
    with pytest.raises(
        mps.TableError, match="layer 'c' at w4 needs a linear of 400 MACs; those of the file: 100 to 200"
    ):
        look(tmp_path, text, options=OPTIONS[:1], interpolate=True)
    with pytest.raises(mps.TableError, match="those of the file: none"):
        look(tmp_path, text, options=OPTIONS[1:], interpolate=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns none; expected layer,precision,latency_s or kind"),
        ("layer,bits,latency_s\n", "columns layer,bits,latency_s"),
        (BY_LAYER + "d,w4,1\n", "'d' is no layer of the decisions"),
        (BY_LAYER + "a,w4,1\n", "line 8: a at w4 occurs twice"),
        (BY_LAYER + "a,w99,1\n", "line 8: an integer format of 99 bits"),
        (BY_LAYER + "a,w4\n", "line 8"),
        (BY_LAYER + "a,w16,-1\n", "line 8: a,w16,-1; expected layer,precision,latency_s with 0 or more seconds"),
        (BY_LAYER + "a,w16,fast\n", "line 8: could not convert"),
        ("kind,weight_shape,macs,precision,latency_s\nlinear,8*4,1,w4,1\n", "line 2: invalid literal"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    with pytest.raises(mps.TableError, match=message):
        look(tmp_path, text)
