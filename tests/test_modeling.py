import copy
import filecmp
import importlib
import io
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from conftest import (
    CHECKPOINTING,
    FP32_TOLERANCE,
    make_batch,
    make_config,
    make_teacher,
    plan_of,
)
from families import DIVERSE, VOCAB_SIZE
from oracle import make_oracle
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import echoatt_hf
from echoatt_hf import (
    EchoAttConfig,
    EchoAttForCausalLM,
    EchoAttForSequenceClassification,
    EchoAttForTokenClassification,
    EchoAttModel,
    modeling_echoatt,
)
from echoatt_hf.modeling_echoatt import EchoRecords
from echoatt_hf.models.families import find_attention_modules
from echoatt_hf.planning.sharing import SharingPlan


PLAN = [0, 1, 1, 1, 4]
DIVERSE_FAMILIES = pytest.mark.parametrize("family", DIVERSE)
EVERY_MODEL = pytest.mark.parametrize(
    "model_class",
    [EchoAttForCausalLM, EchoAttModel, EchoAttForSequenceClassification, EchoAttForTokenClassification],
)


def make_student(family: str = "llama", attention: str = "sdpa", plan: list[int] | None = None, **overrides):
    return EchoAttForCausalLM.from_teacher(make_teacher(family, attention, **overrides), plan or plan_of(family))


def attentions_of(model: nn.Module) -> list[nn.Module]:
    """Attention modules by layer. They alone have both, in the families of these tests."""
    found = {module.layer_idx: module for module in model.modules() if hasattr(module, "v_proj")}
    return [found[layer] for layer in sorted(found)]


def kept(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """Logits of tokens: those of padding are not defined."""
    return logits[batch["attention_mask"].bool()]


def enable_checkpointing(model: nn.Module, options: dict | None, **kwargs) -> None:
    getattr(model, f"{CHECKPOINTING}_enable")(**{f"{CHECKPOINTING}_kwargs": options}, **kwargs)


def is_checkpointing(model: nn.Module) -> bool:
    return getattr(model, f"is_{CHECKPOINTING}")


def loss_of(model: nn.Module, batch: dict) -> torch.Tensor:
    """Of the order of the number of tokens, so that gradients are not tiny."""
    logits = kept(model(**batch, use_cache=False).logits, batch)
    generator = torch.Generator().manual_seed(5)
    return (logits.log_softmax(-1) * torch.rand(logits.shape, generator=generator)).sum()


def gradients_of(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    return {
        name.removeprefix("language_model."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same_gradients(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error <= 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("every_n_layers", [1, 2], ids=["every-layer", "every-second-layer"])
def test_gradients_of_checkpointed_layers_equal_the_oracle(family, every_n_layers):
    teacher = make_teacher(family)
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of(family)).train()
    batch = make_batch(2, 14, padding=(4,))
    expected = gradients_of(make_oracle(teacher, plan_of(family)).train(), batch)
    calls = [0] * 6
    for layer, attention_module in enumerate(attentions_of(student)):
        attention_module.register_forward_pre_hook(lambda *_, layer=layer: calls.__setitem__(layer, calls[layer] + 1))
    enable_checkpointing(student, {"use_reentrant": False}, every_n_layers=every_n_layers)
    found = gradients_of(student, batch)
    assert calls == [2 if layer % every_n_layers == 0 else 1 for layer in range(6)]
    echoes = student.config.echo_layers
    assert set(expected) == set(dict(student.language_model.named_parameters()))
    assert not any(f"layers.{layer}.self_attn.q_proj.weight" in expected for layer in echoes)
    assert_same_gradients(found, expected)


def test_every_parameter_gets_a_gradient_from_the_loss():
    student = make_student("qwen3").train()
    batch = make_batch()
    student(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_loss_is_the_family_loss():
    student = make_student("llama")
    batch = make_batch(2, 12, padding=(3,))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = student(**batch, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    count = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(student(**batch, labels=labels, num_items_in_batch=2 * count).loss, expected / 2)


@pytest.mark.parametrize(
    ("family", "dropout"),
    [("seed_oss", "residual_dropout"), ("starcoder2", "residual_dropout"), ("gpt2", "resid_pdrop")],
)
def test_dropout_of_the_attention_output_reaches_echo_layers(family, dropout):
    """These drop out the output of their attention in training; with all of it dropped nothing is left."""
    teacher = make_teacher(family, **{dropout: 1.0})
    student = EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 1, 4, 4])
    for model in (teacher, student):
        outputs = []
        for attention in find_attention_modules(model).values():
            attention.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output[0]))
        model.train()(**make_batch())
        assert [bool(output.any()) for output in outputs] == [False] * 6


# From a teacher


@DIVERSE_FAMILIES
def test_without_echo_layers_logits_are_the_teachers(family):
    teacher = make_teacher(family)
    student = EchoAttForCausalLM.from_teacher(teacher, range(6))
    batch = make_batch(2, 14, padding=(3,))
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, teacher(**batch).logits)
        assert torch.equal(
            student.generate(**batch, max_new_tokens=6, do_sample=False),
            teacher.generate(**batch, max_new_tokens=6, do_sample=False),
        )


@pytest.mark.parametrize("family", [family for family in DIVERSE if family != "gpt2"])
def test_student_inherits_all_but_queries_and_keys_of_echo_layers(family):
    teacher = make_teacher(family)
    plan = plan_of(family)
    student = EchoAttForCausalLM.from_teacher(teacher, plan)
    before, after = teacher.state_dict(), student.language_model.state_dict()
    echoes = [layer for layer, source in enumerate(plan) if layer != source]
    parts = ("q_proj.", "k_proj.", "q_norm.", "k_norm.")
    dropped = {
        name
        for name in before
        if any(name.startswith(f"model.layers.{layer}.self_attn.{part}") for layer in echoes for part in parts)
    }
    assert len(dropped) == len(echoes) * {"qwen2": 4, "qwen3": 4, "gemma3_text": 4, "phi": 4}.get(family, 2)
    assert set(before) - set(after) == dropped
    assert not set(after) - set(before)
    assert all(torch.equal(after[name], before[name]) for name in after)
    owned = {tensor.data_ptr() for tensor in before.values()}
    assert not owned & {tensor.data_ptr() for tensor in after.values()}


def test_biased_projections_are_inherited():
    teacher = make_teacher("qwen2")
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("qwen2"))
    for layer in (2, 4):
        bias = attentions_of(student)[layer].v_proj.bias
        assert torch.equal(bias, attentions_of(teacher)[layer].v_proj.bias)
        assert bias.abs().max() > 0


