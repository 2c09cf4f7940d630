"""Costs and ceilings: against PyTorch's own counter, and against hand counts."""

import pytest
import torch
from conftest import make_batch, make_teacher, plan_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from echoatt_hf import EchoAttConfig, EchoAttForCausalLM
from echoatt_hf.benchmark.costs import count_costs, is_replayed
from echoatt_hf.benchmark.shapes import SHAPES
from echoatt_hf.conversion.dropping import drop_layers
from echoatt_hf.planning.sharing import SharingPlan


pytestmark = pytest.mark.once


def count_operations(run) -> int:
    """Without the angles of rotary embedding, which some versions compute as a product and the formulas leave out."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    return counter.get_total_flops() - sum(count for name, count in counts.items() if name.endswith("rotary_emb"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_forward_and_training_are_what_pytorch_counts(family):
    teacher = make_teacher(family, "eager")
    costs, batch = count_costs(teacher), make_batch(3, 14)["input_ids"]
    assert count_operations(lambda: teacher(batch, use_cache=False)) == costs.forward_operations(3, 14)
    step = lambda: teacher(batch, use_cache=False).logits.sum().backward()  # noqa: E731
    assert count_operations(step) == costs.training_operations(3, 14) == 3 * costs.forward_operations(3, 14)
    frozen = make_teacher(family, "eager", tie_word_embeddings=False)
    trained = {id(module.weight) for module in frozen.modules() if isinstance(module, nn.Embedding)}
    for parameter in frozen.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    step = lambda: frozen(batch, use_cache=False).logits.sum().backward()  # noqa: E731
    assert count_operations(step) == count_costs(frozen).training_operations(3, 14, frozen=True)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("mode", ["auto", "replay"])
def test_a_student_costs_what_pytorch_counts(family, mode):
    """Echo layers multiply the weights that eager attention has made, or repeat the whole call."""
    student = EchoAttForCausalLM.from_teacher(make_teacher(family, "eager", sliding_window=None), plan_of(family))
    student.config.echo_decode = mode
    costs, batch = count_costs(student), make_batch(3, 14)["input_ids"]
    replays = is_replayed(student, 14)
    assert replays == (mode == "replay")
    per_layer, echoes = costs.output_features // 6, len(student.config.echo_layers)
    assert (costs.query_features, costs.echo_features) == ((6 - echoes) * per_layer, echoes * per_layer)
    counted = count_operations(lambda: student(batch, use_cache=False))
    assert counted == costs.forward_operations(3, 14, replays=replays)
    counted = count_operations(lambda: student(batch, use_cache=False).logits.sum().backward())
    assert counted == costs.training_operations(3, 14, replays=replays)
    cache = DynamicCache(config=student.config)
    with torch.no_grad():
        student(batch[:, :13], past_key_values=cache, use_cache=True)
        counted = count_operations(lambda: student(batch[:, 13:], past_key_values=cache, use_cache=True))
    assert counted == costs.forward_operations(3, 1, 14, replays=is_replayed(student, 1))


def test_replay_repeats_what_the_teacher_does():
    """So all that a student saves in a prefill with fused attention is the projections."""
    teacher = make_teacher("llama")
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"))
    assert is_replayed(student, 14) and not is_replayed(student, 1) and not is_replayed(teacher, 14)
    before, after = count_costs(teacher), count_costs(student)
    saved = before.forward_operations(3, 14) - after.forward_operations(3, 14, replays=True)
    assert saved == 2 * 3 * 14 * (before.linear_weights - after.linear_weights)


def test_ceilings_of_tinyllama():
    """Those of the two ways, at 9 of 22 layers: replay's falls with the length, that of kept weights rises."""
    teacher, student = map(count_costs, make_tiny_llama())
    ceilings = {
        replays: [
            teacher.forward_operations(1, tokens) / student.forward_operations(1, tokens, replays=replays)
            for tokens in (2048, 8192, 32768)
        ]
        for replays in (True, False)
    }
    assert ceilings[True] == pytest.approx([1.036, 1.025, 1.011], abs=0.001)
    assert ceilings[False] == pytest.approx([1.07, 1.12, 1.19], abs=0.005)


