import json
from collections.abc import Sequence

import pytest

from echoatt_hf.configuration_echoatt import check_layer_plan
from echoatt_hf.planning.sharing import SharingPlan, count_echo_layers


pytestmark = pytest.mark.once

# Five sliding layers, then one full, as in gemma-3-1b.
GEMMA3_1B = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(26)]
ALTERNATING = ["sliding_attention", "full_attention"] * 6


def echoes_of(sources: Sequence[int]) -> list[int]:
    return [layer for layer in range(len(sources)) if sources[layer] != layer]


def block_sizes(plan: SharingPlan) -> list[int]:
    return [len(block) for block in plan.blocks]


# Reading a plan


def test_roles_of_layers():
    plan = SharingPlan([0, 1, 1, 1, 4, 5, 5])
    assert plan.echo_layers == [2, 3, 6]
    assert plan.source_layers == [1, 5]
    assert plan.plain_layers == [0, 4]
    assert plan.blocks == [[1, 2, 3], [5, 6]]
    assert plan.ratio == pytest.approx(3 / 7)


def test_is_a_sequence_of_sources():
    plan = SharingPlan([0, 1, 1, 3])
    assert list(plan) == [0, 1, 1, 3]
    assert len(plan) == 4
    assert plan[2] == plan[-2] == 1
    assert plan == SharingPlan((0, 1, 1, 3))
    assert hash(plan) == hash(SharingPlan((0, 1, 1, 3)))
    assert plan != SharingPlan([0, 1, 2, 3])


def test_cannot_be_changed():
    sources = [0, 1, 1, 3]
    plan = SharingPlan(sources)
    sources[2] = 2
    assert list(plan) == [0, 1, 1, 3]
    with pytest.raises(AttributeError):
        plan.echo_sources = (0, 1, 2, 3)


def test_str():
    assert str(SharingPlan([0, 1, 1, 1, 4])) == "0 1 2→1 3→1 4  (2 of 5 layers echo)"


@pytest.mark.parametrize(
    ("sources", "layer_types", "message"),
    [
        ([0, 2, 2], None, r"echo_sources\[1\] is 2; a layer can echo itself or an earlier layer"),
        ([0, 0, 1], None, r"layer 1 is itself an echo of layer 0"),
        ([0, 1.0, 2], None, r"echo_sources\[1\] is 1.0; it must be a layer index"),
        ([0, True, 2], None, r"echo_sources\[1\] is True; it must be a layer index"),
        ([0, 0], ["sliding_attention", "full_attention"], r"an echo must have the type of its source"),
        ([0, 0, 2], ["full_attention"] * 2, r"layer_types has 2 entries for a plan of 3 layers"),
    ],
    ids=["forward", "chain", "float", "bool", "types", "types-length"],
)
def test_bad_plan(sources, layer_types, message):
    with pytest.raises(ValueError, match=message):
        SharingPlan(sources, layer_types)


# JSON


def test_json_round_trip(tmp_path):
    plan = SharingPlan([0, 1, 1, 1, 4])
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    assert SharingPlan.from_json(path) == plan
    assert SharingPlan.from_json(str(path)) == plan
    assert json.loads(plan.to_json()) == {
        "num_layers": 5,
        "echo_sources": [0, 1, 1, 1, 4],
        "echo_layers": [2, 3],
        "source_layers": [1],
        "plain_layers": [0, 4],
        "ratio": 0.4,
    }


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[0, 1, 1]",
        "{}",
        '{"echo_sources": 3}',
        '{"echo_sources": null}',
        '{"echo_sources": ["a"]}',
        "\xff",
    ],
    ids=["text", "list", "no-field", "number", "null", "strings", "not-utf8"],
)
def test_from_json_of_something_else(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="sharing plan|layer index"):
        SharingPlan.from_json(path)


# From a ratio or block size


@pytest.mark.parametrize(("ratio", "echoes"), [(0.23, 5), (0.41, 9), (0.77, 17)])
def test_ratios_of_22_layers(ratio, echoes):
    plan = SharingPlan.from_ratio(22, ratio)
    assert len(plan.echo_layers) == echoes
    assert {0, 21} <= set(plan.plain_layers)
    assert list(plan.echo_sources) == sorted(plan.echo_sources)  # consecutive blocks


