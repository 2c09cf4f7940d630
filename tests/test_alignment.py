"""Head alignment: the best order, folded into the weights exactly."""

import itertools

import pytest
import torch
from conftest import make_batch, make_teacher, plan_of

from echoatt_hf import AttentionSimilarity, EchoAttForCausalLM, align_heads
from echoatt_hf.conversion.alignment import count_heads, count_kv_heads, match_heads, permute_heads
from echoatt_hf.modeling_echoatt import AttentionRecord, EchoRecords
from echoatt_hf.models.families import find_attention_modules


pytestmark = pytest.mark.once

# Linear and transposed projections, biases, fused values, gates for each feature and for each head, one head of values.
LAYOUTS = ["llama", "gpt2", "gpt_neox", "phi", "phi3", "afmoe", "qwen3_5_text", "gpt_bigcode"]


def first_echo(family):
    student = EchoAttForCausalLM.from_teacher(make_teacher(family, attention=None), plan_of(family))
    return find_attention_modules(student.language_model)[student.config.echo_layers[0]]


def some_order(attention):
    """An order that moves groups and heads in them."""
    heads, groups = count_heads(attention), count_kv_heads(attention)
    size = heads // groups
    return [group * size + head for group in reversed(range(groups)) for head in [*range(1, size), 0]]


@pytest.mark.parametrize(("groups", "size"), [(1, 4), (2, 2), (4, 1), (3, 2)])
def test_match_is_the_best_of_all_orders(groups, size):
    torch.manual_seed(groups)
    similarity = torch.rand(groups * size, groups * size, dtype=torch.float64)
    orders = [
        [group * size + head for group, inner in zip(outer, inners, strict=True) for head in inner]
        for outer in itertools.permutations(range(groups))
        for inners in itertools.product(itertools.permutations(range(size)), repeat=groups)
    ]
    totals = [sum(similarity[place, head].item() for place, head in enumerate(order)) for order in orders]
    best = match_heads(similarity, groups)
    assert best in orders
    assert sum(similarity[place, head].item() for place, head in enumerate(best)) == pytest.approx(max(totals))


@pytest.mark.parametrize("family", LAYOUTS)
def test_there_and_back_is_the_identity(family):
    echo = first_echo(family)
    before = {name: value.clone() for name, value in echo.state_dict().items()}
    order = some_order(echo)
    permute_heads(echo, order)
    changed = [name for name, value in echo.state_dict().items() if not torch.equal(value, before[name])]
    assert changed or len(order) == 1
    permute_heads(echo, [order.index(head) for head in range(len(order))])
    assert all(torch.equal(value, before[name]) for name, value in echo.state_dict().items())


@pytest.mark.parametrize("family", LAYOUTS)
def test_heads_and_attention_in_another_order_give_the_same(family):
    """Moving the heads of the layer and of the attention it reuses together changes nothing."""
    echo = first_echo(family)
    order = some_order(echo)
    heads, groups = count_heads(echo), count_kv_heads(echo)
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, echo.v_proj.in_features)
    query, key = (torch.randn(2, count, 5, echo.echo_head_dim) for count in (heads, groups))
    moved_groups = [order[place] // (heads // groups) for place in range(0, heads, heads // groups)]
    outputs = []
    for record in (
        AttentionRecord("eager", query, key, None, {"scaling": 1.0}),
        AttentionRecord("eager", query[:, order], key[:, moved_groups], None, {"scaling": 1.0}),
    ):
        records = EchoRecords()
        records.by_layer[echo.echo_source] = record
        outputs.append(echo(hidden, echo_records=records)[0])
        permute_heads(echo, order)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert outputs[0].abs().max() > 1e-3


def test_align_finds_the_order_and_leaves_the_teacher(tiny_teacher):
    student = EchoAttForCausalLM.from_teacher(tiny_teacher, [0, 1, 1, 1, 4], share_weights=True)
    before = {name: value.clone() for name, value in tiny_teacher.state_dict().items()}
    heads = torch.zeros(5, 5, 4, 4, dtype=torch.float64)
    orders = {2: [3, 2, 0, 1], 3: [1, 0, 2, 3]}
    for layer, order in orders.items():
        for place, head in enumerate(order):
            heads[1, layer, place, head] = 1.0
    assert align_heads(student, AttentionSimilarity(heads, 1)) == orders
    assert all(torch.equal(value, before[name]) for name, value in tiny_teacher.state_dict().items())
    values = find_attention_modules(student.language_model)[2].v_proj.weight
    teachers = tiny_teacher.model.layers[2].self_attn.v_proj.weight
    torch.testing.assert_close(values, torch.cat(teachers.chunk(2)[::-1]), rtol=0, atol=0)
    assert not values.requires_grad  # as those it replaces
    student(**make_batch())


def test_bad_orders_and_similarities_are_refused(tiny_teacher):
    student = EchoAttForCausalLM.from_teacher(tiny_teacher, [0, 1, 1, 3, 4])
    echo = find_attention_modules(student.language_model)[2]
    with pytest.raises(ValueError, match=r"\[0, 0, 1, 2\] is no permutation of 4 heads"):
        permute_heads(echo, [0, 0, 1, 2])
    with pytest.raises(ValueError, match=r"\[0, 2, 1, 3\] separates heads that share their values: keep each 2"):
        permute_heads(echo, [0, 2, 1, 3])
    with pytest.raises(ValueError, match="of 3 layers and the student has 5"):
        align_heads(student, AttentionSimilarity(torch.zeros(3, 3, 4, 4), 1))
    with pytest.raises(ValueError, match="of 8 heads and layer 2 has 4"):
        align_heads(student, AttentionSimilarity(torch.zeros(5, 5, 8, 8), 1))
