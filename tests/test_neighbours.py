"""The neighbours: KVSharer, LaCo, DirectShare and PostShare, each against a slow plain version of its rule."""

import copy
import json
import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import FP32_TOLERANCE, make_batch, make_config, make_teacher, write_workplace
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

from echoatt_hf import (
    DistillationSettings,
    EchoAttConfig,
    EchoAttTrainingArguments,
    add_lora,
    collate_rows,
    count_kv_bytes_per_token,
)
from echoatt_hf.baselines.direct_share import (
    POST_SHARE_SETTINGS,
    HeadPair,
    PostShareTrainer,
    count_saved,
    direct_share,
    head_distance,
    make_shared_student,
    match_heads,
)
from echoatt_hf.baselines.kvsharer import measure_kv_distances, plan_like_kvsharer
from echoatt_hf.baselines.laco import LACO_PRESETS, collapse_layers, merge_layers
from echoatt_hf.cli.app import app
from echoatt_hf.conversion.student import make_student
from echoatt_hf.distillation.two_stages import train_two_stages
from echoatt_hf.pipeline.neighbours import make_by_method
from echoatt_hf.settings import MethodSettings, Target


pytestmark = pytest.mark.once

LLAMA_WEIGHTS = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
LLAMA_WEIGHTS += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


def make_rows(lengths=(12, 12, 7, 12)):
    return [
        {"input_ids": make_batch(1, length, seed=seed)["input_ids"][0].tolist()} for seed, length in enumerate(lengths)
    ]


@torch.no_grad()
def slow_similarity(teacher, changed, rows):
    """Cosine of the flattened hidden states after the final norm, row by row."""
    cosines = []
    for row in rows:
        states = [
            model(
                input_ids=torch.tensor([row["input_ids"]]), use_cache=False, output_hidden_states=True
            ).hidden_states[-1]
            for model in (teacher, changed)
        ]
        cosines.append(torch.cosine_similarity(*(each.flatten()[None] for each in states)).item())
    return sum(cosines) / len(cosines)


# KVSharer


@torch.no_grad()
def slow_kv_distances(model, rows, distance):
    """Averages of keys and values, and the distance of each pair of layers, head by head and position by position."""
    rows = [row["input_ids"] for row in rows if len(row["input_ids"]) == len(rows[0]["input_ids"])]
    caches = [DynamicCache() for _ in rows]  # of no configuration: all positions of all layers
    for row, cache in zip(rows, caches, strict=True):
        model(input_ids=torch.tensor([row]), past_key_values=cache, use_cache=True)
    count = len(caches[0].layers)
    keys = [sum(cache.layers[layer].keys[0] for cache in caches) / len(rows) for layer in range(count)]
    values = [sum(cache.layers[layer].values[0] for cache in caches) / len(rows) for layer in range(count)]
    found = {}
    for upper in range(count):
        for lower in range(upper):
            if distance == "paper":
                means = [(keys[layer].flatten() + values[layer].flatten()) / 2 for layer in (upper, lower)]
                found[upper, lower] = (means[0] - means[1]).square().sum().sqrt().item()
                continue
            heads, positions, _ = keys[0].shape
            total = 0.0
            for states in (keys, values):
                for head in range(heads):
                    for position in range(positions):
                        difference = states[upper][head, position] - states[lower][head, position]
                        total += difference.square().sum().sqrt().item() / (heads * positions)
            found[upper, lower] = total / 2
    return found


def slow_plan(sources):
    return [layer if sources[layer] == layer else f"kv {sources[layer]}" for layer in range(6)]


def slow_kvsharer(teacher, rows, count, order, threshold):
    """The walk as the code of its authors does it: a map of layers, and chains resolved from below."""
    distances = slow_kv_distances(teacher, rows, "code")
    ranked = sorted(distances, key=lambda pair: distances[pair])
    if order == "dissimilar":
        ranked.reverse()
    current, shared, tried = {layer: layer for layer in range(6)}, [], []
    for upper, lower in ranked:
        if upper in shared:
            continue
        candidate = {**current, upper: lower}
        for layer in range(6):
            if candidate[layer] != layer:
                candidate[layer] = candidate[candidate[layer]]
        changed = make_student(teacher, slow_plan(candidate))
        similarity = slow_similarity(teacher, changed, rows)
        tried.append((upper, candidate[upper], pytest.approx(similarity, abs=1e-5), similarity > threshold))
        if similarity > threshold:
            current = candidate
            shared.append(upper)
        if len(shared) >= count:
            break
    return slow_plan(current), tried


