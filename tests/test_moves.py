"""Layers that use keys and values of others, that have no attention, and that are left out. Families and caches: test_families.py."""

import copy

import pytest
import torch
from conftest import FP32_TOLERANCE, make_batch, make_teacher
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from echoatt_hf import EchoAttConfig, EchoAttForCausalLM, SharingPlan, convert, count_kv_bytes_per_token
from echoatt_hf.conversion import taking_up
from echoatt_hf.conversion.alignment import find_changed, get_parameters, permute_heads, set_parameters
from echoatt_hf.conversion.dropping import drop_layers
from echoatt_hf.conversion.putting_back import find_sizes, put_back
from echoatt_hf.conversion.regression import RIDGES
from echoatt_hf.conversion.student import make_student
from echoatt_hf.conversion.taking_up import find_takers
from echoatt_hf.conversion.tuning import find_tuned
from echoatt_hf.evaluation.held_out import evaluate_model
from echoatt_hf.models.families import find_attention_modules, find_output_projection


SKIP, DROP = "skip attention", "drop"
MIXED = [0, 1, 1, "kv 1", SKIP, 5]
EIGHT_TOKENS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def rows_of(count: int, length: int = 12) -> list[dict]:
    return [{"input_ids": row.tolist()} for row in make_batch(count, length)["input_ids"]]


def logits_of(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_batch(2, 12), **kwargs).logits


# The plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([0, "kv 1", 2], r"layer_plan\[1\] is 'kv 1'; a layer can use those of an earlier layer, 0 to 0"),
        ([0, 1, "kv 5"], r"layer_plan\[2\] is 'kv 5'; a layer can use those of an earlier layer, 0 to 1"),
        ([0, "kv 0", 1], r"layer_plan\[2\] is 1, but layer 1 is 'kv 0': a source must .* Use 0 instead"),
        ([0, 0, "kv 1"], r"layer_plan\[2\] is 'kv 1', but layer 1 is itself an echo of layer 0: .* Use 0 instead"),
        ([0, 1, SKIP, 2], r"layer_plan\[3\] is 2, but layer 2 is 'skip attention': a source must"),
        ([0, DROP, "kv 1"], r"layer_plan\[2\] is 'kv 1', but layer 1 is 'drop'"),
        ([SKIP, 1, 2], r"layer_plan\[0\] is 'skip attention', but layer 0 is the first of its type"),
        ([0, "kv", 2], r"layer_plan\[1\] is 'kv'; it must be a layer index .* or 'kv N', 'skip attention' or 'drop'"),
        ([0, "echo 0", 2], r"layer_plan\[1\] is 'echo 0'; it must be a layer index"),
        ([DROP, DROP], "drops every layer"),
        ("kv 1", "must be a list of layer indices"),
    ],
)
def test_wrong_plans_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        SharingPlan(plan) if not isinstance(plan, str) else EchoAttConfig(layer_plan=plan)


def test_a_layer_has_the_type_of_its_source():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    with pytest.raises(
        ValueError, match=r"layer 2 is of type 'sliding_attention' and layer 1 of type 'full_attention'"
    ):
        SharingPlan([0, 1, "kv 1"], types)
    with pytest.raises(ValueError, match=r"\[1\] is 'skip attention', but layer 1 is the first of its type"):
        SharingPlan([0, SKIP, 2], types)
    with pytest.raises(ValueError, match="of type 'linear_attention', which has no attention weights"):
        SharingPlan([0, 1, SKIP], ["full_attention", "linear_attention", "linear_attention"])
    assert SharingPlan([0, 1, DROP], ["full_attention", "linear_attention", "linear_attention"]).dropped_layers == [2]


