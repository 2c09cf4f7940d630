"""Losses and the two-stage trainer."""

import copy
import inspect
import logging
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from conftest import (
    CHECKPOINTING,
    FP32_TOLERANCE,
    make_batch,
    make_teacher,
    plan_of,
    positions_with_target,
    train_byte_level_bpe,
)
from datasets import Dataset
from families import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.pytorch_utils import Conv1D

from echoatt_hf import EchoAttForCausalLM, convert, load_model
from echoatt_hf.distillation.adapters import add_lora, merge_lora
from echoatt_hf.distillation.losses import relative_distance
from echoatt_hf.distillation.trainer import EchoAttTrainer, EchoAttTrainingArguments
from echoatt_hf.models import heads
from echoatt_hf.models.families import find_attention_modules
from echoatt_hf.text.rows import collate_rows


VOCAB = 48
PLAN = [0, 1, 1, 3]


def make_small_teacher(vocab_size=VOCAB, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        pad_token_id=0,
        attention_dropout=0.1,  # makes a teacher left in training mode visible
        **changes,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def teacher():
    return make_small_teacher()


@pytest.fixture
def student(teacher):
    return EchoAttForCausalLM.from_teacher(teacher, PLAN)


@pytest.fixture
def lively_teacher():
    """A teacher whose layers attend in different ways, as those of a trained one do."""
    return make_small_teacher(initializer_range=0.3)


@pytest.fixture
def lively_student(lively_teacher):
    return EchoAttForCausalLM.from_teacher(lively_teacher, PLAN)


@pytest.fixture
def shared_student(lively_teacher):
    return EchoAttForCausalLM.from_teacher(lively_teacher, PLAN, share_weights=True)


def make_rows(number=16, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (number, length), generator=generator)
    return Dataset.from_list([{"input_ids": row} for row in ids.tolist()])


def make_arguments(folder, **changes):
    values = {
        "output_dir": str(folder),
        "stage1_steps": 4,
        "stage2_steps": 0,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
    }
    return EchoAttTrainingArguments(**{**values, **changes})


def make_trainer(student, teacher, folder, rows=None, **changes):
    return EchoAttTrainer(
        model=student,
        teacher=teacher,
        args=make_arguments(folder, **changes),
        train_dataset=rows if rows is not None else make_rows(),
        data_collator=changes.pop("collator", collate_rows),
    )


def plain_losses(student_logits, teacher_logits, labels, temperature=1.0):
    """Cross-entropy and KL(teacher || student) of the labels that are not masked, per token."""
    logits, targets = student_logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    student, teacher = (
        F.log_softmax(values[:, :-1].flatten(0, 1) / temperature, -1)[targets != -100]
        for values in (student_logits, teacher_logits)
    )
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean() * temperature**2
    return F.cross_entropy(logits, targets), kl


def log_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# The trainer.


def test_trains_the_student_and_leaves_the_teacher(teacher, student, tmp_path):
    before = {name: value.clone() for name, value in student.named_parameters()}
    teacher_before = {name: value.clone() for name, value in teacher.state_dict().items()}
    weights = {"hidden_weight": 0.5, "ce_weight": 0.5, "attention_weight": 0.5}
    trainer = make_trainer(student, teacher, tmp_path, stage2_steps=2, **weights)
    trainer.train()
    for name, value in student.named_parameters():
        assert not torch.equal(value, before[name]), f"{name} did not change"
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, teacher_before[name]), f"teacher's {name} changed"
    assert not teacher.training and not any(value.requires_grad for value in teacher.parameters())


def test_first_loss_is_the_weighted_sum_of_the_parts(teacher, student, tmp_path):
    rows = make_rows(4)
    batch = collate_rows(list(rows))
    with torch.no_grad():
        student_outputs = student(batch["input_ids"], output_hidden_states=True)
        teacher_outputs = teacher(batch["input_ids"], output_hidden_states=True)
    tokens = 4 * 11
    ce, _ = plain_losses(student_outputs.logits, teacher_outputs.logits, batch["labels"])
    _, kl = plain_losses(student_outputs.logits, teacher_outputs.logits, batch["labels"], temperature=2.0)
    states = student_outputs.hidden_states[1:], teacher_outputs.hidden_states[1:]
    hidden = relative_distance(*states, batch["labels"], tokens)
    student.config.attention_dropout = 0.0
    for module in student.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    trainer = make_trainer(
        student,
        teacher,
        tmp_path,
        rows,
        stage1_steps=1,
        kl_temperature=2.0,
        kl_weight=0.7,
        ce_weight=0.2,
        hidden_weight=3.0,
    )
    trainer.train()
    entry = log_of(trainer)[0]
    assert entry["kl_loss"] == pytest.approx(kl.item(), rel=1e-4)
    assert entry["ce_loss"] == pytest.approx(ce.item(), rel=1e-4)
    assert entry["hidden_loss"] == pytest.approx(hidden.item(), rel=1e-4)
    assert float(entry["loss"]) == pytest.approx(0.7 * kl.item() + 0.2 * ce.item() + 3 * hidden.item(), rel=1e-3)


# Losses in chunks.


@pytest.fixture
def small_chunks(monkeypatch):
    """Five tokens in a chunk."""
    monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * VOCAB * 5)


@pytest.fixture
def wordy_teacher():
    """A teacher whose logits are larger than anything else in it."""
    return make_small_teacher(vocab_size=200)