@pytest.mark.parametrize("distance", ["code", "paper"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_kv_distances_are_those_of_the_slow_rule(family, distance):
    model, rows = make_teacher(family), make_rows()
    assert measure_kv_distances(model, rows, distance) == pytest.approx(
        slow_kv_distances(model, rows, distance), rel=1e-4
    )


def test_kv_distances_of_layers_with_windows_are_of_all_positions_and_within_a_type():
    model, rows = make_teacher("gemma3_text"), make_rows((20, 20))
    assert model.config.sliding_window < 20
    expected = slow_kv_distances(model, rows, "code")
    pairs = [(upper, lower) for upper in range(6) for lower in range(upper) if (upper - lower) % 2 == 0]
    found = measure_kv_distances(model, rows)
    assert found == pytest.approx({pair: expected[pair] for pair in pairs}, rel=1e-4)


@pytest.mark.parametrize("order", ["dissimilar", "similar"])
@pytest.mark.parametrize("count, threshold", [(2, -1.0), (4, -1.0), (3, 0.9)])
def test_kvsharer_is_the_slow_walk(order, count, threshold):
    teacher, rows = make_teacher(num_hidden_layers=6), make_rows()
    expected, tried = slow_kvsharer(teacher, rows, count, order, threshold)
    plan = plan_like_kvsharer(teacher, rows, count, order=order, threshold=threshold)
    assert list(plan.plan) == expected
    assert [(trial.layer, trial.source, trial.similarity, trial.is_kept) for trial in plan.tried] == tried
    assert threshold < 0 and len(plan.shared_layers) == count or not all(trial.is_kept for trial in plan.tried)


def test_kvsharer_says_that_it_found_too_few_layers_and_keeps_them(caplog):
    teacher, rows = make_teacher(num_hidden_layers=6), make_rows()
    best = max(trial.similarity for trial in plan_like_kvsharer(teacher, rows, 5, threshold=1.0).tried)
    with caplog.at_level(logging.WARNING, "echoatt_hf"):
        plan = plan_like_kvsharer(teacher, rows, 5, threshold=best - 1e-4)
    assert 1 <= len(plan.shared_layers) < 5 and not plan.is_enough
    assert f"{len(plan.shared_layers)} of the 5 layers share keys and values" in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 0}, "count is 0; it must be from 1 to 5"),
        ({"count": 6}, "count is 6; it must be from 1 to 5"),
        ({"order": "random"}, "order is 'random'; it must be one of dissimilar, similar"),
        ({"distance": "cosine"}, "distance is 'cosine'; it must be one of code, paper"),
        ({"threshold": 50}, "threshold is 50; it must be a cosine"),
        ({"rows": []}, "no rows to measure on"),
    ],
)
def test_kvsharer_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        plan_like_kvsharer(make_teacher(), **{"rows": make_rows(), "count": 2, **change})


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "qwen3"])
def test_a_plan_of_kvsharer_makes_a_student_with_as_many_caches_less(family):
    teacher = make_teacher(family)
    found = plan_like_kvsharer(teacher, make_rows(), 2, threshold=-1.0)
    student = make_student(teacher, found.plan)
    assert sorted(student.config.kv_sources) == found.shared_layers and len(found.shared_layers) == 2
    assert count_kv_bytes_per_token(student) * 6 == count_kv_bytes_per_token(teacher) * 4


# LaCo


@torch.no_grad()
def slow_merge(model, base, rear, rule):
    """As the notebook of its authors does it, tensor by tensor, for Llama."""
    merged = copy.deepcopy(model)
    target = dict(merged.model.layers[base].named_parameters())
    for name in LLAMA_WEIGHTS:
        first = target[name].clone()
        for other in range(base + 1, base + rear + 1):
            weight = dict(model.model.layers[other].named_parameters())[name]
            target[name].add_(weight - (target[name] if rule == "code" else first))
    for other in range(base + rear, base, -1):
        del merged.model.layers[other]
    for index, layer in enumerate(merged.model.layers):
        layer.self_attn.layer_idx = index
    merged.config.num_hidden_layers = len(merged.model.layers)
    return merged


def slow_laco(teacher, rows, size, lowest, highest, interval, threshold, rule):
    model, tried, layer = copy.deepcopy(teacher), [], highest - size
    while layer >= lowest:
        merged = slow_merge(model, layer, min(size - 1, len(model.model.layers) - layer - 1), rule)
        similarity = slow_similarity(teacher, merged, rows)
        tried.append((pytest.approx(similarity, abs=1e-5), similarity > threshold))
        if similarity > threshold:
            model = merged
            layer -= interval
            if layer >= len(model.model.layers):
                layer = len(model.model.layers) - 1 - size
        else:
            layer -= 1
    return model, tried