def test_plan_says_what_each_layer_does(tmp_path):
    plan = SharingPlan([0, 1, 1, "kv 1", SKIP, DROP, 6, "kv 6"])
    assert plan.echo_sources == [0, 1, 1, 3, 4, 5, 6, 7]
    assert (plan.echo_layers, plan.kv_layers, plan.source_layers) == ([2], [3, 7], [1, 6])
    assert (plan.layers_without_attention, plan.dropped_layers, plan.plain_layers) == ([4], [5], [0])
    assert plan.changed_layers == [2, 3, 4, 5, 7] and plan.blocks == [[1, 2, 3], [6, 7]]
    assert str(plan) == (
        "0 1 2→1 3→kv1 4:skip 5:drop 6 7→kv6  "
        "(1 of 8 layers echo, 2 use keys and values, 1 skip attention, 1 are dropped)"
    )
    assert list(plan.without_dropped()) == [0, 1, 1, "kv 1", SKIP, 5, "kv 5"]
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert SharingPlan.from_json(tmp_path / "plan.json") == plan == SharingPlan.from_dict(plan.to_dict())
    assert list(SharingPlan([0, 1, 1, 3]).with_kv()) == [0, 1, "kv 1", 3]


def test_configuration_keeps_the_plan(tmp_path):
    teacher = make_teacher()
    config = EchoAttConfig(text_config=teacher.config, layer_plan=MIXED)
    assert config.plan == MIXED and config.echo_sources == [0, 1, 1, 3, 4, 5]
    assert (config.echo_layers, config.kv_sources, config.layers_without_attention) == ([2], {3: 1}, [4])
    config.save_pretrained(tmp_path)
    assert EchoAttConfig.from_pretrained(tmp_path).plan == MIXED
    # A plan of echoes alone has one form in files.
    assert EchoAttConfig(text_config=teacher.config, layer_plan=[0, 1, 1, 3, 4, 5]).layer_plan is None
    with pytest.raises(ValueError, match="which do not agree: give one of them"):
        EchoAttConfig(text_config=teacher.config, layer_plan=MIXED, echo_sources=[0, 1, 1, 1, 4, 5])
    with pytest.raises(ValueError, match="drops layer 2: a configuration has only the layers that are there"):
        EchoAttConfig(text_config=teacher.config, layer_plan=[0, 1, DROP, 3, 4, 5])


# Keys and values of others


