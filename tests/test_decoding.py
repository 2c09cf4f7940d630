"""Decoding with the attention weights of the source: the same as replay and as the slow oracle, where it is chosen and why."""

import copy
import weakref

import pytest
import torch
from conftest import CHECKPOINTING, FP32_TOLERANCE, decode, make_batch, make_teacher, plan_of, positions_of
from oracle import make_oracle
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from echoatt_hf import EchoAttForCausalLM
from echoatt_hf.modeling_echoatt import AttentionRecord, AttentionWeights, EchoRecords
from echoatt_hf.models.families import find_attention_modules


# Grouped, multi-query and plain heads; sliding windows; rotary embedding in part, learned positions; norms; experts.
FAMILIES = ["llama", "qwen3", "gemma3_text", "mistral", "phi", "gpt2", "gpt_bigcode", "gpt_neox", "mixtral", "granite"]
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=24),
}


def make_student(family: str = "llama", attention: str | None = "sdpa", **overrides) -> EchoAttForCausalLM:
    return EchoAttForCausalLM.from_teacher(make_teacher(family, attention, **overrides), plan_of(family))


@torch.no_grad()
def record_of(model: EchoAttForCausalLM, **inputs) -> AttentionRecord | AttentionWeights:
    """What the first source of a model records, as its first echo finds it."""
    seen = []
    echo = find_attention_modules(model)[model.config.echo_layers[0]]
    hook = echo.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["echo_records"].get(module.echo_source, torch.device("cpu"))),
        with_kwargs=True,
    )
    model(**inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_equal_replay_and_the_oracle(family, attention, cache):
    """Padded rows, and steps within the sliding window of eight tokens and beyond it."""
    teacher = make_teacher(family, attention)
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of(family))
    batch = make_batch(3, 14, padding=(5, 0, 2))
    with torch.no_grad():
        expected = make_oracle(teacher, plan_of(family))(
            **batch, position_ids=positions_of(batch), use_cache=False
        ).logits
    found = {}
    for mode in ("weights", "replay", "auto"):
        student.config.echo_decode = mode
        with torch.no_grad():
            found[mode] = decode(student, batch, CACHES[cache](student.config), 5)[:, 5:]
        torch.testing.assert_close(found[mode], expected[:, 5:], **FP32_TOLERANCE)
    torch.testing.assert_close(found["weights"], found["replay"], **FP32_TOLERANCE)
    assert torch.equal(found["auto"], found["weights"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bf16_is_as_exact_as_replay(attention):
    teacher = make_teacher("llama", attention)
    batch = make_batch(8, 24)
    with torch.no_grad():
        expected = make_oracle(teacher, plan_of("llama"))(**batch, use_cache=False).logits[:, 9:]
    student = EchoAttForCausalLM.from_teacher(teacher.bfloat16(), plan_of("llama"))
    errors = {}
    for mode in ("weights", "replay"):
        student.config.echo_decode = mode
        with torch.no_grad():
            found = decode(student, batch, DynamicCache(config=student.config), 9)[:, 9:]
        assert found.dtype == torch.bfloat16
        errors[mode] = float((found - expected).norm())
    assert 0 < errors["weights"] <= 1.1 * errors["replay"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attentions_are_an_output_as_in_replay(attention):
    """In eager mode; sdpa gives none, whether it is replayed or not."""
    student = make_student("llama", attention)
    outputs = {}
    for mode in ("weights", "replay"):
        student.config.echo_decode = mode
        outputs[mode] = student(make_batch(2, 1)["input_ids"], output_attentions=True).attentions
    if attention == "sdpa":
        assert all(weights is None for step in outputs.values() for weights in step)
    else:
        for found, expected in zip(outputs["weights"], outputs["replay"], strict=True):
            torch.testing.assert_close(found, expected, **FP32_TOLERANCE)


def test_gradients_of_a_single_token_equal_replay():
    student = make_student("llama").train()
    batch = make_batch(3, 10)
    gradients = {}
    for mode in ("weights", "replay"):
        student.config.echo_decode = mode
        cache = DynamicCache(config=student.config)
        student.zero_grad()
        student(batch["input_ids"][:, :9], past_key_values=cache, use_cache=True)
        student(batch["input_ids"][:, 9:], past_key_values=cache, use_cache=True).logits.square().sum().backward()
        gradients[mode] = [parameter.grad.clone() for parameter in student.parameters()]
    for found, expected in zip(*gradients.values(), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-7


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        storage = result.untyped_storage().nbytes() // result.element_size()
        inputs = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        if result.untyped_storage().data_ptr() not in inputs:
            self.numel = max(self.numel, storage)
        return result


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_heads_are_not_expanded(masked):
    """The largest thing made has a number for each head and token; the values have eight times as many, expanded 32."""
    query, key, value = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool) if masked else None
    with LargestResult() as largest:
        record = AttentionRecord("sdpa", query, key, mask, {"scaling": 0.25}).to_weights()
        record.attend(None, value)
    assert largest.numel == record.weights.numel() == 2 * 8 * 40


@pytest.mark.parametrize("scaling", [None, 0.7])
def test_weights_are_those_of_torch(scaling):
    query, key, value = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    found = AttentionRecord("sdpa", query, key, None, {"scaling": scaling}).to_weights().attend(None, value)[0]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    torch.testing.assert_close(found.transpose(1, 2), expected, **FP32_TOLERANCE)


def test_weights_are_chosen_for_one_plain_query_token():
    student = make_student("llama")
    one, two = (make_batch(2, length)["input_ids"] for length in (1, 2))
    assert type(record_of(student, input_ids=one)) is AttentionWeights
    assert type(record_of(student, input_ids=two)) is AttentionRecord
    student.config.echo_decode = "replay"  # it may be changed at any time
    assert type(record_of(student, input_ids=one)) is AttentionRecord
    student.config.echo_decode = "weights"
    assert type(record_of(student, input_ids=one)) is AttentionWeights
    assert type(record_of(student, input_ids=two)) is AttentionRecord


def check_replays_and_says_why(student: EchoAttForCausalLM, message: str, **inputs) -> None:
    assert student.config.echo_decode == "auto"
    assert type(record_of(student, **inputs)) is AttentionRecord
    student.config.echo_decode = "weights"
    with pytest.raises(ValueError, match=message) as error, torch.no_grad():
        student(**inputs)
    assert "set it to 'auto' or 'replay'" in str(error.value)


def test_what_is_more_than_weights_is_replayed():
    student, one = make_student("llama", "flex_attention"), make_batch(2, 1)["input_ids"]
    with torch.compiler.set_stance("force_eager"):
        check_replays_and_says_why(student, "implementation 'flex_attention'", input_ids=one)


@pytest.mark.parametrize("family", ["gpt_oss", "granite_swa"])
def test_sinks_are_replayed(family):
    one = make_batch(2, 1)["input_ids"]
    check_replays_and_says_why(make_student(family, "eager"), "further arguments: s_aux", input_ids=one)


@pytest.mark.parametrize("family", ["llama", "gemma2"], ids=["plain", "soft-cap"])
@pytest.mark.parametrize("mode", ["auto", "weights"])
@pytest.mark.parametrize("length", [1, 7])
def test_eager_attention_keeps_the_weights_that_it_made(family, mode, length):
    student, ids = make_student(family, "eager"), make_batch(2, length)["input_ids"]
    student.config.echo_decode = mode
    kept, expected = record_of(student, input_ids=ids), student(ids, use_cache=False).logits
    assert type(kept) is AttentionWeights and kept.weights.shape[2] == length
    student.config.echo_decode = "replay"
    assert type(record_of(student, input_ids=ids)) is AttentionRecord
    torch.testing.assert_close(student(ids, use_cache=False).logits, expected, **FP32_TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_gradients_of_eager_weights_equal_replay(family, checkpointing):
    student = make_student(family, "eager").train()
    if checkpointing:
        getattr(student, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    batch, gradients = make_batch(3, 10, padding=(2, 0, 1)), {}
    for mode in ("auto", "replay"):
        student.config.echo_decode = mode
        student.zero_grad()
        student(**batch, use_cache=False).logits.square().sum().backward()
        gradients[mode] = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    for name, expected in gradients["replay"].items():
        assert (gradients["auto"][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-6, name


def test_dropout_is_replayed_in_training_only():
    student = make_student("llama", attention_dropout=0.5)
    inputs = {"input_ids": make_batch(2, 1)["input_ids"]}
    assert type(record_of(student, **inputs)) is AttentionWeights
    check_replays_and_says_why(student.train(), "dropout 0.5", **inputs)


def test_an_argument_nobody_knows_is_replayed():
    check_replays_and_says_why(
        make_student("llama"), "further arguments: tilt", input_ids=make_batch(2, 1)["input_ids"], tilt=0.5
    )


def test_paged_caches_are_replayed():
    call = AttentionRecord("paged|sdpa", torch.ones(1, 4, 1, 8), torch.ones(1, 2, 3, 8), None, {})
    assert not call.is_plain()
    call.implementation = "sdpa"
    assert call.is_plain()


def test_weights_move_to_the_device_of_an_echo():
    weights = AttentionWeights(torch.ones(1, 4, 1, 3), True)
    assert weights.to(torch.device("cpu")) is weights
    moved = weights.to(torch.device("meta"))
    assert moved.weights.device.type == "meta" and moved.is_eager


def test_echo_decode_is_saved_and_loaded(tmp_path):
    student = make_student("llama")
    student.config.echo_decode = "replay"
    student.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.echo_decode == "replay"
    assert AutoModelForCausalLM.from_pretrained(tmp_path, echo_decode="weights").config.echo_decode == "weights"
    with pytest.raises(ValueError, match="echo_decode is 'fast'; it must be one of auto, weights, replay"):
        AutoModelForCausalLM.from_pretrained(tmp_path, echo_decode="fast")


@pytest.mark.parametrize("value", ["fast", None, True, ["auto"]], ids=repr)
def test_unknown_echo_decode_is_refused_at_once(value):
    config = copy.deepcopy(make_student("llama").config)
    with pytest.raises(ValueError, match="it must be one of auto, weights, replay"):
        config.echo_decode = value
    with pytest.raises(ValueError, match="it must be one of auto, weights, replay"):
        type(config)(text_config=config.text_config, echo_sources=config.echo_sources, echo_decode=value)


@pytest.mark.parametrize(("with_gradients", "alive"), [(False, 0), (True, 2)])
def test_a_record_goes_with_its_last_echo(with_gradients, alive, monkeypatch):
    """Of a prompt; where a backward pass may compute layers again all stay."""
    student = EchoAttForCausalLM.from_teacher(make_teacher("llama", num_hidden_layers=7), [0, 1, 1, 1, 4, 4, 6])
    attentions, made, found = find_attention_modules(student), [], []
    record = EchoRecords.record

    def remember(self, call, *args):
        made.append(weakref.ref(call))
        return record(self, call, *args)

    monkeypatch.setattr(EchoRecords, "record", remember)
    attentions[6].register_forward_pre_hook(lambda *_: found.append(sum(call() is not None for call in made)))
    with torch.set_grad_enabled(with_gradients):
        student(**make_batch(2, 12), use_cache=False)
    assert len(made) == 2 and found == [alive]