@pytest.mark.parametrize("rule", ["code", "paper"])
@pytest.mark.parametrize(
    "size, lowest, highest, interval, threshold",
    [(2, 0, 8, 1, -1.0), (4, 1, 8, 2, 0.3), (3, 0, 7, 1, 0.45), (3, 1, 8, 1, 0.5)],
)
def test_laco_is_the_slow_walk(rule, size, lowest, highest, interval, threshold):
    teacher, rows = make_teacher(num_hidden_layers=8), make_rows()
    before = copy.deepcopy(teacher.state_dict())
    settings = {"size": size, "lowest": lowest, "highest": highest, "interval": interval, "threshold": threshold}
    expected, tried = slow_laco(teacher, rows, **settings, rule=rule)
    if threshold == 0.5:
        assert {is_kept for _, is_kept in tried} == {True, False}
    found = collapse_layers(teacher, rows, **settings, rule=rule)
    assert [(merge.similarity, merge.is_kept) for merge in found.tried] == tried
    assert [each for layer in found.layers for each in layer] == list(range(8))
    assert len(found.layers) == found.model.config.num_hidden_layers == len(expected.model.layers)
    inputs = make_batch()
    torch.testing.assert_close(found.model(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert found.similarity == pytest.approx(slow_similarity(teacher, found.model, rows), abs=1e-5)
    left = copy.deepcopy(teacher)
    for layer in sorted({*range(8)} - {each[0] for each in found.layers}, reverse=True):
        del left.model.layers[layer]
    for index, layer in enumerate(left.model.layers):
        layer.self_attn.layer_idx = index
    assert found.similarity_without == pytest.approx(slow_similarity(teacher, left, rows), abs=1e-5)
    # The teacher is as it was, and shares nothing with the model.
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not {each.data_ptr() for each in teacher.parameters()} & {
        each.data_ptr() for each in found.model.parameters()
    }


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mixtral", "gpt2", "gpt_neox", "phi", "olmo2"])
def test_merged_models_are_plain_models_of_their_family(family, tmp_path):
    teacher = make_teacher(family)
    found = collapse_layers(teacher, make_rows(), size=3, lowest=2, threshold=-1.0, interval=9)
    assert found.layers == [[0], [1], [2], [3, 4, 5]]
    found.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(teacher) and loaded.config.num_hidden_layers == 4
    inputs = make_batch()
    torch.testing.assert_close(loaded(**inputs).logits, found.model(**inputs).logits, **FP32_TOLERANCE)
    path = "transformer.h" if family == "gpt2" else "gpt_neox.layers" if family == "gpt_neox" else "model.layers"
    for name, tensor in loaded.get_submodule(f"{path}.3").state_dict().items():
        source = 3 if "norm" in name or name.startswith("ln_") else 5
        assert torch.equal(tensor, teacher.get_submodule(f"{path}.{source}").state_dict()[name]), name


def test_both_rules_of_laco_are_one_for_two_layers_and_keep_the_dtype():
    teacher = make_teacher().to(torch.bfloat16)
    code, paper = (merge_layers(teacher, 2, 1, rule).state_dict() for rule in ("code", "paper"))
    assert all(torch.equal(code[name], paper[name]) for name in code)
    assert {tensor.dtype for tensor in merge_layers(teacher, 1, 3, "paper").state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("name, layers", [("llama2-7b", 32), ("llama2-13b", 40), ("notebook-13b", 40)])
def test_presets_of_laco_fit_their_models(name, layers):
    teacher = make_teacher(num_hidden_layers=layers)
    found = collapse_layers(teacher, make_rows((4,)), **LACO_PRESETS[name])
    assert found.tried[0].layers[0] == LACO_PRESETS[name]["highest"] - LACO_PRESETS[name]["size"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 1}, "size is 1; it must be at least 2"),
        ({"interval": 0}, "interval is 0; it must be at least 1"),
        ({"highest": 7}, "highest at most 6"),
        ({"lowest": 4}, "lowest must be at least 0 and at most highest - size"),
        ({"lowest": -1}, "lowest is -1"),
        ({"threshold": 1.5}, "threshold is 1.5; it must be a cosine"),
        ({"rule": "sum"}, "rule is 'sum'; it must be one of code, paper"),
        ({"rows": []}, "no rows to compare hidden states on"),
    ],
)
def test_laco_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        collapse_layers(make_teacher(), **{"rows": make_rows(), "size": 3, **change})


