import itertools
from collections.abc import Iterator

import pytest
import torch

from echoatt_hf.configuration_echoatt import check_echo_sources
from echoatt_hf.planning.rules import plan_from_similarity
from echoatt_hf.planning.sharing import SharingPlan


def random_similarity(num_layers: int, seed: int = 0) -> torch.Tensor:
    """Not symmetric, so that a mix-up of echo and source shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_layers, num_layers, generator=generator, dtype=torch.float64)


def all_block_plans(layers: list[int]) -> Iterator[dict[int, int]]:
    """Every way to cut `layers` into consecutive blocks, as a map of echoes to sources."""
    for cuts in itertools.product([False, True], repeat=max(len(layers) - 1, 0)):
        sources, source = {}, layers[0] if layers else None
        for layer, cut in zip(layers[1:], cuts, strict=True):
            if cut:
                source = layer
            else:
                sources[layer] = source
        yield sources


def all_plans(
    num_layers: int, protected: int, layer_types: list[str] | None = None
) -> Iterator[list[tuple[int, int]]]:
    """Pairs of echo and source of every plan whose blocks are consecutive among the inner layers of a type."""
    kinds = layer_types or ["any"] * num_layers
    inner = range(protected, num_layers - protected)
    groups = [[layer for layer in inner if kinds[layer] == kind] for kind in dict.fromkeys(kinds[i] for i in inner)]
    for parts in itertools.product(*(list(all_block_plans(group)) for group in groups)):
        yield [pair for part in parts for pair in part.items()]


def pairs_of(plan: SharingPlan) -> list[tuple[int, int]]:
    return [(echo, source) for echo, source in enumerate(plan) if echo != source]


def total(similarity: torch.Tensor, pairs: list[tuple[int, int]], offset: float = 0.0) -> float:
    return sum(float(similarity[echo, source]) - offset for echo, source in pairs)


CASES = [
    (4, 1, None),
    (7, 1, None),
    (9, 1, None),
    (6, 0, None),
    (10, 2, None),
    (9, 1, ["a", "b", "b", "a", "b", "a", "a", "b", "a"]),
    (8, 1, ["a", "a", "b", "a", "a", "b", "a", "a"]),
]
IDS = ["4", "7", "9", "unprotected", "two-protected", "mixed-types", "two-of-a-type"]


@pytest.mark.parametrize(("num_layers", "protected", "layer_types"), CASES, ids=IDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_best_plan_at_every_ratio(num_layers, protected, layer_types, seed):
    similarity = random_similarity(num_layers, seed)
    plans = list(all_plans(num_layers, protected, layer_types))
    most = max(len(pairs) for pairs in plans)
    for echoes in range(1, most + 1):
        plan = plan_from_similarity(
            similarity.tolist(), ratio=echoes / num_layers, protected_layers=protected, layer_types=layer_types
        )
        check_echo_sources(list(plan), num_layers, layer_types)
        assert len(plan.echo_layers) == echoes
        found = pairs_of(plan)
        assert sorted(found) in [sorted(pairs) for pairs in plans]
        best = max(total(similarity, pairs) for pairs in plans if len(pairs) == echoes)
        assert total(similarity, found) == pytest.approx(best)
    with pytest.raises(ValueError, match="can echo here|between 0 and 1"):
        plan_from_similarity(
            similarity, ratio=(most + 1) / num_layers, protected_layers=protected, layer_types=layer_types
        )


@pytest.mark.parametrize(("num_layers", "protected", "layer_types"), CASES, ids=IDS)
@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.6])
def test_best_plan_at_a_threshold(num_layers, protected, layer_types, threshold):
    similarity = random_similarity(num_layers, seed=int(threshold * 10))
    plans = [
        pairs
        for pairs in all_plans(num_layers, protected, layer_types)
        if all(similarity[echo, source] >= threshold for echo, source in pairs)
    ]
    if not any(plans):
        with pytest.raises(ValueError, match="Lower the threshold"):
            plan_from_similarity(similarity, threshold=threshold, protected_layers=protected, layer_types=layer_types)
        return
    plan = plan_from_similarity(similarity, threshold=threshold, protected_layers=protected, layer_types=layer_types)
    found = pairs_of(plan)
    assert sorted(found) in [sorted(pairs) for pairs in plans]
    best = max(total(similarity, pairs, threshold) for pairs in plans)
    assert total(similarity, found, threshold) == pytest.approx(best)


def test_reads_the_row_of_the_echo_and_the_column_of_the_source():
    similarity = torch.zeros(6, 6)
    similarity[3, 2] = 1.0  # layer 3 is like layer 2
    similarity[1, 2] = similarity[2, 1] = 0.5
    assert list(plan_from_similarity(similarity, ratio=1 / 6)) == [0, 1, 2, 2, 4, 5]


def test_greedy_would_fail():
    """The best pair alone (2 with 1) spoils the best two."""
    similarity = torch.zeros(6, 6)
    similarity[2, 1], similarity[3, 1] = 0.9, 0.0
    similarity[3, 2], similarity[4, 2] = 0.8, 0.8
    assert list(plan_from_similarity(similarity, ratio=1 / 6)) == [0, 1, 1, 3, 4, 5]
    assert list(plan_from_similarity(similarity, ratio=2 / 6)) == [0, 1, 2, 2, 2, 5]


def test_accepts_lists_and_tensors():
    similarity = random_similarity(8)
    plans = [
        plan_from_similarity(matrix, ratio=0.4) for matrix in (similarity, similarity.tolist(), similarity.float())
    ]
    assert plans[0] == plans[1] == plans[2]
    assert isinstance(plans[0], SharingPlan)


def test_layer_types_are_kept_in_the_plan():
    kinds = ["a", "a", "b", "a", "a", "b", "a", "a"]
    assert plan_from_similarity(random_similarity(8), ratio=0.3, layer_types=kinds).layer_types == tuple(kinds)


def test_no_echo_is_under_the_threshold_for_the_sake_of_others():
    similarity = torch.zeros(6, 6)
    similarity[2, 1], similarity[3, 1], similarity[4, 3] = 0.48, 0.9, 0.6
    assert list(plan_from_similarity(similarity, threshold=0.5)) == [0, 1, 2, 3, 3, 5]


def test_threshold_that_is_met_exactly():
    """At least that similar: equality is enough."""
    plan = plan_from_similarity(torch.ones(6, 6), threshold=1.0)
    assert len(plan.echo_layers) >= 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "Give either a ratio or a threshold"),
        ({"ratio": 0.4, "threshold": 0.5}, "Give either a ratio or a threshold"),
        ({"ratio": 0.9}, "ratio 0.9 of 8 layers is 7 echo layers, but at most 0.625, 5 layers can echo"),
        ({"ratio": 1.2}, "ratio is 1.2; it must be between 0 and 1"),
        ({"ratio": 0.4, "protected_layers": 4}, "8 layers with 4 protected at either end leave 0 to share"),
        ({"threshold": 1.5}, r"No layer is at least 1.5 similar .* has 0\.\d{3}. Lower the threshold"),
        ({"ratio": 0.4, "layer_types": ["a"] * 3}, "layer_types has 3 entries"),
        ({"ratio": 0.4, "layer_types": ["a"] * 9}, "layer_types has 9 entries"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        plan_from_similarity(random_similarity(8), **kwargs)


def test_threshold_without_two_layers_of_a_type():
    with pytest.raises(ValueError, match="(?i)layer"):
        plan_from_similarity(torch.ones(4, 4), threshold=0.5, layer_types=["a", "a", "b", "b"])