class LargestTensor(TorchDispatchMode):
    """Numbers in the memory of the largest float32 tensor that any operation makes."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                self.found = max(self.found, value.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_no_tensor_of_a_training_step_is_as_large_as_the_logits(
    wordy_teacher, small_chunks, tmp_path, stage, divergence
):
    student = EchoAttForCausalLM.from_teacher(wordy_teacher, PLAN)
    trainer = make_trainer(
        student,
        wordy_teacher,
        tmp_path,
        stage1_steps=2 if stage == 1 else 0,
        stage2_steps=2 if stage == 2 else 0,
        divergence=divergence,
        ce_weight=0.5,
        hidden_weight=0.5,
    )
    batch = collate_rows(list(make_rows(8, length=8)))
    all_logits = 8 * 8 * 200
    student.train()
    with LargestTensor() as chunked:
        trainer.compute_loss(student, batch).backward()
    with LargestTensor() as whole:
        trainer.compute_loss(student, batch, return_outputs=True)[0].backward()
    assert chunked.found < all_logits <= whole.found


@pytest.mark.parametrize("prediction_loss_only", [True, False])
def test_evaluation_makes_all_logits_only_where_they_are_asked_for(
    wordy_teacher, small_chunks, tmp_path, prediction_loss_only
):
    found, student = {}, EchoAttForCausalLM.from_teacher(wordy_teacher, PLAN)

    def compute_metrics(prediction):
        found["shape"] = prediction.predictions.shape
        return {"shape": 1.0}

    trainer = EchoAttTrainer(
        model=student,
        teacher=wordy_teacher,
        args=make_arguments(tmp_path, prediction_loss_only=prediction_loss_only, per_device_eval_batch_size=8),
        train_dataset=make_rows(),
        eval_dataset=make_rows(8, length=8),
        data_collator=collate_rows,
        compute_metrics=compute_metrics,
    )
    with LargestTensor() as mode:
        metrics = trainer.evaluate()
    assert (mode.found >= 8 * 8 * 200) is (not prediction_loss_only)
    assert found == ({} if prediction_loss_only else {"shape": (8, 8, 200)})
    batch = collate_rows(list(make_rows(8, length=8)))
    with torch.no_grad():
        logits = student(batch["input_ids"]).logits
    assert metrics["eval_loss"] == pytest.approx(plain_losses(logits, logits, batch["labels"])[0].item(), rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_each_divergence_brings_the_student_to_the_teacher(
    lively_teacher, lively_student, small_chunks, tmp_path, divergence
):
    trainer = make_trainer(
        without_dropout(lively_student),
        lively_teacher,
        tmp_path,
        make_rows(4),
        stage1_steps=30,
        divergence=divergence,
        lr_scheduler_type="constant",
    )
    trainer.train()
    found = [entry["kl_loss"] for entry in log_of(trainer)]
    assert found[-1] < 0.7 * found[0]


class PositionedLlama(LlamaForCausalLM):
    """Its logits depend on more than the hidden state, so that they cannot be had of some tokens."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / torch.arange(1, 1 + output.logits.shape[1])[:, None]
        return output


def test_losses_of_a_head_that_cannot_be_called_alone(teacher, small_chunks, tmp_path):
    odd = PositionedLlama(teacher.config).eval()
    odd.load_state_dict(teacher.state_dict())
    student = without_dropout(copy.deepcopy(odd))
    torch.nn.init.normal_(student.lm_head.weight)
    batch = collate_rows(list(make_rows(4)))
    with torch.no_grad():
        _, kl = plain_losses(student(batch["input_ids"]).logits, odd(batch["input_ids"]).logits, batch["labels"])
    trainer = make_trainer(student, odd, tmp_path)
    assert trainer._head is None and trainer._teacher_head is None
    assert trainer.compute_loss(student.train(), batch).item() == pytest.approx(kl.item(), rel=1e-4)


# The distance of attention outputs, and adapters.


def without_dropout(student):
    for module in student.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return student


def attention_loss_by_hand(student, teacher, batch, layers):
    """The loss token by token, from what the output projections give."""
    outputs = {}
    for model in (student, teacher):
        decoder = getattr(model, "language_model", model).model
        for layer in layers:
            projection = decoder.layers[layer].self_attn.o_proj
            projection.register_forward_hook(
                lambda module, args, output, key=(model, layer): outputs.__setitem__(key, output.detach())
            )
        with torch.no_grad():
            model(batch["input_ids"], attention_mask=batch.get("attention_mask"))
        for layer in layers:
            decoder.layers[layer].self_attn.o_proj._forward_hooks.clear()
    places = positions_with_target(batch["labels"])
    total = 0.0
    for layer in layers:
        for b, t in places:
            expected = outputs[teacher, layer][b, t]
            total += ((outputs[student, layer][b, t] - expected).norm() ** 2 / expected.norm() ** 2).item()
    return total / len(layers) / len(places)


def hooks_of(*models):
    attentions = [attention for model in models for attention in find_attention_modules(model).values()]
    return [hook for attention in attentions for hook in attention._forward_hooks.values()]


