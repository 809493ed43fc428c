"""What dotted names say: which are of equal layers, and in which order they come."""

from __future__ import annotations

import pytest

from dak_inductor.tensor_names import natural, role


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.10.mlp.down_proj.weight", "model.layers.*.mlp.down_proj.weight"),
        ("0.down.weight", "*.down.weight"),
        ("h.3", "h.*"),
        ("7", "*"),
        ("layers.0.experts.11.w2", "layers.*.experts.*.w2"),
        ("blocks.0.1.2.weight", "blocks.*.*.*.weight"),
        ("", ""),
    ],
)
def test_a_number_that_is_a_whole_part_is_that_of_a_block(name: str, wanted: str) -> None:
    assert role(name) == wanted


@pytest.mark.parametrize("name", ["fc1.weight", "decoder.conv2", "h0.w", "a.2b", "linear_12"])
def test_other_numbers_tell_apart_what_one_block_has(name: str) -> None:
    assert role(name) == name


def test_layers_sort_by_their_numbers() -> None:
    names = [f"layers.{layer}.{part}" for layer in range(12) for part in ("fc1", "fc2")]
    assert sorted(sorted(names), key=natural) == names