def test_laco_refuses_layers_of_different_kinds():
    with pytest.raises(ValueError, match="Layer 5 cannot be merged into layer 4: only one of them has"):
        collapse_layers(make_teacher("lfm2"), make_rows(), size=2)
    with pytest.raises(ValueError, match="the model has the layers 0 to 5"):
        merge_layers(make_teacher(), 4, 2)


# DirectShare and PostShare


def slow_heads(model):
    """Rows of queries, and of keys and values, of each head of keys and values, by layer and head."""
    config = model.config
    config.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = size * (config.num_attention_heads // config.num_key_value_heads)
    return {
        (layer, head): (slice(head * group, (head + 1) * group), slice(head * size, (head + 1) * size))
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_key_value_heads)
    }


def projections_of(model, layer):
    attention = model.model.layers[layer].self_attn
    output = attention.dense if hasattr(attention, "dense") else attention.o_proj
    return {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "o": output}


@torch.no_grad()
def slow_match(model, rate, parts):
    heads = slow_heads(model)

    def vector(place):
        queries, values = heads[place]
        projections = projections_of(model, place[0])
        return torch.cat([projections[part].weight[queries if part == "q" else values].flatten() for part in parts])

    found = []
    for place in heads:
        best = None
        for other in heads:
            if other[0] >= place[0]:
                continue
            cosine = torch.nn.functional.cosine_similarity(vector(place), vector(other), dim=0).item()
            if best is None or cosine > best[1]:
                best = other, cosine
        if best is not None:
            found.append((*place, *best[0], best[1]))
    found.sort(key=lambda pair: -pair[-1])
    return found[: int(rate * len(heads))]


@torch.no_grad()
def slow_share(model, pairs):
    """Every weight from a copy of the model before anything was shared."""
    heads, before = slow_heads(model), copy.deepcopy(model)
    for pair in pairs:
        ours, theirs = projections_of(model, pair.layer), projections_of(before, pair.source_layer)
        to, source = heads[pair.layer, pair.head], heads[pair.source_layer, pair.source_head]
        for name in "qkv":
            place = 0 if name == "q" else 1
            ours[name].weight[to[place]] = theirs[name].weight[source[place]]
            if ours[name].bias is not None:
                ours[name].bias[to[place]] = theirs[name].bias[source[place]]
        ours["o"].weight[:, to[0]] = theirs["o"].weight[:, source[0]]
    return model


def slow_distance(model, pairs):
    heads, total = slow_heads(model), 0.0
    for pair in pairs:
        for name in "qkv":
            place = 0 if name == "q" else 1
            ours = projections_of(model, pair.layer)[name].weight[heads[pair.layer, pair.head][place]]
            source = heads[pair.source_layer, pair.source_head][place]
            total = (
                total + (ours - projections_of(model, pair.source_layer)[name].weight[source]).square().sum().sqrt()
            )
    return total / len(pairs)


@pytest.mark.parametrize("parts", ["qk", "q", "k", "v", "qkv"])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped queries", "all heads"])
def test_matches_of_heads_are_those_of_the_slow_rule(grouped, parts):
    model = make_teacher(num_key_value_heads=2 if grouped else 4)
    expected, found = slow_match(model, 0.3, parts), match_heads(model, 0.3, parts)
    assert [pair[:4] for pair in found] == [pair[:4] for pair in expected]
    assert [pair.similarity for pair in found] == pytest.approx([pair[4] for pair in expected], abs=1e-6)
    assert len(found) == (3 if grouped else 7) and all(pair.source_layer < pair.layer for pair in found)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "phi", "olmo2"])