@pytest.mark.parametrize("plan", [PLAN, [0, 1, 1, 1], [0, 1, 0, 1]], ids=str)
def test_attention_loss_equals_the_loss_by_hand(lively_teacher, tmp_path, plan):
    student = without_dropout(EchoAttForCausalLM.from_teacher(lively_teacher, plan))
    batch = masked_collator(list(make_rows(4)))
    echoes = [layer for layer, source in enumerate(plan) if source != layer]
    expected = attention_loss_by_hand(student, lively_teacher, batch, echoes)
    assert expected > 0.1
    trainer = EchoAttTrainer(
        model=student,
        teacher=lively_teacher,
        args=make_arguments(tmp_path, stage1_steps=1, attention_weight=3.0),
        train_dataset=make_rows(4),
        data_collator=masked_collator,
    )
    trainer.train()
    entry = log_of(trainer)[0]
    assert entry["attention_loss"] == pytest.approx(expected, rel=1e-4)
    assert float(entry["loss"]) == pytest.approx(entry["kl_loss"] + 3 * expected, rel=1e-3)
    assert not hooks_of(student, lively_teacher)


def test_attention_loss_alone_trains_towards_the_teacher(lively_teacher, lively_student, tmp_path):
    trainer = make_trainer(
        without_dropout(lively_student),
        lively_teacher,
        tmp_path,
        make_rows(4),
        stage1_steps=30,
        kl_weight=0.0,
        attention_weight=1.0,
        lr_scheduler_type="constant",
    )
    trainer.train()
    found = [entry["attention_loss"] for entry in log_of(trainer)]
    assert found[-1] < 0.7 * found[0]


def attention_gradients(trainer, model, batch):
    trainer.model.zero_grad()
    trainer.model.train()
    trainer.compute_loss(model, batch).backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert not hooks_of(trainer.model, trainer.teacher)
    return gradients


@pytest.mark.parametrize("kl_weight", [1.0, 0.0])
def test_attention_loss_of_a_wrapped_student(lively_teacher, lively_student, tmp_path, kl_weight):
    trainer = make_trainer(
        without_dropout(lively_student), lively_teacher, tmp_path, kl_weight=kl_weight, attention_weight=1.0
    )
    batch = masked_collator(list(make_rows(4)))
    expected = attention_gradients(trainer, lively_student, batch)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(lively_student, find_unused_parameters=True)
        for _ in range(3):
            found = attention_gradients(trainer, wrapped, batch)
    finally:
        torch.distributed.destroy_process_group()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_attention_loss_under_autocast(lively_teacher, lively_student, tmp_path):
    trainer = make_trainer(
        without_dropout(lively_student), lively_teacher, tmp_path, kl_weight=0.0, attention_weight=1.0
    )
    batch = masked_collator(list(make_rows(4)))
    lively_student.train()
    expected = trainer.compute_loss(lively_student, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = trainer.compute_loss(lively_student, batch)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=2e-2)
    assert all(
        torch.isfinite(gradient).all() for gradient in attention_gradients(trainer, lively_student, batch).values()
    )


def test_hooks_are_gone_after_a_forward_pass_that_fails(lively_teacher, lively_student, tmp_path):
    trainer = make_trainer(lively_student, lively_teacher, tmp_path, attention_weight=1.0)
    lively_student.train()
    with pytest.raises(IndexError):
        trainer.compute_loss(lively_student, {"input_ids": torch.tensor([[VOCAB]]), "labels": torch.tensor([[1]])})
    assert not hooks_of(lively_student, lively_teacher)


def test_attention_loss_without_echo_layers_is_refused(lively_teacher, tmp_path):
    plain = EchoAttForCausalLM.from_teacher(lively_teacher, range(4))
    for student in (plain, copy.deepcopy(lively_teacher)):
        with pytest.raises(ValueError, match="attention_weight is 0.5, but the student has no echo layers"):
            make_trainer(student, lively_teacher, tmp_path, attention_weight=0.5)


def assert_same_logits(found, expected):
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, **FP32_TOLERANCE)


def test_adapters_learn_and_the_teacher_stays_as_it_is(lively_teacher, shared_student, tmp_path):
    before = {name: value.clone() for name, value in lively_teacher.state_dict().items()}
    adapted = add_lora(shared_student, 4)
    rows = make_rows(4)
    trainer = make_trainer(
        adapted, lively_teacher, tmp_path, rows, stage1_steps=30, stage2_steps=2, attention_weight=0.1
    )
    trainer.train()
    found = [entry["kl_loss"] for entry in log_of(trainer) if "kl_loss" in entry]
    assert found[-1] < 0.7 * found[0]
    adapted.eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
        merged = merge_lora(adapted)
        assert merged is shared_student and type(merged) is EchoAttForCausalLM
        assert_same_logits(merged(ids).logits, expected)
    assert not any("lora" in name for name in merged.state_dict())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    # Merging, and training on, leave the teacher as it was.
    make_trainer(merged, lively_teacher, tmp_path, stage1_steps=1).train()
    for name, value in lively_teacher.state_dict().items():
        assert torch.equal(value, before[name]), f"teacher's {name} changed"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_attention_loss_reaches_the_adapters(lively_teacher, tmp_path, checkpointing):
    student = without_dropout(EchoAttForCausalLM.from_teacher(lively_teacher, PLAN, share_weights=True))
    torch.manual_seed(0)
    adapted = add_lora(student, 4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = make_trainer(adapted, lively_teacher, tmp_path, kl_weight=0.0, attention_weight=1.0)
    if checkpointing:
        getattr(adapted, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    gradients = attention_gradients(trainer, adapted, collate_rows(list(make_rows(4))))
    assert all("lora_" in name for name in gradients)
    echo = [gradient for name, gradient in gradients.items() if ".layers.2.self_attn." in name]
    assert len(echo) == 4 and all(gradient.any() for gradient in echo)  # A and B of v_proj and o_proj


def test_checkpoint_holds_adapters_only_and_resumes(lively_teacher, tmp_path):
    from safetensors import safe_open

    def run(folder, resume=None):
        torch.manual_seed(7)
        adapted = add_lora(EchoAttForCausalLM.from_teacher(lively_teacher, PLAN, share_weights=True), 4)
        trainer = make_trainer(
            adapted, lively_teacher, folder, stage1_steps=4, stage2_steps=3, save_strategy="steps", save_steps=5
        )
        trainer.train(resume_from_checkpoint=resume)
        return merge_lora(adapted).state_dict()

    whole = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    assert not (checkpoint / "model.safetensors").exists()
    with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118
    resumed = run(tmp_path / "resumed", resume=str(checkpoint))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_student_that_would_train_its_teacher_is_refused(lively_teacher, shared_student, tmp_path):
    with pytest.raises(ValueError, match=r"no trainable parameter.*add_lora"):
        make_trainer(shared_student, lively_teacher, tmp_path)
    shared_student.get_parameter("language_model.model.layers.2.self_attn.v_proj.weight").requires_grad_(True)
    message = "1 trainable parameters of the student are the teacher's own, such as .*layers.2.self_attn.v_proj.weight"
    with pytest.raises(ValueError, match=message):
        make_trainer(shared_student, lively_teacher, tmp_path)
    with pytest.raises(ValueError, match="convert without share_weights"):
        make_trainer(shared_student, lively_teacher, tmp_path, stage1_steps=0, stage2_steps=1)
    assert all(parameter.requires_grad for parameter in lively_teacher.parameters())


@pytest.mark.parametrize("rank", [0, -4])
def test_rank_below_one_is_refused(student, rank):
    with pytest.raises(ValueError, match=f"rank is {rank}"):
        add_lora(student, rank)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "mixtral", "phimoe", "qwen3_next"])