def test_ratio_is_spread_over_even_blocks_in_the_centre():
    assert SharingPlan.from_ratio(22, 0.23).blocks == [[6, 7], [8, 9], [10, 11], [12, 13], [14, 15]]
    # 9 echo layers of 20 inner layers still fit as pairs, 13 need seven sources.
    assert block_sizes(SharingPlan.from_ratio(22, 0.41)) == [2] * 9
    assert block_sizes(SharingPlan.from_ratio(22, 13 / 22)) == [3] * 6 + [2]
    assert block_sizes(SharingPlan.from_ratio(22, 0.77)) == [7, 7, 6]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"block_size": 2}, [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]),
        ({"block_size": 4}, [[2, 3, 4, 5], [6, 7, 8, 9]]),
        ({"block_size": 10}, [list(range(1, 11))]),
        ({"block_size": 4, "ratio": 5 / 12}, [[2, 3, 4, 5], [6, 7, 8]]),
        ({"block_size": 3, "protected_layers": 3}, [[3, 4, 5], [6, 7, 8]]),
        ({"block_size": 6, "protected_layers": 0}, [list(range(6)), list(range(6, 12))]),
    ],
    ids=["pairs", "fours", "one-block", "last-one-shorter", "protected", "nothing-protected"],
)
def test_block_size(kwargs, expected):
    assert SharingPlan.from_ratio(12, **kwargs).blocks == expected


@pytest.mark.parametrize("num_layers", [4, 5, 8, 12, 22, 28, 41])
@pytest.mark.parametrize("protected_layers", [0, 1, 3])
def test_every_possible_ratio(num_layers, protected_layers):
    """All ratios in steps of 0.02: the number of echo layers is right and the blocks are even, or an error says why."""
    inner = num_layers - 2 * protected_layers
    made = 0
    for percent in range(2, 100, 2):
        ratio = percent / 100
        echoes = round(num_layers * ratio)
        if not 1 <= echoes <= inner - 1:
            with pytest.raises(ValueError, match="ratio|to share"):
                SharingPlan.from_ratio(num_layers, ratio, protected_layers=protected_layers)
            continue
        plan = SharingPlan.from_ratio(num_layers, ratio, protected_layers=protected_layers)
        made += 1
        check_layer_plan(list(plan), num_layers)
        assert len(plan) == num_layers
        assert len(echoes_of(plan)) == echoes
        ends = {*range(protected_layers), *range(num_layers - protected_layers, num_layers)}
        assert ends <= set(plan.plain_layers)
        assert all(block == list(range(block[0], block[-1] + 1)) for block in plan.blocks)
        sizes = block_sizes(plan)
        assert len(sizes) == min(echoes, inner - echoes)
        assert max(sizes) - min(sizes) <= 1
        before = plan.blocks[0][0] - protected_layers
        after = num_layers - protected_layers - 1 - plan.blocks[-1][-1]
        assert 0 <= after - before <= 1
    assert made > 0 or inner < 2


@pytest.mark.parametrize("layer_types", [GEMMA3_1B, ALTERNATING], ids=["gemma3-1b", "alternating"])
@pytest.mark.parametrize("ratio", [0.1, 0.23, 0.41, 0.6])
def test_ratio_with_mixed_layer_types(layer_types, ratio):
    plan = SharingPlan.from_ratio(len(layer_types), ratio, layer_types=layer_types)
    assert len(plan.echo_layers) == round(len(layer_types) * ratio)
    assert {0, len(layer_types) - 1} <= set(plan.plain_layers)
    assert plan.layer_types == tuple(layer_types)
    check_layer_plan(list(plan), len(layer_types), layer_types)
    inner = range(1, len(layer_types) - 1)
    for block in plan.blocks:
        kind = layer_types[block[0]]
        same = [layer for layer in inner if layer_types[layer] == kind]
        start = same.index(block[0])
        assert block == same[start : start + len(block)]  # consecutive among the layers of its type