def test_direct_share_is_the_slow_rule(family):
    model = make_teacher(family)
    pairs = match_heads(model, 0.5)
    expected = slow_share(copy.deepcopy(model), pairs)
    before = copy.deepcopy(model.state_dict())
    assert direct_share(model, pairs) is model
    assert all(torch.equal(expected.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    biased = projections_of(model, 1)["q"].bias is not None
    assert len(changed) == (7 if biased else 4) * len({pair.layer for pair in pairs})


def test_a_chain_of_heads_takes_the_weights_that_each_source_had():
    model = make_teacher()
    pairs = [HeadPair(2, 1, 0, 0, 0.9), HeadPair(4, 0, 2, 1, 0.8), HeadPair(5, 1, 4, 0, 0.7)]
    expected = slow_share(copy.deepcopy(model), pairs)
    for order in (pairs, pairs[::-1]):
        shared = direct_share(copy.deepcopy(model), order)
        assert all(torch.equal(expected.state_dict()[name], tensor) for name, tensor in shared.state_dict().items())


@pytest.mark.parametrize("family, message", [("gpt2", "no linear q_proj, k_proj and"), ("phi3", "no linear q_proj")])
def test_heads_of_fused_projections_are_refused(family, message):
    with pytest.raises(ValueError, match=message):
        match_heads(make_teacher(family), 0.3)


@pytest.mark.parametrize(
    "rate, parts, message",
    [
        (0.0, "qk", "rate is 0.0, which is 0 of 12 heads"),
        (1.0, "qk", "rate is 1.0, which is 12 of 12 heads: it must be at least one head and at most the 10"),
        (0.3, "ko", "parts is 'ko'; it must be one of qk, q, k, v, qkv"),
    ],
)
def test_match_heads_refuses(rate, parts, message):
    with pytest.raises(ValueError, match=message):
        match_heads(make_teacher(), rate, parts)


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([HeadPair(6, 0, 0, 0, 1.0)], "its layer 6 has no head 0"),
        ([HeadPair(3, 0, 0, 2, 1.0)], "its layer 0 has no head 2"),
        ([HeadPair(3, 0, 3, 1, 1.0)], "a head has one source, in an earlier layer"),
        ([HeadPair(3, 0, 1, 1, 1.0), HeadPair(3, 0, 2, 1, 1.0)], "a head has one source, in an earlier layer"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs, message):
    model = make_teacher()
    before = copy.deepcopy(model.state_dict())
    for function in (direct_share, head_distance):
        with pytest.raises(ValueError, match=message):
            function(model, pairs)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_distance_of_heads_is_that_of_the_slow_rule_with_its_gradients():
    model, twin = make_teacher(), make_teacher()
    pairs = match_heads(model, 0.4)
    found, expected = head_distance(model, pairs), slow_distance(twin, pairs)
    torch.testing.assert_close(found, expected, **FP32_TOLERANCE)
    found.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, **FP32_TOLERANCE)
    # Heads that are alike pull at nothing.
    shared = direct_share(make_teacher(), [pairs[0]])
    distance = head_distance(shared, [pairs[0]])
    distance.backward()
    assert distance == 0 and all(each.grad is None or not each.grad.any() for each in shared.parameters())


def post_share(model, pairs, folder, steps=1, **arguments):
    arguments = {
        **POST_SHARE_SETTINGS,
        **{"per_device_train_batch_size": 4, "stage2_learning_rate": 1e-2, "lr_scheduler_type": "constant"},
        **{"logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"},
        **arguments,
    }
    args = EchoAttTrainingArguments(str(folder), stage1_steps=0, stage2_steps=steps, **arguments)
    rows = make_rows((12, 7, 9, 5))
    trainer = PostShareTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate_rows, pairs=pairs
    )
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_post_share_minimises_half_of_each(tmp_path, accumulation):
    """A step of gradient descent, by hand and by the trainer, however the rows are divided."""
    model, twin = make_teacher(), make_teacher()
    pairs = match_heads(model, 0.4)
    batch = collate_rows(make_rows((12, 7, 9, 5)))
    distance = slow_distance(twin, pairs)
    logits = twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    text = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    (0.5 * text + 0.5 * distance).backward()
    trainer = post_share(
        model,
        pairs,
        tmp_path,
        **{"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation},
        **{"optim": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0},
    )
    trainer.train()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 1e-2 * theirs.grad, **FP32_TOLERANCE)
    log = trainer.state.log_history[0]
    assert log["heads_loss"] == pytest.approx(distance.item(), rel=1e-3)
    assert log["ce_loss"] == pytest.approx(text.item(), rel=1e-3)
    assert log["loss"] == pytest.approx((text + distance).item() / 2, rel=1e-3)
    # What is evaluated is the text alone.
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    text = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    found = trainer.evaluate()["eval_loss"] if accumulation == 1 else text
    assert found == pytest.approx(text.item(), rel=1e-3)


def test_post_share_draws_heads_together_in_both_stages(tmp_path):
    teacher, model = make_teacher(), make_teacher()
    pairs = match_heads(model, 0.4)
    settings = DistillationSettings(
        steps=6, stage2_steps=2, learning_rate=1e-2, stage2_learning_rate=1e-2, warmup_steps=0, batch_size=4
    )
    rows = make_rows((12, 12, 12, 12))
    trainer = train_two_stages(
        model, teacher, rows, settings, tmp_path, trainer_class=partial(PostShareTrainer, pairs=pairs)
    )
    assert trainer.state.global_step == 6
    assert head_distance(model, pairs) < 0.8 * head_distance(teacher, pairs)


def test_post_share_refuses_pairs_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="pairs is empty"):
        post_share(make_teacher(), [], tmp_path)
    with pytest.raises(ValueError, match="its layer 9 has no head 0"):
        post_share(make_teacher(), [HeadPair(9, 0, 0, 0, 1.0)], tmp_path)