def test_adapters_reach_every_linear_layer_but_the_head(family):
    teacher = make_teacher(family, attention=FAMILIES[family].attention)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = EchoAttForCausalLM.from_teacher(teacher, plan_of(family), share_weights=True)
    head = student.get_output_embeddings()
    linear = {name for name, module in student.named_modules() if type(module) in (torch.nn.Linear, Conv1D)}
    linear -= {name for name, module in student.named_modules() if module is head}
    adapted = add_lora(student, 2)
    batch = make_batch(rows=4)
    found = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert {name.removeprefix("base_model.model.").split(".lora_A")[0] for name in found} == linear
    assert any(".v_proj" in name for name in linear)
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad is ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad.any() for parameter in adapted.parameters() if parameter.requires_grad)
    with torch.no_grad():
        expected = adapted(**batch).logits
        assert_same_logits(merge_lora(adapted)(**batch).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_stages_have_their_own_steps_rates_and_losses(teacher, student, tmp_path):
    trainer = make_trainer(
        student,
        teacher,
        tmp_path,
        stage1_steps=3,
        stage2_steps=2,
        learning_rate=1e-2,
        stage2_learning_rate=3e-3,
        lr_scheduler_type="constant",
    )
    trainer.train()
    log = log_of(trainer)
    assert [entry["stage"] for entry in log] == [1, 1, 1, 2, 2]
    assert ["kl_loss" in entry for entry in log] == [True, True, True, False, False]
    assert ["ce_loss" in entry for entry in log] == [False, False, False, True, True]
    assert [float(entry["learning_rate"]) for entry in log] == pytest.approx([1e-2, 1e-2, 1e-2, 3e-3, 3e-3])


def test_each_stage_warms_up_and_decays(teacher, student, tmp_path):
    trainer = make_trainer(
        student, teacher, tmp_path, stage1_steps=10, stage2_steps=10, warmup_steps=2, lr_scheduler_type="linear"
    )
    trainer.create_optimizer_and_scheduler(20)
    rates = []
    for _ in range(20):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[:4] == pytest.approx([0, 5e-3, 1e-2, 1e-2 * 7 / 8])
    assert rates[10:14] == pytest.approx([0, 5e-4, 1e-3, 1e-3 * 7 / 8])


def masked_collator(rows):
    """Rows of very different numbers of targets: a mean over micro-batches would weigh them wrongly."""
    batch = collate_rows(rows)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for row, ids in enumerate(batch["input_ids"]):
        kept = 2 + int(ids[0]) % (len(ids) - 2)
        batch["labels"][row, kept:] = -100
        batch["attention_mask"][row, kept:] = 0
    return batch


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_does_not_change_the_gradients(lively_teacher, tmp_path, stage):
    weights = []
    for micro_batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        student = EchoAttForCausalLM.from_teacher(lively_teacher, PLAN)
        trainer = EchoAttTrainer(
            model=student,
            teacher=lively_teacher,
            args=make_arguments(
                tmp_path,
                stage1_steps=3 if stage == 1 else 0,
                stage2_steps=3 if stage == 2 else 0,
                stage2_learning_rate=1e-2,
                optim="sgd",
                ce_weight=0.3,
                hidden_weight=0.3,
                attention_weight=0.3,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=accumulation,
            ),
            train_dataset=make_rows(24),
            data_collator=masked_collator,
        )
        for module in student.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        trainer.train()
        weights.append(torch.cat([value.flatten() for value in student.parameters()]).detach())
    start = torch.cat(
        [value.flatten() for value in EchoAttForCausalLM.from_teacher(lively_teacher, PLAN).parameters()]
    )
    assert (weights[0] - start).abs().max() > 1e-4
    for other in weights[1:]:
        assert (weights[0] - other).abs().max() < 1e-5


def test_batch_without_targets_trains_on(teacher, student, tmp_path):
    def all_masked(rows):
        batch = collate_rows(rows)
        batch["labels"][:] = -100
        return batch

    trainer = EchoAttTrainer(
        model=student,
        teacher=teacher,
        args=make_arguments(
            tmp_path, stage1_steps=2, stage2_steps=1, ce_weight=1.0, hidden_weight=1.0, attention_weight=1.0
        ),
        train_dataset=make_rows(),
        data_collator=all_masked,
    )
    trainer.train()
    assert all(float(entry["loss"]) == 0 for entry in log_of(trainer))
    assert all(torch.isfinite(value).all() for value in student.parameters())


def test_eval_loss_is_the_cross_entropy_in_stage_one(teacher, student, tmp_path):
    rows = make_rows(8, seed=5)
    trainer = EchoAttTrainer(
        model=student,
        teacher=teacher,
        args=make_arguments(tmp_path, kl_temperature=3.0),
        train_dataset=make_rows(),
        eval_dataset=rows,
        data_collator=collate_rows,
    )
    metrics = trainer.evaluate()
    batch = collate_rows(list(rows))
    with torch.no_grad():
        logits = student(batch["input_ids"]).logits
        expected, _ = plain_losses(logits, logits, batch["labels"])
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("loss_only", [True, False], ids=["loss only", "with logits"])
def test_eval_loss_is_the_mean_over_targets_whatever_the_batch_size(teacher, student, tmp_path, batch_size, loss_only):
    """Answers have different lengths, and a row may have none."""
    rows, lengths = make_rows(4, seed=5), [10, 1, 0, 0]
    batch = collate_rows(list(rows))
    labels = batch["labels"].clone()
    for row, length in enumerate(lengths):
        labels[row, : labels.shape[1] - length] = -100
    rows = [{"input_ids": row["input_ids"], "labels": label.tolist()} for row, label in zip(rows, labels, strict=True)]
    trainer = EchoAttTrainer(
        model=student,
        teacher=teacher,
        args=make_arguments(tmp_path, per_device_eval_batch_size=batch_size),
        train_dataset=make_rows(),
        eval_dataset=rows,
        data_collator=default_data_collator,
        compute_metrics=None if loss_only else lambda prediction: {"rows": len(prediction.predictions)},
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        logits = student(batch["input_ids"]).logits
    expected, _ = plain_losses(logits, logits, labels)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert loss_only or metrics["eval_rows"] == 4


@pytest.mark.parametrize("stop", [2, 4, 5], ids=["in stage 1", "between the stages", "in stage 2"])
def test_resumed_run_ends_with_the_same_weights(teacher, tmp_path, stop):
    def run(folder, resume=None):
        torch.manual_seed(7)
        student = EchoAttForCausalLM.from_teacher(teacher, PLAN)
        trainer = make_trainer(
            student, teacher, folder, stage1_steps=4, stage2_steps=3, save_strategy="steps", save_steps=stop
        )
        trainer.train(resume_from_checkpoint=resume)
        return student.state_dict()

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_checkpoint_holds_nothing_of_the_teacher(teacher, student, tmp_path):
    from safetensors import safe_open

    trainer = make_trainer(student, teacher, tmp_path, save_strategy="steps", save_steps=4, attention_weight=1.0)
    trainer.train()
    with safe_open(tmp_path / "checkpoint-4" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == set(student.state_dict())
    reloaded = EchoAttForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    ids = torch.arange(1, 9)[None]
    student.eval()
    torch.testing.assert_close(reloaded(ids).logits, student(ids).logits, **FP32_TOLERANCE)


@pytest.mark.parametrize("attention_weight", [0.0, 0.5])
def test_gradient_checkpointing_trains_to_the_same_weights(lively_teacher, tmp_path, attention_weight):
    results = []
    for checkpointing in (False, True):
        student = EchoAttForCausalLM.from_teacher(lively_teacher, PLAN)
        for module in student.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        changes = {CHECKPOINTING: checkpointing, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
        make_trainer(student, lively_teacher, tmp_path, attention_weight=attention_weight, **changes).train()
        results.append(student.state_dict())
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage1_steps": -1}, "stage1_steps is -1"),
        ({"stage1_steps": 0, "stage2_steps": 0}, "both 0"),
        ({"kl_weight": -0.5}, "kl_weight is -0.5"),
        ({"ce_weight": math.nan}, "ce_weight is nan"),
        ({"attention_weight": -2.0}, "attention_weight is -2.0"),
        ({"kl_weight": 0.0}, "would learn nothing"),
        ({"kl_temperature": 0.0}, "kl_temperature is 0.0"),
        ({"max_steps": 7}, "max_steps is 7"),
        ({"num_train_epochs": 1}, "num_train_epochs is 1, but the stages are counted in steps"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor is 1.0"),
        (
            {"divergence": "backward"},
            "divergence is 'backward'; it must be one of 'forward', 'reverse', 'jensen_shannon'",
        ),
    ],
)
def test_bad_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "metric_for_best_model": "loss"},
            "lr_scheduler_type is '.*', which is not a function of the step",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        (
            {"lr_scheduler_kwargs": {"foo": 1}},
            "lr_scheduler_kwargs is {'foo': 1}, which lr_scheduler_type .* not take: .*foo",
        ),
    ],
    ids=["no function of the step", "without its minimum", "unknown"],
)
def test_a_schedule_that_cannot_be_made_is_refused_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_arguments(tmp_path, **changes)