# Fused projections, norms of all heads, gates among the queries, sinks.
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "phi3", "gpt2", "gpt_neox", "gpt_oss", "qwen3_next"])
def test_order_of_heads_within_a_group_changes_nothing(family):
    teacher = make_teacher(family, None)
    plan = [0, 1, "kv 0", "kv 1", 4, "kv 1"] if family in ("gpt_oss", "qwen3_next") else [0, 1, 1, 3, "kv 3", 5]
    if family == "qwen3_next":
        plan = [0, 1, 2, "kv 1", 4, "kv 1"]
    student = EchoAttForCausalLM.from_teacher(teacher, plan)
    expected = logits_of(student, use_cache=False)
    layer = max(student.config.kv_sources)
    attention = find_changed(student)[layer]
    before = get_parameters(attention)
    heads, groups = 4, 4 if family in ("gpt2", "gpt_neox") else 2
    size = heads // groups
    order = [group * size + head for group in range(groups) for head in reversed(range(size))]
    permute_heads(attention, order)
    torch.testing.assert_close(logits_of(student, use_cache=False), expected, **FP32_TOLERANCE)
    set_parameters(attention, before)
    # Whole groups get other keys and values.
    permute_heads(attention, [*range(heads // 2, heads), *range(heads // 2)])
    assert (logits_of(student, use_cache=False) - expected).abs().max() > 1e-4


def test_tuning_brings_kv_layers_closer(tiny_teacher):
    plan, rows = [0, 1, "kv 1", "kv 1", 4], rows_of(48)
    student, report = convert(tiny_teacher, plan, rows)
    copied, _ = convert(tiny_teacher, plan)
    assert report.layer_plan == plan and report.refitted.keys() <= {2, 3} and report.refitted
    kl = [evaluate_model(each, rows[36:], teacher=tiny_teacher)["kl"] for each in (copied, student)]
    assert kl[1] < 0.95 * kl[0]
    assert report.dropped == sorted(
        f"model.layers.{layer}.self_attn.{name}.weight" for layer in (2, 3) for name in ("k_proj", "v_proj")
    )


def test_report_of_fused_projections_says_that_a_part_is_kept():
    _, report = convert(make_teacher("phi3"), [0, 1, "kv 1", 3, 4, 5])
    fused = "model.layers.{}.self_attn.qkv_proj"
    assert report.cut == [f"{fused.format(2)}.weight"] and report.dropped == []
    assert f"cut          1 tensors: {fused.format(2)}; queries are kept\n" in str(report)
    assert "values and gates" not in str(report)
    _, report = convert(make_teacher("phi3"), [0, "drop", "kv 0", 0, 4, 5])
    assert [line for line in str(report).splitlines() if line.startswith("cut")] == [
        f"cut          1 tensors: {fused.format(3)}; values and gates are kept",
        f"cut          1 tensors: {fused.format(2)}; queries are kept",
    ]


@pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_adapters_go_to_what_is_there(family):
    student = EchoAttForCausalLM.from_teacher(make_teacher(family), [0, 1, "kv 1", 1, 4, 5])
    model = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM"))
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert [name for name in names if ".2." in name] == [
        name for name in names if name.endswith("2.self_attn.q_proj") or name.endswith("2.attn.q_proj")
    ]
    assert sum(".2." in name for name in names) == 1
    model(**make_batch(), labels=make_batch()["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


# No attention


def teacher_without(teacher, layers, constants=None):
    """The teacher whose attention puts out nothing, or a constant, in some layers."""
    without = copy.deepcopy(teacher)
    attentions = find_attention_modules(without)
    for layer in layers:
        constant = 0 if constants is None else constants[layer]
        attentions[layer].register_forward_hook(
            lambda module, args, output, constant=constant: (torch.zeros_like(output[0]) + constant, *output[1:])
        )
    return without


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi", "olmo2", "mixtral"])
def test_skipped_attention(family, tmp_path):
    teacher = make_teacher(family, None if family == "gemma2" else "sdpa")
    layers = [2, 4] if family in ("gemma2",) else [3, 4]
    student = EchoAttForCausalLM.from_teacher(teacher, [SKIP if layer in layers else layer for layer in range(6)])
    expected = teacher_without(teacher, layers)
    torch.testing.assert_close(logits_of(student), logits_of(expected), **FP32_TOLERANCE)
    batch = make_batch(3, 10, padding=(4, 0, 1))
    for cache in (DynamicCache(config=student.config), StaticCache(config=student.config, max_cache_len=20)):
        found = student.generate(**batch, **EIGHT_TOKENS, past_key_values=cache)
        assert torch.equal(found, expected.generate(**batch, **EIGHT_TOKENS, use_cache=False))
    assert count_kv_bytes_per_token(student) == count_kv_bytes_per_token(teacher) * 4 // 6
    find_changed(student)[4].constant.data.uniform_()  # saved with the rest
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded), logits_of(student), **FP32_TOLERANCE)


def test_skipped_attention_becomes_its_mean(tiny_teacher):
    rows, layers = rows_of(48), [2, 3]
    found = {layer: [] for layer in layers}
    attentions = find_attention_modules(tiny_teacher)
    student, report = convert(tiny_teacher, [0, 1, SKIP, SKIP, 4], rows)
    for layer in layers:
        find_output_projection(attentions[layer]).register_forward_hook(
            lambda module, args, output, layer=layer: found[layer].append(output.flatten(0, 1))
        )
    with torch.no_grad():
        tiny_teacher(torch.tensor([row["input_ids"] for row in rows[:36]]))
    for layer in layers:
        mean = torch.cat(found[layer]).mean(0)
        torch.testing.assert_close(find_changed(student)[layer].constant.detach(), mean, **FP32_TOLERANCE)
    assert report.kl["tuned"] < report.kl["copied"]
    loss = student(**make_batch(), labels=make_batch()["input_ids"]).loss
    loss.backward()
    assert find_changed(student)[2].constant.grad.abs().max() > 0


# Left out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_dropped_layers(family):
    teacher = make_teacher(family)
    student, report = convert(teacher, [0, DROP, 2, DROP, 2, 5] if family != "gemma3_text" else [0, 1, DROP, 3, 4, 1])
    dropped = [2] if family == "gemma3_text" else [1, 3]
    smaller = drop_layers(teacher, dropped)
    plan = [0, 1, 2, 3, 1] if family == "gemma3_text" else [0, 1, 1, 3]
    torch.testing.assert_close(
        logits_of(student), logits_of(EchoAttForCausalLM.from_teacher(smaller, plan)), **FP32_TOLERANCE
    )
    assert student.config.plan == plan and student.config.num_hidden_layers == len(plan)
    path = "transformer.h" if family == "gpt2" else "model.layers"
    gone = {int(name.removeprefix(path + ".").split(".")[0]) for name in report.dropped}
    assert {*dropped} <= gone <= {*dropped, 4, 5}
    names = {name for name, _ in teacher.named_parameters()}
    assert {*report.copied} | {*report.cut} | {*report.dropped} == names
    kept = sum(parameter.numel() for name, parameter in teacher.named_parameters() if name in report.copied)
    assert kept + sum(p.numel() for name, p in student.named_parameters() if "v_proj" in name and report.cut) in (
        student.num_parameters(), kept,
    )  # fmt: skip


def test_dropped_layers_are_tuned_to_the_layers_of_the_teacher(tiny_teacher):
    """The layers that share are compared with those that they were, not with those of the same number."""
    plan, rows = [0, DROP, 2, 2, "kv 2"], rows_of(48)
    student, report = convert(tiny_teacher, plan, rows)
    copied, _ = convert(tiny_teacher, plan)
    kl = [evaluate_model(each, rows[36:], teacher=tiny_teacher)["kl"] for each in (copied, student)]
    assert report.kl["copied"] == pytest.approx(kl[0], rel=1e-3) and kl[1] < kl[0]
    assert report.layer_plan == plan and student.config.plan == [0, 1, 1, "kv 1"]


# Everything together


def test_mixed_student_is_an_ordinary_model(tmp_path):
    teacher = make_teacher()
    student, _ = convert(teacher, MIXED, rows_of(32))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.plan == MIXED
    torch.testing.assert_close(logits_of(loaded), logits_of(student), **FP32_TOLERANCE)
    batch = make_batch(3, 10, padding=(4, 0, 1))
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        found, expected = (
            loaded.generate(**batch, **EIGHT_TOKENS, **{**options, **more})
            for more in ({}, {"cache_implementation": None, "use_cache": False})
        )
        assert torch.equal(found, expected)
    clone = copy.deepcopy(loaded)
    torch.testing.assert_close(logits_of(clone), logits_of(student), **FP32_TOLERANCE)
    attentions = loaded(**batch, output_attentions=False, use_cache=False)
    assert attentions.logits.shape == (3, 10, 97)


def test_layers_of_all_moves_are_put_back():
    teacher, rows = make_teacher(), rows_of(4)
    student, _ = convert(teacher, MIXED, rows_of(32))
    whole = put_back(student, teacher, [2, 3, 4], 1.0)
    torch.testing.assert_close(logits_of(whole), logits_of(teacher), **FP32_TOLERANCE)
    sizes = find_sizes(student, teacher, rows)
    assert [len(size.layers) for size in sizes] == [0, 1, 2] and sizes[-1].kl < sizes[0].kl
    one = put_back(student, teacher, sizes[1].layers, sizes[1].teacher_share)
    assert one.config.plan == sizes[1].layer_plan
    assert evaluate_model(one, rows, teacher=teacher)["kl"] == pytest.approx(sizes[1].kl, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_layer_before_takes_up_what_is_dropped(family):
    teacher, plan, rows = make_teacher(family), [0, 1, 2, DROP, DROP, 5], rows_of(96)
    student, report = convert(teacher, plan, rows)
    copied, _ = convert(teacher, plan)
    assert report.taken_up.keys() == {2} and 0 < report.taken_up[2] < 1 and "1 taking up" in str(report)
    name = "transformer.h.2.mlp.c_proj" if family == "gpt2" else "model.layers.2.mlp.down_proj"
    before, after = (dict(each.language_model.named_parameters()) for each in (copied, student))
    differing = {key for key in before if not torch.equal(before[key], after[key])}
    assert differing == {f"{name}.weight", *([f"{name}.bias"] if family == "gpt2" else [])}
    kl = [evaluate_model(each, rows[72:], teacher=teacher)["kl"] for each in (copied, student)]
    assert kl[1] < kl[0] and kl[1] == pytest.approx(report.kl["tuned"], rel=1e-3)


def test_what_takes_up_is_found_once(monkeypatch):
    """Each time costs two forward passes."""
    teacher, plan, rows, asked = make_teacher(), [0, 1, 2, DROP, DROP, 5], rows_of(8), []
    is_added = taking_up._is_added
    monkeypatch.setattr(taking_up, "_is_added", lambda *given: asked.append(given) or is_added(*given))
    student, report = convert(teacher, plan, rows)
    assert len(asked) == 1
    # For what a stopped run keeps, too.
    projection = student.language_model.model.layers[2].mlp.down_proj
    assert find_tuned(student, SharingPlan(plan)) == {"2.mlp": projection} and len(asked) == 1


@pytest.mark.parametrize(("family", "options"), [("llama", {"refit": False}), ("olmo2", {})])
def test_dropped_layers_that_nothing_takes_up_are_copied(family, options):
    teacher, plan, rows = make_teacher(family), [0, 1, 2, DROP, 4, 5], rows_of(8)
    student, report = convert(teacher, plan, rows, **options)
    copied, _ = convert(teacher, plan)
    assert report.kl.keys() == {"copied"} and not report.taken_up
    assert all(torch.equal(one, other) for one, other in zip(student.parameters(), copied.parameters(), strict=True))


def test_taking_up_is_the_ridge_of_what_is_missing():
    """By hand: the student's states after the layer, the teacher's after the dropped ones, one regression."""
    teacher, plan, rows = make_teacher().double(), [0, 1, 2, DROP, 4, 5], rows_of(96)
    student, report = convert(teacher, plan, rows)
    copied, _ = convert(teacher, plan)
    inputs, missing, seen = [], [], {}
    teacher.model.layers[3].register_forward_hook(lambda m, a, o: seen.update(after=o))
    block = copied.language_model.model.layers[2]
    block.register_forward_hook(lambda m, a, o: seen.update(states=o))
    block.mlp.down_proj.register_forward_hook(lambda m, a, o: seen.update(inputs=a[0]))
    for part in (rows[:72], rows[72:]):
        ids = torch.tensor([row["input_ids"] for row in part])
        with torch.no_grad():
            teacher(ids), copied(ids)
        inputs.append(seen["inputs"].flatten(0, 1))
        missing.append((seen["after"] - seen["states"]).flatten(0, 1))
    gram, cross = inputs[0].T @ inputs[0], inputs[0].T @ missing[0]
    scale, found = torch.linalg.eigvalsh(gram).mean(), {}
    for ridge in RIDGES:
        change = torch.linalg.solve(gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype), cross)
        found[float((missing[1] - inputs[1] @ change).square().sum() / missing[1].square().sum())] = change
    share = min(found)
    assert report.taken_up[2] == pytest.approx(share, rel=1e-6)
    down = [each.language_model.model.layers[2].mlp.down_proj.weight for each in (copied, student)]
    torch.testing.assert_close((down[1] - down[0]).T, found[share], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("family", "takes"), [("llama", True), ("gpt2", True), ("phi", True), ("olmo2", False), ("mixtral", False)]
)
def test_only_what_is_added_to_the_hidden_states_takes_up(family, takes):
    """Not a norm after the MLP, and not one of several experts."""
    assert (find_takers(make_teacher(family), [2]) != {}) == takes


def test_dropping_from_a_family_whose_layers_compute_by_their_index_is_refused():
    """The weights fit, but attention is divided by the number of the layer."""
    teacher = make_teacher("gpt2", num_hidden_layers=5, scale_attn_by_inverse_layer_idx=True)
    with torch.no_grad():
        for block in teacher.transformer.h:
            block.attn.c_attn.weight.mul_(30)
            block.attn.c_proj.weight.mul_(30)
    with pytest.raises(
        ValueError, match="cannot be dropped from the family 'gpt2': its configuration gives other layers"
    ):
        make_student(teacher, [0, DROP, 2, 3, 4])
