import itertools
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig

from echoatt_hf import plan_like_paper
from echoatt_hf.analysis.ranking import find_kept_layers, mean_similarities
from echoatt_hf.analysis.similarity import AttentionSimilarity
from echoatt_hf.configuration_echoatt import check_layer_plan
from echoatt_hf.planning.from_settings import make_plan
from echoatt_hf.planning.rules import plan_from_similarity
from echoatt_hf.planning.sharing import SharingPlan
from echoatt_hf.settings import PlanSettings


pytestmark = pytest.mark.once


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
        check_layer_plan(list(plan), num_layers, layer_types)
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


# The paper's plans.


def similarity_of_means(means: list[float]) -> list[list[float]]:
    """A matrix whose rows rank as `means` do, and whose mean similarities they are but for a common factor and constant."""
    return [[1.0 if i == j else (a + b) / 2 for j, b in enumerate(means)] for i, a in enumerate(means)]


# Figure 1 of the paper, read off, and what lies between; table 6 ranks the layers 2 5 4 3 7 6 18 9 8 11 12 1 17 10 14 13 16.
RANKING = [2, 5, 4, 3, 7, 6, 18, 9, 8, 11, 12, 1, 17, 10, 14, 13, 16]
TINYLLAMA_MEANS = {layer: 0.78 - 0.004 * place for place, layer in enumerate(RANKING)}
TINYLLAMA_MEANS |= {15: 0.69, 19: 0.69, 20: 0.34, 21: 0.31, 0: 0.16}
FIGURE_1 = similarity_of_means([TINYLLAMA_MEANS[layer] for layer in range(22)])


def test_mean_similarity_leaves_out_the_layer_itself_and_layers_without_attention():
    matrix = [[1.0, 0.5, 0.0, 0.1], [0.5, 1.0, 0.0, 0.3], [0.0] * 4, [0.1, 0.3, 0.0, 1.0]]
    assert mean_similarities(matrix) == pytest.approx([0.3, 0.4, 0.0, 0.2])


@pytest.mark.parametrize(
    ("means", "kept"),
    [
        ([0.1, 0.7, 0.8, 0.75, 0.72, 0.2], [0, 5]),
        ([0.8, 0.7, 0.75, 0.72, 0.71, 0.2], [5]),
        ([0.1, 0.7, 0.2, 0.75, 0.8, 0.72], [0]),
        ([0.1, 0.15, 0.7, 0.2, 0.75, 0.8, 0.72], [0, 1]),
        ([0.7, 0.75, 0.2, 0.75, 0.8, 0.72], []),
        ([0.9, 0.3, 0.31, 0.32, 0.33, 0.2], [5]),
        ([0.5] * 6, []),
    ],
    ids=[
        "both-ends",
        "last",
        "an-inner-outlier-is-not-kept",
        "two-and-an-inner-one",
        "an-inner-outlier-alone",
        "not-all-but-one",
        "no-gap",
    ],
)
def test_kept_layers_are_first_or_last(means, kept):
    assert find_kept_layers(similarity_of_means(means)) == kept


def test_figure_1_gives_table_6():
    """The ranking cut at three lengths, and the layers that the paper keeps."""
    assert find_kept_layers(FIGURE_1) == [0, 20, 21]
    for count in (5, 9, 17):
        assert plan_like_paper(FIGURE_1, count / 22).echo_layers == sorted(RANKING[:count])


def test_an_echo_has_the_nearest_earlier_layer_that_is_none():
    plan = plan_like_paper(FIGURE_1, 0.41)
    assert list(plan) == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, *range(10, 18), 17, 19, 20, 21]


def test_kept_layers_do_not_echo_at_any_ratio():
    for count in range(1, 20):
        assert not {0, 20, 21} & {*plan_like_paper(FIGURE_1, count / 22).echo_layers}
    with pytest.raises(
        ValueError, match=r"is 20 echo layers, but .* 19 layers can echo: the layers \[0, 20, 21\] are kept"
    ):
        plan_like_paper(FIGURE_1, 20 / 22)