def test_stage_one_needs_a_teacher_and_stage_two_none(student, tmp_path):
    with pytest.raises(ValueError, match="needs a teacher"):
        make_trainer(student, None, tmp_path)
    make_trainer(student, None, tmp_path, stage1_steps=0, stage2_steps=1).train()


def test_teacher_that_does_not_fit_is_refused(teacher, student, tmp_path):
    with pytest.raises(ValueError, match="same object"):
        make_trainer(student, student, tmp_path)
    with pytest.raises(TypeError, match="teacher is 'builtin', not a model"):
        make_trainer(student, "builtin", tmp_path)
    config = copy.deepcopy(teacher.config)
    config.vocab_size = VOCAB + 1
    with pytest.raises(ValueError, match=f"{VOCAB} tokens and the teacher {VOCAB + 1}, and it is not known whether"):
        make_trainer(student, LlamaForCausalLM(config), tmp_path)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="set hidden_weight to 0"):
        make_trainer(student, LlamaForCausalLM(config), tmp_path, hidden_weight=1.0)
    with pytest.raises(ValueError, match="set hidden_weight and attention_weight to 0"):
        make_trainer(student, LlamaForCausalLM(config), tmp_path, hidden_weight=1.0, attention_weight=1.0)
    make_trainer(student, LlamaForCausalLM(config), tmp_path)