# Shared heads, stored once


CHAIN = [HeadPair(2, 1, 0, 0, 0.9), HeadPair(4, 0, 2, 1, 0.8), HeadPair(4, 1, 2, 1, 0.7), HeadPair(5, 1, 4, 0, 0.7)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "phi"])
def test_students_with_shared_heads_are_those_of_direct_share_and_store_them_once(family, tmp_path):
    teacher = make_teacher(family)
    pairs = match_heads(teacher, 0.4)
    expected = direct_share(copy.deepcopy(teacher), pairs)
    student = make_shared_student(teacher, pairs)
    inputs = make_batch(3, 12, padding=(4, 0, 1))
    torch.testing.assert_close(student(**inputs).logits, expected(**inputs).logits, **FP32_TOLERANCE)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.shared_heads == student.config.shared_heads
    torch.testing.assert_close(loaded(**inputs).logits, expected(**inputs).logits, **FP32_TOLERANCE)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **options), expected.generate(**inputs, **options))
    queries, values = (rows.stop for rows in slow_heads(expected)[0, 0])
    head = (queries + 2 * values) * (teacher.config.hidden_size + (projections_of(teacher, 0)["q"].bias is not None))
    head += teacher.config.hidden_size * queries
    saved = teacher.num_parameters() - loaded.num_parameters()
    assert saved == len(student.config.shared_heads) * head
    size = sum(tensor.numel() for name, tensor in load_file(tmp_path / "model.safetensors").items())
    assert size == loaded.num_parameters()


def test_of_a_chain_weights_are_stored_once_that_a_head_still_has():
    teacher = make_teacher()
    student = make_shared_student(teacher, CHAIN)
    # 4.0 and 4.1 have what 2.1 had.
    assert student.config.shared_heads == {"2.1": "0.0", "4.1": "4.0"}
    expected = slow_share(copy.deepcopy(teacher), CHAIN)
    inputs = make_batch()
    torch.testing.assert_close(student(**inputs).logits, expected(**inputs).logits, **FP32_TOLERANCE)


def test_shared_heads_have_the_gradients_of_both():
    teacher = make_teacher("qwen2")
    student, twin = make_shared_student(teacher, CHAIN), direct_share(copy.deepcopy(teacher), CHAIN)
    for model in (student, twin, clone := copy.deepcopy(student)):
        model.train()
        model(**make_batch()).logits.square().mean().backward()
    heads, gradients = slow_heads(twin), {}
    for name in "qkvo":
        by_layer = [projections_of(twin, layer)[name].weight.grad for layer in range(6)]
        by_layer = [each.T if name == "o" else each for each in by_layer]
        gradients[name] = {
            place: by_layer[place[0]][rows if name in "qo" else values] for place, (rows, values) in heads.items()
        }
    for model in (student, clone):
        found = {name: projections_of(model.language_model, 0)[name].weight.grad for name in "qkvo"}
        found["o"] = found["o"].T
        for name, gradient in found.items():
            rows, values = heads[0, 0]
            expected = gradients[name][0, 0] + gradients[name][2, 1]
            torch.testing.assert_close(gradient[rows if name in "qo" else values], expected, **FP32_TOLERANCE)
    # A copy has nothing of the original's.
    assert not {each.data_ptr() for each in clone.parameters()} & {each.data_ptr() for each in student.parameters()}


def test_students_with_shared_heads_learn_and_stay_shared(tmp_path):
    teacher = make_teacher()
    student = make_shared_student(teacher, match_heads(teacher, 0.4))
    settings = DistillationSettings(
        steps=4, stage2_steps=1, learning_rate=1e-2, batch_size=4, gradient_checkpointing=True
    )
    before = student.num_parameters()
    train_two_stages(student, teacher, make_rows((12, 12, 12, 12)), settings, tmp_path / "checkpoints")
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    inputs = make_batch()
    torch.testing.assert_close(loaded(**inputs).logits, student.eval()(**inputs).logits, **FP32_TOLERANCE)
    assert loaded.num_parameters() == before
    with pytest.raises(ValueError, match="Heads of the student share weights"):
        add_lora(student, 4)


def test_a_layer_may_have_no_head_of_its_own(tmp_path):
    teacher = make_teacher("qwen2")
    pairs = [HeadPair(3, 0, 1, 1, 0.9), HeadPair(3, 1, 0, 0, 0.8)]
    student = make_shared_student(teacher, pairs)
    assert projections_of(student.language_model, 3)["q"].weight.shape == (0, 32)
    student.save_pretrained(tmp_path)
    loaded, inputs = AutoModelForCausalLM.from_pretrained(tmp_path), make_batch()
    expected = slow_share(copy.deepcopy(teacher), pairs)
    torch.testing.assert_close(loaded(**inputs).logits, expected(**inputs).logits, **FP32_TOLERANCE)