@DIVERSE_FAMILIES
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_teacher_is_left_untouched(family, training):
    teacher = make_teacher(family).train(training)
    for name, parameter in teacher.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    parameters = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in teacher.named_parameters()}
    config, generation = copy.deepcopy(teacher.config.to_dict()), teacher.generation_config.to_dict()
    modules = [type(module) for module in teacher.modules()]
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of(family))
    student.config.hidden_size = 1
    student.generation_config.max_new_tokens = 3
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert {name: parameter.requires_grad for name, parameter in teacher.named_parameters()} == flags
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in teacher.named_parameters())
    assert teacher.config.to_dict() == config
    assert teacher.generation_config.to_dict() == generation
    assert [type(module) for module in teacher.modules()] == modules
    assert all(module.training is training for module in teacher.modules())


def test_frozen_teacher_gives_a_trainable_student(tiny_teacher):
    tiny_teacher.requires_grad_(False)
    student = EchoAttForCausalLM.from_teacher(tiny_teacher, PLAN)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(module.training for module in student.modules())
    batch = make_batch()
    student(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tied_weights_stay_tied(tied, tmp_path):
    student = make_student("llama", tie_word_embeddings=tied)
    student.save_pretrained(tmp_path)
    for model in (student, AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(student)):
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied


def test_bf16_teacher_gives_bf16_student(tmp_path):
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(make_config("llama"), dtype=torch.bfloat16).eval()
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert {name: buffer.dtype for name, buffer in student.language_model.named_buffers()} == {
        name: buffer.dtype for name, buffer in teacher.named_buffers()
    }
    assert student.dtype == student.config.dtype == torch.bfloat16
    batch = make_batch()
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        logits = student(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, logits, rtol=1e-2, atol=1e-2)
        expected = make_oracle(teacher.float(), plan_of("llama"))(**batch).logits
    error = (logits.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.03


def test_mixed_dtypes_are_inherited(tiny_teacher):
    tiny_teacher.model.layers[2].mlp.to(torch.bfloat16)
    student = EchoAttForCausalLM.from_teacher(tiny_teacher, PLAN)
    found = {parameter.dtype for parameter in student.language_model.model.layers[2].mlp.parameters()}
    assert found == {torch.bfloat16}
    assert student.language_model.model.layers[2].self_attn.v_proj.weight.dtype == torch.float32


def test_plan_as_sharing_plan_or_list(tiny_teacher):
    batch = make_batch()
    students = [EchoAttForCausalLM.from_teacher(tiny_teacher, plan) for plan in (PLAN, SharingPlan(PLAN), tuple(PLAN))]
    logits = [student(**batch).logits for student in students]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert all(student.config.echo_sources == PLAN for student in students)


def test_teacher_by_path(tiny_teacher, tmp_path):
    tiny_teacher.save_pretrained(tmp_path)
    batch = make_batch()
    by_path = EchoAttForCausalLM.from_teacher(str(tmp_path), PLAN)
    by_model = EchoAttForCausalLM.from_teacher(tiny_teacher, PLAN)
    torch.testing.assert_close(by_path(**batch).logits, by_model(**batch).logits, **FP32_TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation_is_inherited(attention):
    student = make_student("llama", attention)
    assert student.config._attn_implementation == student.language_model.config._attn_implementation == attention


def test_generation_config_is_inherited(tiny_teacher):
    tiny_teacher.generation_config.temperature = 0.6
    tiny_teacher.generation_config.eos_token_id = [2, 7]
    student = EchoAttForCausalLM.from_teacher(tiny_teacher, PLAN)
    assert (student.generation_config.temperature, student.generation_config.eos_token_id) == (0.6, [2, 7])


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_teacher_with_rotary_frequencies_that_change(used):
    """Dynamic scaling stretches the frequencies on long inputs, and sets them back on short ones."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    teacher = make_teacher("llama", rope_parameters=rope, max_position_embeddings=16)
    short, long = make_batch(2, 12), make_batch(2, 40)
    with torch.no_grad():
        if used:
            teacher(**long)
        student = EchoAttForCausalLM.from_teacher(teacher, range(6))
        for batch in (short, long, short):
            assert torch.equal(student(**batch).logits, teacher(**batch).logits)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([0, 1, 1], "echo_sources has 3 entries for 5 layers"),
        ([0, 1, 1, 2, 4], "layer 2 is itself an echo of layer 1"),
    ],
    ids=["length", "chain"],
)
def test_plan_that_does_not_fit_the_teacher(tiny_teacher, plan, message):
    with pytest.raises(ValueError, match=message):
        EchoAttForCausalLM.from_teacher(tiny_teacher, plan)


def test_echo_with_other_heads_is_refused(tiny_teacher):
    config = copy.deepcopy(tiny_teacher.config)
    config.num_key_value_heads = 4
    tiny_teacher.model.layers[2].self_attn = type(tiny_teacher.model.layers[2].self_attn)(config, layer_idx=2)
    with pytest.raises(ValueError, match="Layer 2 cannot echo layer 1: their heads differ"):
        EchoAttForCausalLM.from_teacher(tiny_teacher, PLAN)


def test_student_whose_family_has_changed_is_refused(tiny_teacher, tmp_path, monkeypatch):
    """As another version of transformers may change it: an echo layer would leave out what it does not know."""
    EchoAttForCausalLM.from_teacher(tiny_teacher, PLAN).save_pretrained(tmp_path)
    attention_class = type(tiny_teacher.model.layers[0].self_attn)
    family_init = attention_class.__init__

    def init(self, *args, **kwargs):
        family_init(self, *args, **kwargs)
        self.value_norm = torch.nn.LayerNorm(4)

    monkeypatch.setattr(attention_class, "__init__", init)
    with pytest.raises(ValueError, match="'llama' yet: the attention of its layer 1 has not the modules .* expected"):
        EchoAttForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama' yet: its attention LlamaAttention has the modules value_norm"):
        EchoAttForCausalLM.from_teacher(make_teacher("llama"), plan_of("llama"))


def test_conversion_under_zero3_is_refused(tiny_teacher, monkeypatch):
    monkeypatch.setattr("echoatt_hf.conversion.student.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 is set up, which divides the weights .* convert in one process"):
        EchoAttForCausalLM.from_teacher(tiny_teacher, PLAN)


def test_teacher_that_is_a_student_is_refused(tiny_teacher):
    student = EchoAttForCausalLM.from_teacher(tiny_teacher, PLAN)
    with pytest.raises(ValueError, match="already an EchoAtt student: convert the model it was made from"):
        EchoAttForCausalLM.from_teacher(student, PLAN)


def test_teacher_without_head_is_refused(tiny_teacher):
    with pytest.raises(ValueError, match="a LlamaModel, not a causal language model: load it with AutoModelForCausal"):
        EchoAttForCausalLM.from_teacher(tiny_teacher.model, PLAN)


# Gradient checkpointing


@EVERY_MODEL
def test_reentrant_checkpointing_is_refused_at_once(model_class):
    config = EchoAttConfig(text_config=make_config("llama", num_hidden_layers=5), echo_sources=PLAN)
    model = model_class(config)
    with pytest.raises(ValueError, match=r'do not support reentrant .* Use .*"use_reentrant": False'):
        enable_checkpointing(model, {"use_reentrant": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older name of the same
        with pytest.raises(ValueError, match="do not support reentrant"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert not is_checkpointing(model)
    enable_checkpointing(model, None)
    assert is_checkpointing(model)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {}], ids=["explicit", "default-of-torch"])
@pytest.mark.parametrize("part", ["language_model", "language_model.model"])
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
def test_reentrant_checkpointing_behind_our_back_is_refused_in_the_forward_pass(options, part):
    student = make_student("llama").train()
    enable_checkpointing(student.get_submodule(part), options)
    batch = make_batch()
    with pytest.raises(ValueError, match="do not support reentrant"):
        student(**batch, labels=batch["input_ids"])
    student.eval()
    with torch.no_grad():
        student(**batch)


def test_reentrant_checkpointing_is_right_without_echo_layers():
    """Nothing is recorded then, and the family's own checkpointing works."""
    teacher = make_teacher("llama")
    student = EchoAttForCausalLM.from_teacher(teacher, range(6)).train()
    enable_checkpointing(student.language_model, {"use_reentrant": True})
    batch = make_batch()
    assert_same_gradients(gradients_of(student, batch), gradients_of(teacher.train(), batch))


def test_checkpointing_can_be_disabled():
    student = make_student("llama").train()
    enable_checkpointing(student, None)
    getattr(student, f"{CHECKPOINTING}_disable")()
    assert not is_checkpointing(student)


# Caches and generation


def decode(model, batch: dict, cache, prompt: int) -> torch.Tensor:
    """Logits of a prompt at once and of the rest token by token."""
    input_ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    length = input_ids.shape[1]
    logits = []
    for start, end in [(0, prompt), *((position, position + 1) for position in range(prompt, length))]:
        output = model(
            input_ids=input_ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def test_decoding_in_eager_mode():
    student = make_student("gemma3_text", "eager")
    batch = make_batch(3, 20, padding=(5, 0, 2))
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = student(**batch, position_ids=positions, use_cache=False).logits
        found = decode(student, batch, DynamicCache(config=student.config), 6)
    torch.testing.assert_close(kept(found, batch), kept(expected, batch), **FP32_TOLERANCE)


def test_cache_of_echo_layers_holds_their_values():
    student = make_student("llama")
    cache, values = DynamicCache(config=student.config), []
    attentions_of(student)[2].v_proj.register_forward_hook(lambda module, args, output: values.append(output))
    with torch.no_grad():
        student(**make_batch(2, 20), past_key_values=cache, use_cache=True)
    stored = [states for states in (cache.layers[2].keys, cache.layers[2].values) if states.numel()]
    assert len(stored) == 1
    torch.testing.assert_close(stored[0], values[0].view(2, 20, 2, 8).transpose(1, 2))


@DIVERSE_FAMILIES
def test_generation_of_a_padded_row_equals_the_row_alone(family):
    student = make_student(family)
    batch = make_batch(3, 10, padding=(4, 0, 1))
    together = student.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for row, padding in enumerate((4, 0, 1)):
        alone = student.generate(
            batch["input_ids"][row : row + 1, padding:], max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
        assert torch.equal(together[row : row + 1, padding:], alone)


def test_generation_with_inputs_prepared_by_the_family():
    """Phi-3 computes its cache anew where its rotary frequencies change, at 16 tokens here."""
    frequencies = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 16}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 9.0]}
    teacher = make_teacher("phi3", rope_parameters=frequencies | factors, original_max_position_embeddings=16)
    tokens = make_batch(1, 12)["input_ids"]

    def cache_changes_nothing(model) -> bool:
        options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
        return torch.equal(*(model.generate(tokens, **options, use_cache=use_cache) for use_cache in (True, False)))

    if not cache_changes_nothing(teacher):
        pytest.skip("older transformers do not get this right")
    assert cache_changes_nothing(EchoAttForCausalLM.from_teacher(teacher, plan_of("phi3")))


def test_recurrent_layers_cannot_take_drafts_back():
    """Only what the family says of itself makes transformers refuse it."""
    student = make_student("qwen3_5_text")
    with pytest.raises(ValueError, match="not supported with stateful models, such as EchoAttForCausalLM"):
        student.generate(make_batch(1, 8)["input_ids"], max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_no_state_stays_on_the_modules():
    student = make_student("llama")
    before = {name: set(vars(module)) for name, module in student.named_modules()}
    student(**make_batch())
    assert {name: set(vars(module)) for name, module in student.named_modules()} == before
    assert torch.equal(student(**make_batch(seed=1)).logits, make_student("llama")(**make_batch(seed=1)).logits)


# Outputs


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_asked_for_in_the_configuration(name, tmp_path):
    teacher = make_teacher("llama", "eager")
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", **{name: True})
    for model in (teacher, student):
        setattr(model.config, name, True)
    field = name.removeprefix("output_")
    assert getattr(teacher(**make_batch()), field) is not None
    for model in (student, loaded):
        assert getattr(model(**make_batch()), field) is not None


def test_generation_returns_attentions():
    student = make_student("llama", "eager")
    output = student.generate(
        **make_batch(2, 6),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        output_attentions=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    assert [len(step) for step in output.attentions] == [6, 6, 6]
    assert [step[3].shape[-2:] for step in output.attentions] == [(6, 6), (1, 7), (1, 8)]
    assert [len(step) for step in output.hidden_states] == [7, 7, 7]


def test_other_arguments_of_the_forward_pass():
    student = make_student("llama")
    batch = make_batch(2, 12)
    with torch.no_grad():
        expected = student(**batch)
        assert torch.equal(student(**batch, return_dict=False)[0], expected.logits)
        torch.testing.assert_close(student(**batch, logits_to_keep=1).logits, expected.logits[:, -1:])
        embeds = student.get_input_embeddings()(batch["input_ids"])
        found = student(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        assert torch.equal(found, expected.logits)
    assert student(**batch, use_cache=False).past_key_values is None
    student.config.use_cache = False
    assert student(**batch).past_key_values is None


@DIVERSE_FAMILIES
def test_set_attention_implementation(family):
    student = make_student(family, "sdpa")
    batch = make_batch(2, 14)
    seen = []
    for name in ("eager", "sdpa", "eager"):
        student.set_attn_implementation(name)
        assert student.config._attn_implementation == name
        assert student.language_model.config._attn_implementation == name
        with torch.no_grad():
            output = student(**batch, output_attentions=name == "eager")
        seen.append(output.logits)
        for attention in attentions_of(student):
            results = []
            hook = attention.register_forward_hook(
                lambda module, args, output, results=results: results.append(output[1])
            )
            with torch.no_grad():
                student(**batch)
            hook.remove()
            # Only eager attention makes the weights.
            assert (results[0] is not None) is (name == "eager"), f"layer {attention.layer_idx} in {name}"
    torch.testing.assert_close(seen[0], seen[1], **FP32_TOLERANCE)
    assert torch.equal(seen[0], seen[2])


# Copies and files


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_model(how):
    student = make_student("llama")
    batch = make_batch()
    logits = student(**batch).logits
    if how == "deepcopy":
        twin = copy.deepcopy(student)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(student))
    else:
        buffer = io.BytesIO()
        torch.save(student, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(**batch).logits, logits)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert student.config._attn_implementation == "sdpa"
    assert attentions_of(student)[1].config.viewed._attn_implementation == "sdpa"
    assert torch.equal(student(**batch).logits, logits)


def load(auto_class, folder, **kwargs) -> tuple[nn.Module, dict[str, set[str]]]:
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["mismatched_keys"] and not info["error_msgs"]
    return model.eval(), {name: set(info[f"{name}_keys"]) for name in ("missing", "unexpected")}


@DIVERSE_FAMILIES
def test_save_and_load(family, tmp_path):
    student = make_student(family)
    batch = make_batch()
    student.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is EchoAttConfig and config.echo_sources == plan_of(family)
    with torch.no_grad():
        model, info = load(AutoModelForCausalLM, tmp_path)
        assert type(model) is EchoAttForCausalLM
        assert info == {"missing": set(), "unexpected": set()}
        logits = student(**batch).logits
        assert torch.equal(model(**batch).logits, logits)
        assert model.generation_config.to_dict().items() >= {"eos_token_id": 2, "pad_token_id": 0}.items()

        headless, info = load(AutoModel, tmp_path)
        assert type(headless) is EchoAttModel
        assert not info["missing"]
        assert all("lm_head" in name for name in info["unexpected"])
        assert bool(info["unexpected"]) is not student.config.tie_word_embeddings
        hidden = headless(**batch).last_hidden_state
        assert torch.equal(student.get_output_embeddings()(hidden), logits)

        classifier, info = load(AutoModelForSequenceClassification, tmp_path, num_labels=3)
        assert type(classifier) is EchoAttForSequenceClassification
        assert info["missing"] == {"score.weight"}
        assert all("lm_head" in name for name in info["unexpected"])
        torch.testing.assert_close(classifier(**batch).logits, classifier.score(hidden)[:, -1])


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
def test_other_models_save_and_load_themselves(auto_class, tmp_path):
    make_student("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "causal")
    model, _ = load(auto_class, tmp_path / "causal")
    model.save_pretrained(tmp_path / "own")
    again, info = load(auto_class, tmp_path / "own")
    assert info == {"missing": set(), "unexpected": set()}
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    causal, info = load(AutoModelForCausalLM, tmp_path / "own")
    assert info == {
        "missing": {"language_model.lm_head.weight"},
        "unexpected": {name for name in state if name.startswith("score.")},
    }


def test_classifier_takes_the_last_token_that_is_not_padding():
    torch.manual_seed(0)
    config = EchoAttConfig(text_config=make_config("llama"), echo_sources=plan_of("llama"), num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for side in ("left", "right"):
        batch = make_batch(2, 10, padding=(4,), side=side)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        alone = batch["input_ids"][:1][batch["attention_mask"][:1].bool()][None]
        with torch.no_grad():
            found = model(**batch, position_ids=positions).logits[:1]
            torch.testing.assert_close(found, model(alone).logits, **FP32_TOLERANCE)


def test_classifier_learns():
    torch.manual_seed(0)
    config = EchoAttConfig(text_config=make_config("qwen3"), echo_sources=plan_of("qwen3"), num_labels=3)
    model = EchoAttForSequenceClassification(config)
    output = model(**make_batch(), labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.config.problem_type = "multi_label_classification"
    assert torch.isfinite(model(**make_batch(), labels=torch.ones(2, 3)).loss)


@EVERY_MODEL
def test_weights_are_initialized_at_random_scale(model_class):
    torch.manual_seed(0)
    config = EchoAttConfig(text_config=make_config("llama", initializer_range=0.05), echo_sources=plan_of("llama"))
    for name, parameter in model_class(config).named_parameters():
        if parameter.ndim == 2:
            assert 0.02 < parameter.std() < 0.08, name


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_resized_embeddings_are_saved(family, tmp_path):
    student = make_student(family)
    student.resize_token_embeddings(VOCAB_SIZE + 4, mean_resizing=False)
    assert student.config.vocab_size == student.config.text_config.vocab_size == VOCAB_SIZE + 4
    logits = student(**make_batch()).logits
    assert logits.shape[-1] == VOCAB_SIZE + 4
    student.save_pretrained(tmp_path)
    loaded, info = load(AutoModelForCausalLM, tmp_path)
    assert info == {"missing": set(), "unexpected": set()}
    torch.testing.assert_close(loaded(**make_batch()).logits, logits, **FP32_TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt2"])
def test_resized_embeddings_have_a_loss(family):
    """Some families make their loss by a number of tokens that they keep."""
    teacher, student = make_teacher(family), make_student(family)
    batch = make_batch()
    for model in (teacher, student):
        model.resize_token_embeddings(VOCAB_SIZE + 4, mean_resizing=False)
        assert model.vocab_size == VOCAB_SIZE + 4
        assert torch.isfinite(model(**batch, labels=batch["input_ids"]).loss)


def test_each_copy_of_the_code_has_attention_functions_of_its_own(tmp_path, monkeypatch):
    """Two students may come with two versions of it, and a name has one function in a process."""
    make_student("llama").save_pretrained(tmp_path / "other_student")
    (tmp_path / "other_student" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    other = importlib.import_module("other_student.modeling_echoatt")
    for ours, theirs in (("RECORD_ATTENTION", "record_attention"), ("KV_ATTENTION", "attend_to_source")):
        for module in (modeling_echoatt, other):
            assert ALL_ATTENTION_FUNCTIONS[getattr(module, ours)] is getattr(module, theirs)
    student = make_student("llama")
    again = other.EchoAttForCausalLM(other.EchoAttConfig(**student.config.to_dict())).eval()
    again.load_state_dict(student.state_dict())
    torch.testing.assert_close(again(**make_batch()).logits, student(**make_batch()).logits, **FP32_TOLERANCE)


def test_what_the_family_reads_is_set_there():
    teacher, student = make_teacher("mixtral"), make_student("mixtral")
    batch = {**make_batch(), "output_router_logits": True}
    before = [model(**batch, labels=batch["input_ids"]).loss.item() for model in (teacher, student)]
    for model in (teacher, student):
        model.router_aux_loss_coef = 2.0
    after = [model(**batch, labels=batch["input_ids"]).loss.item() for model in (teacher, student)]
    assert after[0] - before[0] > 1 and after[1] - before[1] == pytest.approx(after[0] - before[0], rel=0.2)
    for model in (teacher, student):
        model.loss_function = lambda *args, **kwargs: torch.tensor(42.0)
        assert model(**make_batch(), labels=batch["input_ids"]).loss == 42
        assert model.loss_function() == 42


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_decoder_is_that_of_the_family(family):
    student = make_student(family)
    assert student.get_decoder() is student.language_model.get_decoder() is student.base_model is student.model
    assert type(student.get_decoder()) is type(make_teacher(family).get_decoder())


def test_a_model_with_fewer_layers_than_its_plan_is_refused(tmp_path):
    make_student("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="echo_sources has 6 entries for 4 layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=4)


def test_checkpoint_carries_the_code(tmp_path):
    student = make_student("llama")
    student.save_pretrained(tmp_path)
    package = Path(echoatt_hf.__file__).parent
    for name in ("configuration_echoatt.py", "modeling_echoatt.py"):
        assert filecmp.cmp(tmp_path / name, package / name, shallow=False)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == ["configuration_echoatt.py", "modeling_echoatt.py"]
    assert AutoConfig.from_pretrained(tmp_path).auto_map == {
        "AutoConfig": "configuration_echoatt.EchoAttConfig",
        "AutoModel": "modeling_echoatt.EchoAttModel",
        "AutoModelForCausalLM": "modeling_echoatt.EchoAttForCausalLM",
        "AutoModelForSequenceClassification": "modeling_echoatt.EchoAttForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_echoatt.EchoAttForTokenClassification",
    }


def test_installed_plugin_wins_over_the_code_of_the_checkpoint(tmp_path):
    make_student("llama").save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)) is EchoAttForCausalLM


REMOTE = """
    import sys

    sys.modules["echoatt_hf"] = None  # also where the plugin is installed
    try:
        import echoatt_hf
    except ImportError:
        pass
    else:
        raise SystemExit("echoatt_hf is on the path of the clean process")

    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    folder = sys.argv[1]
    torch.set_num_threads(1)
    batch = torch.load(f"{folder}/batch.pt")
    results = {}
    for auto_class, source in (
        (AutoModelForCausalLM, "causal"),
        (AutoModel, "causal"),
        (AutoModelForSequenceClassification, "classifier"),
        (AutoModelForTokenClassification, "token_classifier"),
    ):
        model = auto_class.from_pretrained(f"{folder}/{source}", trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        with torch.no_grad():
            results[auto_class.__name__] = model(**batch)[0]
        if auto_class is AutoModelForCausalLM:
            results["generated"] = model.generate(**batch, max_new_tokens=5, do_sample=False)
            model.save_pretrained(f"{folder}/again")
    torch.save(results, f"{folder}/results.pt")
"""


def test_remote_code_in_a_process_without_the_plugin(tmp_path):
    student = make_student("llama")
    classifier = EchoAttForSequenceClassification(student.config)
    student.save_pretrained(tmp_path / "causal")
    classifier.save_pretrained(tmp_path / "classifier")
    token_classifier = EchoAttForTokenClassification(student.config)
    token_classifier.save_pretrained(tmp_path / "token_classifier")
    batch = make_batch(2, 10, padding=(3,))
    torch.save(batch, tmp_path / "batch.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(REMOTE), str(tmp_path)],
        cwd=tmp_path,
        env={
            **environment,
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = torch.load(tmp_path / "results.pt")
    with torch.no_grad():
        expected = {
            "AutoModelForCausalLM": student(**batch).logits,
            "AutoModel": AutoModel.from_pretrained(tmp_path / "causal")(**batch).last_hidden_state,
            "AutoModelForSequenceClassification": classifier.eval()(**batch).logits,
            "AutoModelForTokenClassification": token_classifier.eval()(**batch).logits,
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, **FP32_TOLERANCE)
        assert torch.equal(found["generated"], student.generate(**batch, max_new_tokens=5, do_sample=False))
        # What the clean process saved is a whole checkpoint again.
        assert (tmp_path / "again/modeling_echoatt.py").exists()
        assert (tmp_path / "again/configuration_echoatt.py").exists()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert type(again) is EchoAttForCausalLM
        torch.testing.assert_close(again(**batch).logits, expected["AutoModelForCausalLM"], **FP32_TOLERANCE)


# The tools around


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, VOCAB_SIZE))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def test_text_generation_pipeline(tmp_path):
    student, tokenizer = make_student("llama"), make_tokenizer()
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(generator.model) is EchoAttForCausalLM
    texts = ["w5 w6 w7 w8", "w9 w10"]
    found = generator(texts, batch_size=2, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_full_text=False)
    for text, result in zip(texts, found, strict=True):
        tokens = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        expected = student.generate(**tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        expected = expected[0, tokens["input_ids"].shape[1] :]
        assert result[0]["generated_text"].split() == tokenizer.decode(expected, skip_special_tokens=True).split()


class GradientRecorder(TrainerCallback):
    def __init__(self):
        self.without_gradient = []
        self.steps = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps += 1
        self.without_gradient += [
            name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
        ]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_trainer(tiny_teacher, checkpointing, tmp_path):
    student = EchoAttForCausalLM.from_teacher(tiny_teacher, PLAN)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in make_batch(8, 10)["input_ids"]]
    recorder = GradientRecorder()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        **{CHECKPOINTING: checkpointing},
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=student, args=arguments, train_dataset=rows, callbacks=[recorder])
    result = trainer.train()
    assert recorder.steps == result.global_step == 2
    assert recorder.without_gradient == []
    assert all(not torch.equal(parameter, before[name]) for name, parameter in student.named_parameters())
    trainer.save_model(str(tmp_path / "saved"))
    loaded, info = load(AutoModelForCausalLM, tmp_path / "saved")
    assert info == {"missing": set(), "unexpected": set()}
    student.eval()
    torch.testing.assert_close(loaded(**make_batch()).logits, student(**make_batch()).logits, **FP32_TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_lora(tiny_teacher, checkpointing):
    import peft

    student = EchoAttForCausalLM.from_teacher(tiny_teacher, PLAN)
    batch = make_batch()
    base = student(**batch).logits
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", lora_dropout=0.0
    )
    adapted = peft.get_peft_model(student, config)
    # In "...layers.2.self_attn.v_proj.lora_A.default.weight": the layer and the projection.
    names = [name.split(".layers.")[1].split(".") for name, _ in adapted.named_parameters() if "lora_A" in name]
    found = {f"{parts[0]}.{parts[2]}" for parts in names}
    assert found == {*(f"{layer}.v_proj" for layer in range(5)), "0.q_proj", "1.q_proj", "4.q_proj"}
    adapted.train()
    if checkpointing:
        enable_checkpointing(adapted, {"use_reentrant": False})
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) is ("lora_" in name), name
    adapted.eval()
    with torch.no_grad():
        logits = adapted(**batch).logits
        assert (logits - base).abs().max() > 0.01
        generated = adapted.generate(**batch, max_new_tokens=5, do_sample=False)
        merged = adapted.merge_and_unload()
        assert type(merged) is EchoAttForCausalLM
        torch.testing.assert_close(merged(**batch).logits, logits, **FP32_TOLERANCE)
        assert torch.equal(merged.generate(**batch, max_new_tokens=5, do_sample=False), generated)


class Writes(torch.nn.Module):
    def forward(self, x, echo_records):
        echo_records.by_layer[0] = x
        return x + 1


class Reads(torch.nn.Module):
    def forward(self, x, echo_records):
        return x * echo_records.by_layer[0]


class Decoder(torch.nn.Module):
    """Hands records to its layers as a student does."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Writes(), Reads(), Reads()])

    def forward(self, x):
        records = EchoRecords("auto", {0: 1})
        for layer in self.layers:
            x = layer(x, echo_records=records)
        return x


def test_records_are_one_node_of_a_traced_graph():
    """As llm-compressor traces a model, with the layers as they are."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return name != ""

    decoder, x = Decoder(), torch.arange(4.0)
    graph = Tracer().trace(decoder)
    assert sum(node.target is EchoRecords for node in graph.nodes) == 1
    traced = torch.fx.GraphModule(decoder, graph)
    for _ in range(2):
        assert torch.equal(traced(x), decoder(x))
