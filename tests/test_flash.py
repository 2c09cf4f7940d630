"""Flash and paged attention under every name they have, with a stub in the place of the kernels, which need a GPU."""

import copy

import pytest
import torch
import transformers
import transformers.modeling_flash_attention_utils as flash
from conftest import FP32_TOLERANCE, decode, make_batch, make_teacher, plan_of
from packaging.version import Version
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.integrations.flash_attention import flash_attention_forward

from echoatt_hf import EchoAttForCausalLM, SharingPlan, convert


KERNEL = "kernels-community/stub-of-flash"
NAMES = ["flash_attention_2", "flash_attention_3", KERNEL]


def attend(query, key, value, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """What the kernels compute, `(B, T, H, D)`, for rows that are not padded."""
    repeats = query.shape[2] // key.shape[2]
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    is_causal = causal and query.shape[2] > 1
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=softmax_scale).transpose(1, 2)


def attend_to_rows_of_any_length(query, key, value, cu_seqlens_q, cu_seqlens_k, causal=False, **options):
    """The same of rows that lie one after the other, `(N, H, D)`; those of queries are the ends of those of keys."""
    outputs, (queries, keys) = [], (ends.tolist() for ends in (cu_seqlens_q, cu_seqlens_k))
    for row in range(len(queries) - 1):
        new, old = slice(*queries[row : row + 2]), slice(*keys[row : row + 2])
        earlier = old.stop - old.start - (new.stop - new.start)
        padded = torch.cat([query.new_zeros(earlier, *query.shape[1:]), query[new]])
        found = attend(
            padded[None], key[old][None], value[old][None], softmax_scale=options["softmax_scale"], causal=causal
        )
        outputs.append(found[0, earlier:])
    return torch.cat([*outputs, query.new_zeros(len(query) - queries[-1], *query.shape[1:])])


@pytest.fixture
def asked(monkeypatch):
    """The implementations whose kernels were asked for."""
    names = []

    def import_kernels(implementation, *args, **kwargs):
        names.append(implementation)
        if implementation not in NAMES:
            raise ValueError(f"there is no kernel {implementation}")
        return attend, attend_to_rows_of_any_length, None, flash._pad_input, flash._unpad_input

    monkeypatch.setattr(flash, "_lazy_imports", import_kernels)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    # That there is a GPU is checked there.
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *args, **kwargs: True)
    monkeypatch.setattr(
        PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, *args, **kwargs: name or "sdpa"
    )
    interface = AttentionInterface()
    monkeypatch.setitem(AttentionInterface._global_mapping, KERNEL, flash_attention_forward)
    assert KERNEL in interface.valid_keys()
    return names


@pytest.mark.parametrize("name", NAMES)
def test_student_in_flash_attention(name, asked):
    teacher = make_teacher("llama")
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"))
    batch = make_batch(2, 10)
    with torch.no_grad():
        expected = student(**batch).logits
        student.set_attn_implementation(name)
        assert student.config.text_config._attn_implementation == name
        torch.testing.assert_close(student(**batch, use_cache=False).logits, expected, **FP32_TOLERANCE)
        decoded = decode(student, batch, DynamicCache(config=student.config), 4)
    torch.testing.assert_close(decoded, expected, **FP32_TOLERANCE)
    assert {*asked} == {name}


@pytest.mark.parametrize("name", NAMES)
def test_teacher_in_flash_attention_is_converted(name, asked, tmp_path):
    teacher, plan, batch = make_teacher("llama"), plan_of("llama"), make_batch(2, 10)
    expected, _ = convert(teacher, plan)
    teacher.set_attn_implementation(name)
    student, _ = convert(teacher, plan)
    assert student.config._attn_implementation == name
    student.save_pretrained(tmp_path)
    loaded = EchoAttForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    with torch.no_grad():
        for model in (student, loaded):
            torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, **FP32_TOLERANCE)
    assert {*asked} == {name}


def test_keys_and_values_are_shared_in_flash_attention(asked):
    batch, model = (
        make_batch(2, 10),
        EchoAttForCausalLM.from_teacher(make_teacher("llama"), SharingPlan(plan_of("llama")).with_kv()),
    )
    with torch.no_grad():
        expected = model(**batch).logits
        in_flash = copy.deepcopy(model)
        in_flash.set_attn_implementation(NAMES[0])
        torch.testing.assert_close(in_flash(**batch, use_cache=False).logits, expected, **FP32_TOLERANCE)
    assert {*asked} == {NAMES[0]}


@pytest.mark.parametrize("attention", ["eager", "sdpa", "paged|eager", *NAMES])
def test_paged_attention(attention, asked):
    if attention in NAMES and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("the stub stands for the kernels as newer versions load them for pages")
    student = EchoAttForCausalLM.from_teacher(make_teacher("llama"), plan_of("llama"))
    student.set_attn_implementation(attention.removeprefix("paged|"))
    prompt = make_batch(1, 7)["input_ids"]
    options = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = student.generate(prompt, generation_config=options)[0, 7:].tolist()
    student.set_attn_implementation(attention)
    found = student.generate_batch(
        [prompt[0].tolist()],
        generation_config=options,
        # Without it the pages take most of the memory that is free.
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32),
        progress_bar=False,
    )
    (result,) = found.values()
    assert result.error is None and result.generated_tokens == expected
    assert {*asked} == {attention.removeprefix("paged|")} & {*NAMES}
