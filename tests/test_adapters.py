"""PEFT on students: default targets, adapters saved alone, weights shared with a teacher, quantized weights below."""

import copy
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from conftest import CHECKPOINTING, FP32_TOLERANCE, make_batch, make_teacher, plan_of, process_environment
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from echoatt_hf import (
    EchoAttForCausalLM,
    EchoAttTrainer,
    EchoAttTrainingArguments,
    add_lora,
    collate_rows,
    merge_lora,
    share_weights,
)


# PEFT asks for an attribute that transformers renamed, and adapts to Conv1D.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]


def make_student(family="llama", **options):
    return EchoAttForCausalLM.from_teacher(make_teacher(family, **options), plan_of(family))


def make_rows(count=8, length=16):
    return Dataset.from_list([{"input_ids": row} for row in make_batch(count, length)["input_ids"].tolist()])


def adapted_modules(model):
    """The projections that have adapters, by layer."""
    found = {}
    for name, _ in model.named_parameters():
        if "lora_A" in name:
            _, _, path = name.split(".lora_A")[0].partition(".language_model.")
            layer = next(int(part) for part in path.split(".") if part.isdigit())
            found.setdefault(layer, set()).add(path.rpartition(".")[2])
    return found


def train(model, teacher, folder, **options):
    arguments = EchoAttTrainingArguments(
        str(folder), stage1_steps=4, stage2_steps=2, per_device_train_batch_size=4, logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, **{"learning_rate": 1e-2, **options},
    )  # fmt: skip
    trainer = EchoAttTrainer(
        model=model, teacher=teacher, args=arguments, train_dataset=make_rows(), data_collator=collate_rows
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Targets


@pytest.mark.parametrize(
    ("family", "whole", "echo"),
    [
        ("llama", {"q_proj", "v_proj"}, {"v_proj"}),
        ("gpt2", {"c_attn"}, {"v_proj"}),
        ("phi3", {"qkv_proj"}, {"v_proj"}),
        ("gpt_neox", {"query_key_value"}, {"v_proj"}),
    ],
)
def test_a_lora_config_of_defaults_adapts_queries_and_values(family, whole, echo):
    student = make_student(family)
    echoes = student.config.echo_layers
    batch = make_batch()
    expected = student(**batch).logits
    model = get_peft_model(student, LoraConfig())
    found = adapted_modules(model)
    assert found == {layer: echo if layer in echoes else whole for layer in range(6)}
    torch.testing.assert_close(model(**batch).logits, expected, **FP32_TOLERANCE)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if "lora_" in name)


def test_targets_that_echo_layers_do_without():
    student = make_student()
    echoes = student.config.echo_layers
    found = adapted_modules(get_peft_model(student, LoraConfig(target_modules=["q_proj", "v_proj"])))
    assert found == {layer: {"v_proj"} if layer in echoes else {"q_proj", "v_proj"} for layer in range(6)}
    found = adapted_modules(get_peft_model(make_student(), LoraConfig(target_modules=["q_proj"])))
    assert sorted(found) == [layer for layer in range(6) if layer not in echoes]


# Adapters alone


def save_adapters(folder):
    """A student and adapters of it in folders of their own; a batch and the logits with the adapters."""
    make_student().save_pretrained(folder / "student")
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    model = get_peft_model(student, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(folder / "adapters")
    batch = make_batch()
    with torch.no_grad():
        return batch, model(**batch).logits


def test_adapters_are_saved_alone_and_reloaded_and_merged(tmp_path):
    batch, expected = save_adapters(tmp_path)
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
        for name in ("student", "adapters")
    ]
    assert sizes[1] < sizes[0] / 5
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")
    assert type(model.get_base_model()) is EchoAttForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, **FP32_TOLERANCE)
        assert torch.equal(model.generate(**batch, max_new_tokens=4)[:, :12], batch["input_ids"])
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)


REMOTE = """
    import sys

    sys.modules["echoatt_hf"] = None  # as if it were not installed
    import torch
    from peft import AutoPeftModelForCausalLM

    folder = sys.argv[1]
    model = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapters", trust_remote_code=True)
    batch, expected = torch.load(f"{folder}/expected.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
"""