def test_the_first_layer_has_no_source():
    """However like the others it is."""
    plan = plan_like_paper(similarity_of_means([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), 2 / 6)
    assert list(plan) == [0, 0, 0, 3, 4, 5]


def test_blocks_of_k_between_the_kept_layers():
    """Layers 1 to 19 share in blocks; what is left over stays plain."""
    assert plan_like_paper(FIGURE_1, block_size=4).blocks == [
        [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]
    ]  # fmt: skip
    assert plan_like_paper(FIGURE_1, block_size=19).blocks == [[*range(1, 20)]]
    with pytest.raises(ValueError, match="A block of 20 layers does not fit: 19 of 22 layers can share"):
        plan_like_paper(FIGURE_1, block_size=20)


def test_paper_with_mixed_layer_types():
    kinds = ["a", "a", "b", "a", "b", "linear_attention", "a", "b"]
    matrix = similarity_of_means([0.50, 0.51, 0.58, 0.53, 0.57, 0.59, 0.55, 0.56])
    matrix[5] = [0.0] * 8  # a layer without attention
    for row in matrix:
        row[5] = 0.0
    plan = plan_like_paper(matrix, 3 / 8, layer_types=kinds)
    assert list(plan) == [0, 1, 2, 3, 2, 5, 3, 2]  # 2 is the first of its type
    assert plan.layer_types == tuple(kinds)
    assert plan_like_paper(matrix, block_size=2, layer_types=kinds).blocks == [[2, 4], [3, 6]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "Give either a ratio or a block_size"),
        ({"ratio": 0.4, "block_size": 2}, "Give either a ratio or a block_size"),
        ({"ratio": 1.2}, "ratio is 1.2; it must be between 0 and 1"),
        ({"ratio": 0.01}, "ratio 0.01 is under half a layer of 22"),
        ({"block_size": 1}, "block_size is 1; it must be at least 2"),
        ({"ratio": 0.4, "layer_types": ["a"] * 3}, "layer_types has 3 entries"),
    ],
)
def test_errors_of_the_paper_s_plan(kwargs, message):
    with pytest.raises(ValueError, match=message):
        plan_like_paper(FIGURE_1, **kwargs)


TINYLLAMA = LlamaConfig(
    num_hidden_layers=22, hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4
)
LLAMA_160M = LlamaConfig(num_hidden_layers=12, hidden_size=768, intermediate_size=3072, num_attention_heads=12)
# As it is printed in table 6, and the nearest earlier layers that are not in the list.
PRINTED = [
    (TINYLLAMA, 0.23, {2: 1, 5: 1, 4: 1, 3: 1, 7: 6}),
    (TINYLLAMA, 0.41, {2: 1, 5: 1, 4: 1, 3: 1, 7: 1, 6: 1, 18: 17, 9: 1, 8: 1}),
    (TINYLLAMA, 0.77, {**dict.fromkeys(range(1, 15), 0), 16: 15, 17: 15, 18: 15}),
    (LLAMA_160M, 0.33, {4: 3, 6: 5, 8: 7, 10: 9}),
]


@pytest.mark.parametrize(("config", "ratio", "pairs"), PRINTED, ids=["tiny-23", "tiny-41", "tiny-77", "160m-33"])
def test_published_plans_whatever_is_measured(config, ratio, pairs):
    random = random_similarity(config.num_hidden_layers)
    measured = AttentionSimilarity(None, 1, random, random)
    for similarity in (None, measured):
        plan = make_plan(PlanSettings(plan="paper", ratio=ratio), config, similarity)
        assert dict(pairs_of(plan)) == pairs


def test_other_models_and_ratios_are_measured():
    matrix = torch.tensor(FIGURE_1)
    measured = AttentionSimilarity(None, 1, torch.rand(22, 22), matrix)
    other = LlamaConfig(num_hidden_layers=22, hidden_size=1024, num_attention_heads=16)
    for config, settings in (
        (other, PlanSettings(plan="paper", ratio=0.41)),
        (TINYLLAMA, PlanSettings(plan="paper", ratio=0.5)),
        (TINYLLAMA, PlanSettings(plan="paper", block_size=4)),
    ):
        with pytest.raises(ValueError, match="The plan 'paper' needs a measured similarity: run `echoatt analyze`"):
            make_plan(settings, config)
        size = {"block_size": 4} if settings.block_size else {"ratio": settings.ratio}
        assert make_plan(settings, config, measured) == plan_like_paper(matrix.tolist(), **size)


def test_spread_is_the_name_of_evenly_spread_blocks():
    """Its former name still works."""
    plans = [make_plan(PlanSettings(plan=name, ratio=0.41), TINYLLAMA) for name in ("spread", "blocks")]
    assert plans[0] == plans[1] == SharingPlan.from_ratio(22, 0.41)


def test_command_line_prints_the_published_lists(tmp_path):
    """From the configuration alone: there are no weights, and nothing is measured."""
    from typer.testing import CliRunner

    from echoatt_hf.cli.app import app

    TINYLLAMA.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--plan", "paper", "--ratio", "0.23"])
    assert result.exit_code == 0, result.output
    assert "0 1 2→1 3→1 4→1 5→1 6 7→6 8 9" in result.output and "(5 of 22 layers echo)" in result.output
