"""Losses by liger-kernel: which heads it is for, and, where it is installed, what it gives in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import FP32_TOLERANCE, make_batch, make_teacher, plan_of, process_environment
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_losses import gradients_of, labelled_batch, loss_in_chunks, models_of

from echoatt_hf import EchoAttForCausalLM, EchoAttTrainer, EchoAttTrainingArguments, collate_rows
from echoatt_hf.distillation import liger
from echoatt_hf.distillation.losses import LogitLosses, NextTokenLoss
from echoatt_hf.models.heads import OutputHead
from echoatt_hf.settings import DistillationSettings


@pytest.fixture
def interpreter():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("run by test_in_the_interpreter")


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("liger_kernel", "triton"))), reason="liger-kernel is not installed"
)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")
def test_in_the_interpreter():
    """Triton reads the variable when it is imported, which torch does."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = process_environment(TRITON_INTERPRET="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and " 1 skipped" in result.stdout, result.stdout[-5000:]


@pytest.mark.parametrize(
    ("family", "changes", "is_plain"),
    [
        ("llama", {}, True),
        ("llama", {"tie_word_embeddings": False}, True),
        ("phi", {}, False),  # a bias
        ("gemma2", {}, False),  # a soft cap
        ("cohere", {}, False),  # a scale
        ("granite", {"logits_scaling": 4.0}, False),
    ],
)
def test_heads_that_are_one_product(family, changes, is_plain):
    student = EchoAttForCausalLM.from_teacher(make_teacher(family, attention=None, **changes), plan_of(family))
    assert OutputHead.find(student).plain_weight is None
    weight = OutputHead.find(student, with_liger=True).plain_weight
    assert weight is (student.get_output_embeddings().weight if is_plain else None)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_head_with_an_adapter_is_no_product():
    student = EchoAttForCausalLM.from_teacher(make_teacher("llama", tie_word_embeddings=False), plan_of("llama"))
    adapted = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "v_proj"]))
    assert OutputHead.find(adapted, with_liger=True).plain_weight is None


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize("kept", [5, 0], ids=["some targets", "no target"])
def test_liger_gives_the_losses_and_gradients_of_chunks(interpreter, monkeypatch, divergence, kept):
    student, teacher = models_of("llama")
    batch, labels = labelled_batch()
    labels[:, kept:] = -100
    found = {}
    for with_liger in (False, True):
        if with_liger:
            monkeypatch.setattr("echoatt_hf.distillation.head_losses.chunked_loss", None)  # not called
        total, parts = loss_in_chunks(student, teacher, batch, labels, divergence, with_liger=with_liger)
        gradients = gradients_of(total, student)
        assert len(gradients) > 10
        found[with_liger] = {"total": total.detach(), "parts": parts, **gradients}
    torch.testing.assert_close(found[True], found[False], **FP32_TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_trainer_with_liger(interpreter, tmp_path, monkeypatch, family):
    """The same weights as without, and for heads that liger has no kernel for too."""
    computed, liger_loss = [], liger.liger_loss
    monkeypatch.setattr(
        "echoatt_hf.distillation.head_losses.liger_loss",
        lambda *given: computed.append(liger_loss(*given)) or computed[-1],
    )

    def train(**options):
        teacher = make_teacher(family, attention=None)
        student = EchoAttForCausalLM.from_teacher(teacher, plan_of(family))
        args = EchoAttTrainingArguments(
            str(tmp_path), stage1_steps=2, stage2_steps=1, ce_weight=0.3, adam_epsilon=1e-2, learning_rate=1e-2,
            per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **options
        )  # fmt: skip
        rows = Dataset.from_list([{"input_ids": row} for row in make_batch(6, 12)["input_ids"].tolist()])
        EchoAttTrainer(
            model=student, teacher=teacher, args=args, train_dataset=rows, data_collator=collate_rows
        ).train()
        return student.state_dict()

    expected = train()
    assert computed == [None] * 3
    computed.clear()
    found = train(use_liger_kernel=True)
    assert [result is not None for result in computed] == [family == "llama"] * 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **FP32_TOLERANCE)


def test_without_a_gpu_losses_are_computed_in_chunks(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    labels = make_batch(1, 4)["input_ids"]
    losses = LogitLosses({"ce": NextTokenLoss(labels)}, {"ce": 1.0}, labels, 3)
    assert liger.liger_loss(losses, torch.zeros(1, 4, 8), torch.nn.Parameter(torch.zeros(9, 8))) is None


def test_liger_that_is_not_installed_is_said_at_once(monkeypatch):
    monkeypatch.setattr("echoatt_hf.settings.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="liger-kernel is not installed: install it with `pip install liger-kernel`"):
        DistillationSettings(use_liger_kernel=True)