def test_adapters_of_experts(tmp_path):
    """Experts lie in one parameter a layer. PEFT takes them by `target_parameters`; their names of before it knows by
    the type of a model, and a student is of another."""
    student, batch = make_student("mixtral"), make_batch()
    targets = {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    torch.manual_seed(0)
    model = get_peft_model(
        copy.deepcopy(student), LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **targets)
    )
    adapted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(".experts." in name for name in adapted) == 6 * 2 * 2
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapted.values())
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert not torch.allclose(expected, student(**batch).logits, atol=0.1)
        model.save_pretrained(tmp_path / "adapters")
        reloaded = PeftModel.from_pretrained(student, tmp_path / "adapters").eval()
        torch.testing.assert_close(reloaded(**batch).logits, expected, **FP32_TOLERANCE)
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Target modules .* not found"):
        get_peft_model(make_student("mixtral"), LoraConfig(task_type="CAUSAL_LM", target_modules=["w1", "w2", "w3"]))


def test_adapters_reload_where_the_package_is_not_installed(tmp_path):
    torch.save(save_adapters(tmp_path), tmp_path / "expected.pt")
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REMOTE), str(tmp_path)],
        env=process_environment(HF_HOME=str(tmp_path / "home")),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]


# Weights of a teacher


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_loaded_student_shares_what_is_equal(family, tmp_path):
    teacher = make_teacher(family)
    EchoAttForCausalLM.from_teacher(teacher, plan_of(family)).save_pretrained(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = dict(student.language_model.named_parameters())
    refitted = next(name for name in names if name.endswith(("o_proj.weight", "c_proj.weight")))
    with torch.no_grad():
        names[refitted].add_(1)  # as a refit does
    batch = make_batch()
    expected = student(**batch).logits
    of_teacher = {value.data_ptr(): name for name, value in teacher.named_parameters()}
    equal = {name for name in names if name in set(of_teacher.values())} - {refitted}

    assert share_weights(student, teacher) == sum(names[name].nbytes for name in equal)
    assert {name for name, value in names.items() if of_teacher.get(value.data_ptr()) == name} == equal
    assert {name for name, value in names.items() if not value.requires_grad} == equal
    assert torch.equal(student(**batch).logits, expected)

    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    merged = merge_lora(add_lora(student, 2))
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_weights_of_another_dtype_are_not_shared(tmp_path):
    teacher = make_teacher()
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama")).half()
    assert share_weights(student, teacher) == 0
    assert all(parameter.dtype is torch.float16 and parameter.requires_grad for parameter in student.parameters())


# Quantized weights


@pytest.mark.parametrize("teacher_bits", [32, 4])
def test_qlora(teacher_bits, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    teacher = make_teacher(hidden_size=64, intermediate_size=128, initializer_range=0.2)
    teacher.save_pretrained(tmp_path / "teacher")
    EchoAttForCausalLM.from_teacher(teacher, plan_of("llama")).save_pretrained(tmp_path / "student")
    if teacher_bits == 4:
        teacher = AutoModelForCausalLM.from_pretrained(
            tmp_path / "teacher", quantization_config=quantization, device_map="cpu"
        )
    student = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", quantization_config=quantization, device_map="cpu"
    )
    with warnings.catch_warnings():  # PEFT calls what transformers renamed
        warnings.filterwarnings("ignore", ".gradient_checkpointing_enable. is deprecated", FutureWarning)
        student = prepare_model_for_kbit_training(student, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM"))
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses = train(model, teacher, tmp_path)
    assert losses[3] < losses[0]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) is ("lora_" not in name), name
    quantized = [
        type(module).__name__ for name, module in student.named_modules() if name.endswith("_proj.base_layer")
    ]
    assert quantized and set(quantized) == {"Linear4bit"}


# Ways to train


@pytest.mark.parametrize("adapters", [False, True], ids=["weights", "adapters"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({CHECKPOINTING: True}, 1e-5),
        ({"bf16": True}, 0.1),
        ({"bf16": True, CHECKPOINTING: True}, 0.1),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-4, marks=pytest.mark.slow, id="compiled"
        ),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager", "bf16": True, CHECKPOINTING: True},
            0.1,
            marks=pytest.mark.slow,
            id="all",
        ),
    ],
)
def test_other_ways_to_train_learn_the_same(options, tolerance, adapters, tmp_path, monkeypatch):
    teacher = make_teacher(initializer_range=0.3)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which the arguments set, for all that follows

    def run(**options):
        torch.manual_seed(0)
        student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"), share_weights=adapters)
        if adapters:
            return train(add_lora(student, 4), teacher, tmp_path, **options)
        return train(student, teacher, tmp_path, learning_rate=1e-3, **options)

    plain = run()
    assert plain[3] < plain[0]
    assert run(**options) == pytest.approx(plain, rel=tolerance)


def test_compiled_models_show_no_attention_outputs(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="attention_weight is 0.1 and torch_compile is set"):
        EchoAttTrainingArguments(str(tmp_path), attention_weight=0.1, torch_compile=True)
