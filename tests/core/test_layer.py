"""The decision that a layer belongs to."""

import mpsearch as mps


def test_a_group_that_is_called_like_a_layer_is_another_decision() -> None:
    layers = (mps.Layer("a", group="b"), mps.Layer("b"), mps.Layer("c", group="b"))
    assert layers[0].decision == layers[2].decision != layers[1].decision
    sensitivity = [[5.0, 0.0], [1.0, 0.0], [5.0, 0.0]]
    usage = {"memory_bytes": [[1.0, 2.0], [1.0, 4.0], [1.0, 2.0]]}
    table = mps.CostTable(layers, mps.precisions("w2 w4"), sensitivity, usage=usage)
    plan = mps.solve(table, mps.Budget(memory_bytes=5.0)).plan
    assert {name: str(precision) for name, precision in plan.layers.items()} == {"a": "w4", "b": "w2", "c": "w4"}