def test_wrong_arguments_class_is_refused(student, teacher, tmp_path):
    with pytest.raises(TypeError, match="EchoAttTrainingArguments"):
        EchoAttTrainer(model=student, teacher=teacher, args=TrainingArguments(str(tmp_path), use_cpu=True))


def test_batch_without_labels_is_refused(student, teacher, tmp_path):
    trainer = EchoAttTrainer(
        model=student,
        teacher=teacher,
        args=make_arguments(tmp_path),
        train_dataset=make_rows(),
        data_collator=lambda rows: {"input_ids": collate_rows(rows)["input_ids"]},
    )
    with pytest.raises(ValueError, match="no labels"):
        trainer.train()


def test_data_parallel_is_refused(student, teacher, tmp_path):
    args = make_arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch"):
        EchoAttTrainer(model=student, teacher=teacher, args=args, train_dataset=make_rows())


# Tokenizers and vocabularies.


def tokenizer_of(*texts):
    trained = train_byte_level_bpe([*texts] * 9, 300, ["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Teachers in folders with their tokenizers: of one tokenizer, of more tokens by padding, and of another tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    own, other = tokenizer_of("one text of some words"), tokenizer_of("quite different things")
    assert len(own) != 300 and own.get_vocab() != other.get_vocab()
    for name, size, tokenizer in (
        ("plain", len(own), own),
        ("padded", len(own) + 20, own),
        ("other", len(own), other),
        ("nameless", len(own), None),
    ):
        make_small_teacher(size, initializer_range=0.3).save_pretrained(folder / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / name)
    return folder, own


def make_trainer_of(student, teacher, folder, **options):
    arguments = make_arguments(folder)
    return EchoAttTrainer(
        model=student,
        teacher=teacher,
        args=arguments,
        train_dataset=make_rows(),
        data_collator=collate_rows,
        **options,
    )


def test_teacher_with_another_tokenizer_is_refused(saved, tmp_path, caplog):
    folder, own = saved
    plain, other, nameless = (load_model(folder / name) for name in ("plain", "other", "nameless"))
    made, loaded = EchoAttForCausalLM.from_teacher(plain, PLAN), tmp_path / "student"
    with caplog.at_level(logging.WARNING, "echoatt_hf"):
        make_trainer_of(made, plain, tmp_path, processing_class=own)
        # One without a name was made of its teacher: there is nothing to compare.
        make_trainer_of(EchoAttForCausalLM.from_teacher(plain, PLAN), plain, tmp_path)
    assert "tokenizer" not in caplog.text
    with pytest.raises(ValueError, match=r"another tokenizer than the student: \d+ of the student's \d+ tokens"):
        make_trainer_of(made, other, tmp_path, processing_class=own)
    # By the names they were loaded from, where no tokenizer is given.
    made.save_pretrained(loaded)
    own.save_pretrained(loaded)
    with pytest.raises(ValueError, match="another tokenizer than the student"):
        make_trainer_of(load_model(loaded), other, tmp_path)
    # What is not known is said, not guessed.
    with caplog.at_level(logging.WARNING, "echoatt_hf"):
        make_trainer_of(load_model(loaded), nameless, tmp_path)
    assert "tokenizer of the teacher is not known" in caplog.text


@pytest.mark.parametrize("roles", [("plain", "padded"), ("padded", "plain")], ids=["teacher", "student"])
def test_padding_of_a_vocabulary_is_cut(saved, tmp_path, roles):
    folder, own = saved
    source, teacher = (load_model(folder / name) for name in roles)
    student = without_dropout(EchoAttForCausalLM.from_teacher(source, PLAN))
    trainer = make_trainer_of(student, teacher, tmp_path, processing_class=own)
    batch = collate_rows(list(make_rows(4)))
    with torch.no_grad():
        logits, expected = (model(batch["input_ids"]).logits[..., : len(own)] for model in (student, teacher))
        found = trainer.compute_loss(student.train(), batch)
    assert found.item() == pytest.approx(plain_losses(logits, expected, batch["labels"])[1].item(), rel=1e-5)
    trainer.train()


def test_a_larger_teacher_of_the_same_tokenizer(student, tmp_path):
    larger = make_teacher("llama", vocab_size=VOCAB, hidden_size=64, num_hidden_layers=7)
    trainer = make_trainer(without_dropout(student), larger, tmp_path)
    batch = collate_rows(list(make_rows(4)))
    with torch.no_grad():
        logits = (model(batch["input_ids"]).logits for model in (student, larger))
        found = trainer.compute_loss(student.train(), batch)
    assert found.item() == pytest.approx(plain_losses(*logits, batch["labels"])[1].item(), rel=1e-5)
    trainer.train()


def test_a_teacher_that_is_spread_over_devices(lively_teacher, lively_student, tmp_path):
    """As by `device_map`; a disk stands for a second device."""
    student, batch = without_dropout(lively_student), collate_rows(list(make_rows(4)))
    plain = make_trainer(student, copy.deepcopy(lively_teacher), tmp_path)
    devices = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    devices |= {f"model.layers.{layer}": "cpu" if layer < 2 else "disk" for layer in range(4)}
    spread = dispatch_model(lively_teacher, devices, offload_dir=tmp_path / "offload")
    trainer = make_trainer(student, spread, tmp_path)
    with torch.no_grad():
        expected, found = (each.compute_loss(student.train(), batch).item() for each in (plain, trainer))
    assert found == pytest.approx(expected, rel=1e-6)
    trainer.train()
    assert spread.hf_device_map == devices and spread.model.layers[3].mlp.up_proj.weight.is_meta


# What `Trainer` takes.

WORKS, NO_CONCERN = "works", "does not concern the loss"
# Of each field of `TrainingArguments`: that it does not concern the loss, which test shows that it works, or values that
# are refused. A field that a newer transformers brings is missing here: find out which it is.
ARGUMENTS = {
    "max_steps": {"max_steps": 7},
    "num_train_epochs": {"num_train_epochs": 1},
    "parallelism_config": "test_rows_and_layers_are_not_divided",
    "label_smoothing_factor": "test_smoothed_labels_equal_those_by_hand",
    "learning_rate": "test_stages_have_their_own_steps_rates_and_losses",
    "lr_scheduler_type": "test_each_stage_warms_up_and_decays",
    "lr_scheduler_kwargs": "test_each_stage_warms_up_and_decays",
    "warmup_steps": "test_each_stage_warms_up_and_decays",
    "gradient_accumulation_steps": "test_accumulation_does_not_change_the_gradients",
    "per_device_train_batch_size": "test_accumulation_does_not_change_the_gradients",
    "average_tokens_across_devices": "test_accumulation_does_not_change_the_gradients",
    "gradient_checkpointing": "test_gradient_checkpointing_trains_to_the_same_weights",
    "gradient_checkpointing_kwargs": "test_gradient_checkpointing_trains_to_the_same_weights",
    "activation_checkpointing": "test_gradient_checkpointing_trains_to_the_same_weights",
    "activation_checkpointing_kwargs": "test_gradient_checkpointing_trains_to_the_same_weights",
    "bf16": "test_mixed_precision_leaves_the_models_as_they_are",
    "fp16": "test_mixed_precision_leaves_the_models_as_they_are",
    "prediction_loss_only": "test_evaluation_makes_all_logits_only_where_they_are_asked_for",
    "remove_unused_columns": "test_batch_without_labels_is_refused",
    "label_names": "test_batch_without_labels_is_refused",
    "resume_from_checkpoint": "test_resumed_run_ends_with_the_same_weights",
    # Elsewhere: test_adapters.py, test_liger.py, test_distributed.py, test_faults.py.
    **dict.fromkeys(
        [
            "torch_compile",
            "torch_compile_backend",
            "torch_compile_mode",
            "use_liger_kernel",
            "liger_kernel_config",
            "fsdp",
            "fsdp_config",
            "deepspeed",
            "logging_nan_inf_filter",
        ],
        WORKS,
    ),
    **dict.fromkeys(
        [
            "output_dir",
            "optim",
            "optim_args",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "optim_target_modules",
            "max_grad_norm",
            "bf16_full_eval",
            "fp16_full_eval",
            "tf32",
            "use_cache",
            "neftune_noise_alpha",
            "torch_empty_cache_steps",
            "auto_find_batch_size",
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "log_on_each_node",
            "include_num_input_tokens_seen",
            "log_level",
            "log_level_replica",
            "disable_tqdm",
            "report_to",
            "run_name",
            "project",
            "trackio_space_id",
            "trackio_bucket_id",
            "trackio_static_space_id",
            "eval_strategy",
            "eval_steps",
            "eval_delay",
            "per_device_eval_batch_size",
            "eval_on_start",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "include_for_metrics",
            "batch_eval_metrics",
            "save_only_model",
            "save_strategy",
            "save_steps",
            "save_on_each_node",
            "save_total_limit",
            "enable_jit_checkpoint",
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
            "ignore_data_skip",
            "restore_callback_states_from_checkpoint",
            "full_determinism",
            "seed",
            "data_seed",
            "use_cpu",
            "accelerator_config",
            "dataloader_drop_last",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
            "train_sampling_strategy",
            "length_column_name",
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "ddp_backend",
            "ddp_timeout",
            "debug",
            "skip_memory_metrics",
            "do_train",
            "do_eval",
            "do_predict",
            "local_rank",
        ],
        NO_CONCERN,
    ),
}
# The same of what the constructor takes.
OPTIONS = {
    **dict.fromkeys(["model", "args", "train_dataset", "processing_class"], WORKS),
    **dict.fromkeys(
        [
            "data_collator",
            "eval_dataset",
            "compute_metrics",
            "callbacks",
            "optimizers",
            "optimizer_cls_and_kwargs",
            "preprocess_logits_for_metrics",
        ],
        NO_CONCERN,
    ),
    "model_init": lambda: None,
    "compute_loss_func": lambda outputs, labels, **options: 0.0,
}


def test_every_argument_of_the_trainer_is_decided(student, teacher, tmp_path):
    assert {field.name for field in fields(TrainingArguments)} <= set(ARGUMENTS)
    for name, decided in ARGUMENTS.items():
        if isinstance(decided, dict):
            with pytest.raises(ValueError, match=f"{name} is {decided[name]}"):
                make_arguments(tmp_path, **decided)
        else:
            assert decided in (WORKS, NO_CONCERN) or decided in globals(), name
    assert set(inspect.signature(Trainer.__init__).parameters) - {"self"} <= set(OPTIONS)
    for name, decided in OPTIONS.items():
        if callable(decided):
            with pytest.raises(ValueError, match=f"{name} is given, which this trainer does not use"):
                make_trainer_of(student, teacher, tmp_path, **{name: decided})


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_rows_and_layers_are_not_divided(tmp_path, name):
    class Config:
        pass

    config = Config()
    setattr(config, name, 2)
    with pytest.raises(ValueError, match=f"parallelism_config has a {name} of 2"):
        make_arguments(tmp_path, parallelism_config=config)


@pytest.mark.parametrize("stage", [1, 2])
def test_smoothed_labels_equal_those_by_hand(teacher, student, tmp_path, stage):
    steps = {"stage1_steps": int(stage == 1), "stage2_steps": int(stage == 2)}
    trainer = make_trainer(
        without_dropout(student), teacher, tmp_path, kl_weight=0.0, ce_weight=1.0, label_smoothing_factor=0.3, **steps
    )
    batch = masked_collator(list(make_rows(4)))
    with torch.no_grad():
        log_probs = student(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        mask = batch["labels"][:, 1:] != -100
        nll = -log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0][mask].mean()
        smoothed = 0.7 * nll - 0.3 * log_probs.mean(-1)[mask].mean()
        found = trainer.compute_loss(student.train(), batch)
        evaluated = trainer.compute_loss(student.eval(), batch)
    assert found.item() == pytest.approx(smoothed.item(), rel=1e-5)
    assert evaluated.item() == pytest.approx(nll.item(), rel=1e-5) != found.item()


def test_router_loss_is_that_of_the_family(tmp_path):
    teacher = make_teacher("mixtral", output_router_logits=True, router_aux_loss_coef=10.0)
    student = without_dropout(
        EchoAttForCausalLM.from_teacher(teacher, range(teacher.config.num_hidden_layers))
    ).train()
    batch = make_batch(4)
    batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    trainer = make_trainer(student, None, tmp_path, stage1_steps=0, stage2_steps=1)
    with torch.no_grad():
        expected = teacher.train()(**batch)
        found = trainer.compute_loss(student, batch)
        evaluated = trainer.compute_loss(student.eval(), batch)
    assert found.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert evaluated.item() == pytest.approx(expected.loss.item() - 10 * expected.aux_loss.item(), rel=1e-4)
    # With the cross-entropy, and with nothing else.
    for ce_weight in (0.0, 0.5):
        trainer = make_trainer(student, teacher, tmp_path, kl_weight=1.0, ce_weight=ce_weight)
        with torch.no_grad():
            found = trainer.compute_loss(student.train(), batch)
        assert found.item() == pytest.approx(ce_weight * expected.loss.item(), rel=1e-4, abs=1e-5)
    student.language_model.router_aux_loss_coef = None
    with pytest.raises(ValueError, match="asks for a router loss .* 'mixtral' do not say its weight"):
        make_trainer(student, None, tmp_path, stage1_steps=0, stage2_steps=1)


# Mixed precision, and weights that are no numbers.


def test_mixed_precision_leaves_the_models_as_they_are(lively_teacher, lively_student, tmp_path):
    kept = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                kept["logits"] = model(batch["input_ids"]).logits
                kept["plain"] = EchoAttForCausalLM.forward(model, batch["input_ids"]).logits

    batch = collate_rows(list(make_rows(2)))
    trainer = make_trainer(without_dropout(lively_student), lively_teacher, tmp_path, bf16=True, stage1_steps=2)
    trainer.add_callback(Look())
    dtypes = []
    hooks = [
        model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
        for model in (lively_teacher, lively_student.language_model)
    ]
    trainer.train()
    for hook in hooks:
        hook.remove()
    assert dtypes.count(torch.bfloat16) == 4  # steps of both; the callback looks at whole numbers
    assert dtypes.count(torch.float32) == len(dtypes) - 4 == 4
    assert torch.equal(kept["logits"], kept["plain"]) and kept["logits"].dtype == torch.float32
    trainer.evaluate(make_rows(4))
    for model in (lively_teacher, lively_student):
        assert "forward" not in vars(model) and "_original_forward" not in vars(model)
    convert(lively_teacher, PLAN)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_that_are_no_numbers_are_named(lively_teacher, lively_student, tmp_path, role):
    layer = (lively_teacher if role == "teacher" else lively_student.language_model).model.layers[2]
    with torch.no_grad():
        layer.mlp.up_proj.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match=rf"{role} has weights that are NaN, in '.*layers.2.mlp.up_proj"):
        make_trainer(lively_student, lively_teacher, tmp_path)
