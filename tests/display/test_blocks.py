"""Blocks of layers, against what must hold of any list of names."""

import pytest

from mpsearch.display.blocks import MOST, blocks

LLAMA = [f"model.layers.{i}.{part}" for i in range(126) for part in ("attn.q", "attn.k", "mlp.up", "mlp.down")]
FAMILIES = {
    "one": ["fc"],
    "flat": [f"conv{i}" for i in range(1000)],
    "numbers": [str(i) for i in range(0, 300, 3)],
    "llama": ["model.embed", *LLAMA, "lm_head"],
    "experts": [f"layers.{i}.mlp.experts.{e}.w{w}" for i in range(24) for e in range(8) for w in (1, 2, 3)],
    "resnet": ["conv1", *(f"layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in range(12) for c in (1, 2)), "fc"],
    "two halves": [f"{half}.layers.{i}.fc" for half in ("encoder", "decoder") for i in range(30)],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("most", [5, MOST])
def test_blocks_hold_every_layer_once_and_are_few(family, most):
    names = FAMILIES[family]
    found = blocks(names, most)
    assert [place for block in found for place in range(block.start, block.stop)] == list(range(len(names)))
    assert len(found) <= most
    assert len({block.label for block in found}) == len(found)
    for block in found:
        assert names[block.start].startswith(block.label.split(" … ")[0])
    if len(names) <= most:
        assert [block.label for block in found] == names
