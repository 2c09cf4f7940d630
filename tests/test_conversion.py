"""What a conversion reports, and what it saves at the paper's size."""

import functools
import json

import pytest
import torch
from conftest import make_batch, make_teacher, plan_of
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import QuantoQuantizedLayer

from echoatt_hf import (
    EchoAttConfig,
    EchoAttForCausalLM,
    SharingPlan,
    convert,
    count_cache_bytes,
    count_kv_bytes_per_token,
)


TINYLLAMA = {
    "num_hidden_layers": 22,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("ratio", "echo_layers", "kv_saved", "parameters_saved"),
    [(0.23, 5, 0.114, 0.021), (0.41, 9, 0.205, 0.039), (0.77, 17, 0.386, 0.073)],
)
def test_savings_at_the_size_of_tinyllama(ratio, echo_layers, kv_saved, parameters_saved):
    plan = SharingPlan.from_ratio(22, ratio)
    config = LlamaConfig(**TINYLLAMA, dtype="bfloat16")
    with torch.device("meta"):
        teacher = LlamaForCausalLM._from_config(config)
        student = EchoAttForCausalLM._from_config(
            EchoAttConfig(text_config=LlamaConfig(**TINYLLAMA), echo_sources=list(plan), dtype="bfloat16")
        )
    assert len(plan.echo_layers) == echo_layers
    # 4 heads of 64 for keys and as many for values, in 22 layers, two bytes each.
    assert count_kv_bytes_per_token(teacher) == 2 * 4 * 64 * 22 * 2
    assert 1 - count_kv_bytes_per_token(student) / count_kv_bytes_per_token(teacher) == pytest.approx(
        kv_saved, abs=5e-4
    )
    for make_cache in (DynamicCache, functools.partial(StaticCache, max_cache_len=64)):
        caches = [make_cache(config=model.config) for model in (teacher, student)]
        for model, cache in zip((teacher, student), caches, strict=True):
            model(torch.zeros(2, 64, dtype=torch.long, device="meta"), past_key_values=cache)
            assert count_cache_bytes(cache) == 2 * 64 * count_kv_bytes_per_token(model)
    assert teacher.num_parameters() - student.num_parameters() == echo_layers * 2048 * (2048 + 256)
    assert 1 - student.num_parameters() / teacher.num_parameters() == pytest.approx(parameters_saved, abs=5e-4)


def test_cache_bytes_of_sliding_windows():
    """Layers with a window hold one token less than the window, as the token to come fills it."""
    teacher, plan = make_teacher("gemma3_text"), plan_of("gemma3_text")
    caches = []
    for model in (teacher, EchoAttForCausalLM.from_teacher(teacher, plan)):
        caches.append(DynamicCache(config=model.config))
        assert count_cache_bytes(caches[-1]) == 0
        model(make_batch(2, 20)["input_ids"], past_key_values=caches[-1])
    # Layers of each type, in rows x heads x head size x bytes, once for keys and once for values.
    tokens = 3 * 7 + 3 * 20
    assert count_cache_bytes(caches[0]) == 2 * tokens * 2 * 2 * 8 * 4
    # Layer 2 has a window, 3 and 5 have none.
    assert count_cache_bytes(caches[1]) == (2 * tokens - 7 - 20 - 20) * 2 * 2 * 8 * 4


def test_quantized_cache_is_not_counted():
    cache = DynamicCache()
    cache.layers.append(QuantoQuantizedLayer.__new__(QuantoQuantizedLayer))
    with pytest.raises(ValueError, match="cannot count a quantized cache"):
        count_cache_bytes(cache)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_report_lists_every_parameter_once(family):
    teacher, plan = make_teacher(family), plan_of(family)
    student, report = convert(teacher, plan)
    names = [name for name, _ in teacher.named_parameters()]
    assert sorted(report.copied + report.dropped) == sorted(names)
    assert report.copied == [name for name, _ in student.language_model.named_parameters()]
    dropped_layers = {int(name.split(".")[2]) for name in report.dropped}
    assert dropped_layers == {layer for layer, source in enumerate(plan) if layer != source}
    assert all(".q_" in name or ".k_" in name for name in report.dropped)
    sizes = {name: value.numel() for name, value in teacher.named_parameters()}
    assert report.teacher_parameters - report.student_parameters == sum(sizes[name] for name in report.dropped)
    assert report.student_kv_bytes_per_token == count_kv_bytes_per_token(student)


def test_report_as_text_and_json(tiny_teacher):
    _, report = convert(tiny_teacher, [0, 1, 1, 1, 4])
    text = str(report)
    for line in ("0 1 2→1 3→1 4", "dropped      4 tensors", "model.layers.2.self_attn.q_proj"):
        assert line in text
    assert f"{report.teacher_parameters:,} → {report.student_parameters:,} (-" in text
    # Two of five layers keep values only: 8 of 10 parts are left.
    assert "(-20.0%) per token" in text
    assert json.loads(json.dumps(report.to_dict()))["echo_sources"] == [0, 1, 1, 1, 4]


def test_plan_without_echoes_drops_nothing(tiny_teacher):
    _, report = convert(tiny_teacher, range(5))
    assert report.dropped == []
    assert report.teacher_parameters == report.student_parameters
    assert "dropped      0 tensors: none" in str(report)


def test_teacher_by_path(tiny_teacher, tmp_path):
    tiny_teacher.save_pretrained(tmp_path)
    student, _ = convert(str(tmp_path), [0, 1, 1, 1, 4])
    ids = torch.arange(1, 9)[None]
    expected, _ = convert(tiny_teacher, [0, 1, 1, 1, 4])
    assert torch.equal(student(ids).logits, expected(ids).logits)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        convert(str(tmp_path / "missing"), [0])