def test_shared_heads_of_layers_that_are_offloaded(tmp_path):
    config = EchoAttConfig(text_config=make_config(), shared_heads={"3.1": "0.0", "4.1": "3.0"})
    student = AutoModelForCausalLM.from_config(config).eval()
    student.save_pretrained(tmp_path / "student")
    layers = {f"language_model.model.layers.{layer}": "disk" if layer in (0, 3) else "cpu" for layer in range(6)}
    places = {
        f"language_model.{name}": "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    }
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", device_map=layers | places, offload_folder=tmp_path / "offload"
    )
    assert loaded.language_model.model.layers[0].self_attn.q_proj.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(loaded(**make_batch()).logits, student(**make_batch()).logits, **FP32_TOLERANCE)


def test_shared_heads_compile():
    student = make_shared_student(make_teacher(), CHAIN)
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    inputs = make_batch()
    torch.testing.assert_close(compiled(**inputs).logits, student(**inputs).logits, **FP32_TOLERANCE)


@pytest.mark.parametrize(
    "shared_heads, message",
    [
        (["7.2"], "it must be a dict such as"),
        ({"3.0": 1}, "it must be a dict such as"),
        ({"3.0": "1"}, "it must be a dict such as"),
        ({"6.0": "1.0"}, "but the model has 6 layers"),
        ({"3.0": "3.1"}, "a head can have the weights of an earlier head that has its own"),
        ({"3.0": "1.0", "4.0": "3.0"}, "a head can have the weights of an earlier head that has its own"),
        ({"2.0": "0.0"}, "but layer 2 is changed by the plan"),
        ({"3.0": "1.7"}, "names head 7 of layer 1, which has 2 heads"),
    ],
)
def test_shared_heads_that_do_not_fit_are_refused(shared_heads, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(
            EchoAttConfig(text_config=make_config(), echo_sources=[0, 1, 1, 3, 4, 5], shared_heads=shared_heads)
        )


def test_shared_heads_of_fused_projections_are_refused():
    with pytest.raises(ValueError, match="Heads of layer 0 cannot share weights: it has no linear q_proj"):
        AutoModelForCausalLM.from_config(EchoAttConfig(text_config=make_config("phi3"), shared_heads={"3.0": "0.0"}))


# The command line


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neighbours")
    text = [f"Story {n}. Once upon a time there were {n} small bears who ate {n * 3} honeys.\n" * 6 for n in range(12)]
    tokenizer = write_workplace(folder, text)
    for model in (make_teacher(vocab_size=len(tokenizer)), tokenizer):
        model.save_pretrained(folder / "teacher")
    return folder


def run_convert(workplace, *options):
    data = ["--data", workplace / "text", "--row-length", "32", "--calibration-rows", "6"]
    return CliRunner().invoke(app, [str(word) for word in ("convert", workplace / "teacher", *data, *options)])


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "kvsharer", "--shared-layers", "2", "--kv-order", "similar", "--keep-above", "-1"],
        ["--method", "laco", "--merge-size", "2", "--keep-above", "-1", "--merge-rule", "paper"],
        ["--method", "directshare", "--head-rate", "0.4", "--head-parts", "q"],
    ],
    ids=lambda options: options[1],
)
def test_convert_by_a_method_makes_a_student_to_distil(workplace, tmp_path, options):
    result = run_convert(workplace, *options, "--output", tmp_path / "made")
    assert result.exit_code == 0, result.output
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(each) for each in (workplace / "teacher", tmp_path / "made")
    )
    assert json.loads((tmp_path / "made" / "method.json").read_text())["method"] == options[1]
    report = json.loads((tmp_path / "made" / "conversion.json").read_text())
    assert report["student_parameters"] == student.num_parameters() < teacher.num_parameters()
    assert report["student_kv_bytes_per_token"] == count_kv_bytes_per_token(student)
    if options[1] == "kvsharer":
        assert len(student.config.kv_sources) == 2
    elif options[1] == "laco":
        assert student.config.num_hidden_layers == 6 - report["layer_plan"].count("drop") < 6
    else:
        assert (
            student.config.shared_heads
            and report["student_kv_bytes_per_token"] == report["teacher_kv_bytes_per_token"]
        )
    words = ["distill", tmp_path / "made", "--teacher", workplace / "teacher", "--data", workplace / "text"]
    words += [
        "--row-length",
        "32",
        "--evaluation-rows",
        "4",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--output",
        tmp_path / "out",
    ]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == student.num_parameters()
    told = {
        "kvsharer": (
            "2 of 6 layers use the keys and values",
            "[KVSharer](https://arxiv.org/abs/2410.18517) (shared_layers 2",
        ),
        "laco": (
            "layers of the teacher are merged into the one before them",
            "[LaCo](https://arxiv.org/abs/2402.11187)",
        ),
        "directshare": (
            "heads of keys and values, and their queries, use",
            "[DirectShare](https://arxiv.org/abs/2402.11819)",
        ),
    }
    for folder in ("made", "out"):
        card = (tmp_path / folder / "README.md").read_text()
        assert all(text in card for text in told[options[1]]) and "reuse the attention weights" not in card


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "minitron"], "method is 'minitron'; it must be one of 'kvsharer', 'laco', 'directshare'."),
        (["--method", "laco", "--head-rate", "0.3"], "head_rate is 0.3, which is for the method 'directshare'"),
        (["--merge-size", "3"], "merge_size is 3, which is for the method 'laco'; the method is None."),
        (["--method", "laco", "--ratio", "0.2"], "--ratio 0.2 is given, but the method 'laco' makes the plan"),
        (["--method", "kvsharer", "--shared-layers", "9"], "count is 9; it must be from 1 to 5"),
        (
            ["--method", "directshare", "--target", "kv-bytes=-9%"],
            "target is kv-bytes, of which the method 'directshare' saves nothing; it saves parameters.",
        ),
        (
            ["--method", "laco", "--target", "parameters=-9%", "--keep-above", "0.4"],
            "keep_above is 0.4, but the target decides it: give one of the two.",
        ),
        (
            ["--method", "kvsharer", "--target", "kv-bytes=-90%", "--keep-above", "-1"],
            "The method 'kvsharer' does not reach the target: the most that it saves of this model is kv_bytes_per_token -83.3%",
        ),
    ],
)
def test_convert_by_a_method_refuses(workplace, tmp_path, options, message):
    result = run_convert(workplace, *options, "--output", tmp_path / "made")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "made").exists()