@pytest.mark.parametrize("layer_types", [GEMMA3_1B, ALTERNATING], ids=["gemma3-1b", "alternating"])
@pytest.mark.parametrize("block_size", [2, 3, 4, 5])
def test_block_size_with_mixed_layer_types(layer_types, block_size):
    """As many whole blocks as fit in each type of layers."""
    plan = SharingPlan.from_ratio(len(layer_types), block_size=block_size, layer_types=layer_types)
    assert set(block_sizes(plan)) == {block_size}
    for kind in set(layer_types):
        inner = layer_types[1:-1].count(kind)
        assert sum(layer_types[block[0]] == kind for block in plan.blocks) == inner // block_size


@pytest.mark.parametrize(
    ("num_layers", "kwargs", "message"),
    [
        (12, {}, "Give a ratio, a block_size, or both"),
        (12, {"ratio": 0.0}, "ratio is 0.0; it must be between 0 and 1"),
        (12, {"ratio": 1.0}, "ratio is 1.0; it must be between 0 and 1"),
        (12, {"ratio": 41}, "ratio is 41; it must be between 0 and 1"),
        (12, {"ratio": 0.01}, "ratio 0.01 is under half a layer of 12: the smallest possible is 0.083"),
        (12, {"ratio": 0.9}, "ratio 0.9 of 12 layers is 11 echo layers, but at most 0.750, 9 layers can echo"),
        (12, {"block_size": 1}, "block_size is 1; it must be at least 2"),
        (12, {"block_size": 11}, "A block of 11 layers does not fit: 12 layers .* leave at most 10 inner layers"),
        (12, {"ratio": 0.7, "block_size": 2}, "8 echo layers in blocks of 2 need 16 layers, but only 10 inner"),
        (12, {"ratio": 0.4, "protected_layers": -1}, "protected_layers is -1; it must be 0 or more"),
        (12, {"ratio": 0.4, "protected_layers": 6}, "12 layers with 6 protected at either end leave 0 to share"),
        (3, {"ratio": 0.4}, "3 layers with 1 protected at either end leave 1 to share"),
        (4, {"ratio": 0.4, "layer_types": ["a", "a", "b", "b"]}, "is 2 echo layers, but no layer can echo here"),
        (8, {"ratio": 0.4, "layer_types": ["a"] * 3}, "layer_types has 3 entries"),
        (8, {"ratio": 0.4, "layer_types": ["a"] * 9}, "layer_types has 9 entries"),
    ],
)
def test_impossible(num_layers, kwargs, message):
    with pytest.raises(ValueError, match=message):
        SharingPlan.from_ratio(num_layers, **kwargs)


@pytest.mark.parametrize(("num_layers", "ratio", "echoes"), [(22, 0.41, 9), (22, 0.0228, 1), (32, 0.5, 16)])
def test_count_echo_layers(num_layers, ratio, echoes):
    assert count_echo_layers(num_layers, ratio, capacity=num_layers - 3) == echoes
    with pytest.raises(ValueError, match=f"at most {(echoes - 1) / num_layers:.3f}|no layer can echo"):
        count_echo_layers(num_layers, ratio, capacity=echoes - 1)


HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 3


def test_layers_without_attention_stay_plain():
    plan = SharingPlan.from_ratio(12, 0.1, layer_types=HYBRID)
    assert plan.echo_layers == [7]
    assert plan.source_layers == [3]
    with pytest.raises(ValueError, match="ratio 0.41 of 12 layers is 5 echo layers, but at most 0.083, 1 layers can"):
        SharingPlan.from_ratio(12, 0.41, layer_types=HYBRID)
    with pytest.raises(
        ValueError, match="None of the inner layers has attention to share; their types are conv, conv"
    ):
        SharingPlan.from_ratio(4, 0.3, layer_types=["full_attention", "conv", "conv", "full_attention"])
    with pytest.raises(ValueError, match=r"echo_sources\[2\] is 1, but these layers are of type 'linear_attention'"):
        SharingPlan([0, 1, 1, 3], HYBRID[:4])