def make_tiny_llama():
    config = AutoConfig.for_model(**SHAPES["TinyLlama-1.1B"])
    plan = list(SharingPlan.from_ratio(22, 0.41))
    assert len(SharingPlan(plan).echo_layers) == 9
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config)
        student = EchoAttForCausalLM(EchoAttConfig(text_config=config, echo_sources=plan))
    return teacher, student


def test_hand_counts_for_tinyllama():
    teacher, student = map(count_costs, make_tiny_llama())
    layer = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632
    assert teacher.linear_weights == 22 * layer + 32000 * 2048
    assert teacher.linear_weights - student.linear_weights == 9 * (2048 * 2048 + 2048 * 256) == 9 * 4_718_592
    forward = 2 * 2048 * (22 * layer + 32000 * 2048) + 22 * 4 * 2048 * 2048 * 2048
    assert teacher.forward_operations(1, 2048) == forward
    saved = 9 * (2 * 2048 * 4_718_592 + 2 * 2048 * 2048 * 2048)
    assert forward - student.forward_operations(1, 2048) == saved
    assert saved / forward == pytest.approx(0.066, abs=0.0005)
    # Float32: all weights but the input embedding, keys and values of four heads of 64 features in 22 layers.
    # They are read by attention, and read and written by the cache.
    assert teacher.decode_bytes(8, 2048) == 4 * (1_100_048_384 - 32000 * 2048) + 8 * 2048 * 22 * 2 * 256 * 4 * 3
    assert student.decode_bytes(1, 0) == teacher.decode_bytes(1, 0) - 4 * 9 * 4_718_592
    assert student.kv_bytes == student.cache_bytes == (44 - 9) * 256 * 4
    # An echo layer that replays reads the keys of its source once more.
    again = student.decode_bytes(8, 2048, replays=True) - student.decode_bytes(8, 2048)
    assert again == 8 * 2048 * 9 * 256 * 4


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("TinyLlama-1.1B", 1_100_048_384),
        ("SmolLM2-135M", 134_515_008),
        ("SmolLM2-360M", 361_821_120),
        ("Qwen2.5-0.5B", 494_032_768),
        ("Llama-3.2-1B", 1_235_814_400),
    ],
)
def test_named_shapes_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
    assert model.num_parameters() == parameters


def test_bytes_of_tied_embeddings_are_read_once():
    tied, untied = (count_costs(make_teacher("llama", tie_word_embeddings=tied)) for tied in (True, False))
    assert tied == untied


def test_bytes_follow_the_dtype():
    whole, half = count_costs(make_teacher("llama")), count_costs(make_teacher("llama").bfloat16())
    assert (half.weight_bytes, half.kv_bytes) == (whole.weight_bytes // 2, whole.kv_bytes // 2)


def test_baselines():
    teacher = make_teacher("llama", tie_word_embeddings=False)
    before, fewer = count_costs(teacher), count_costs(drop_layers(teacher, [2]))
    layer = sum(
        module.weight.numel() for module in teacher.model.layers[2].modules() if hasattr(module, "in_features")
    )
    assert before.linear_weights - fewer.linear_weights == layer
    assert fewer.kv_bytes == before.kv_bytes * 5 // 6
    # Two of six layers have no keys and values of their own; they read those of others, in a model and in a cache.
    sharing = count_costs(EchoAttForCausalLM.from_teacher(teacher, [0, 1, "kv 1", "kv 1", 4, 5]))
    assert before.linear_weights - sharing.linear_weights == 2 * 2 * 32 * 16
    assert sharing.kv_bytes == before.kv_bytes and sharing.query_features == before.query_features
    assert sharing.cache_bytes == before.cache_bytes * 4 // 6


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "jamba"])
def test_experts_are_not_counted(family):
    assert count_costs(make_teacher(family)) is None