# What a target asks of a method


def test_kvsharer_shares_as_few_layers_as_reach_a_target():
    teacher, rows = make_teacher(num_hidden_layers=6), make_rows()
    method = MethodSettings("kvsharer", keep_above=-1.0)
    made = make_by_method(teacher, rows, method, [Target("kv-bytes", 0.6)])
    expected = make_by_method(teacher, rows, replace(method, shared_layers=3))  # two of six layers save a third
    assert made.report.layer_plan == expected.report.layer_plan and len(made.student.config.kv_sources) == 3
    assert made.about["targets"] == [{"quantity": "kv-bytes", "share": 0.6}]


@pytest.mark.parametrize("target", [Target("parameters", 0.9), Target("kv-bytes", 0.7), Target("decode", 1 / 1.2)])
def test_laco_has_the_highest_threshold_that_reaches_a_target(target):
    teacher, rows = make_teacher(num_hidden_layers=6), make_rows()
    method = MethodSettings("laco", merge_size=2, merge_interval=1)
    made = make_by_method(teacher, rows, method, [target])
    threshold = made.about["threshold"]
    assert (
        made.report.layer_plan
        == make_by_method(teacher, rows, replace(method, keep_above=threshold)).report.layer_plan
    )

    def share(model):
        if target.quantity == "parameters":
            return model.num_parameters() / teacher.num_parameters()
        layers = model.config.num_hidden_layers
        if target.quantity == "kv-bytes":
            return layers / 6
        bytes_read = [
            4 * (each.num_parameters() - each.get_input_embeddings().weight.numel())
            + 2048 * count_kv_bytes_per_token(each)
            for each in (model, teacher)
        ]
        return bytes_read[0] / bytes_read[1]

    assert share(made.student) <= target.share
    stricter = make_by_method(teacher, rows, replace(method, keep_above=min(threshold + 2e-3, 1.0)))
    assert share(stricter.student) > target.share


def test_directshare_has_as_few_heads_as_reach_a_target():
    teacher = make_teacher(num_hidden_layers=6)
    total = teacher.num_parameters()
    made = make_by_method(teacher, [], MethodSettings("directshare"), [Target("parameters", 0.95)])
    pairs = [HeadPair(**pair) for pair in made.about["pairs"]]
    assert pairs == match_heads(teacher, None)[: len(pairs)]
    assert count_saved(teacher, pairs) == total - made.student.num_parameters() >= 0.05 * total
    assert count_saved(teacher, pairs[:-1]) < 0.05 * total
