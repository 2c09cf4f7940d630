"""The teacher that ships with the package, and its card."""

import json
import math
from pathlib import Path

import pytest
import torch

from echoatt_hf import (
    EchoAttTrainer,
    EchoAttTrainingArguments,
    SharingPlan,
    builtin_teacher_path,
    collate_rows,
    convert,
    evaluate_model,
    load_documents,
    load_model,
    load_tokenizer,
    pack_rows,
    split_documents,
)


pytestmark = pytest.mark.once

CARD = Path(__file__).parents[1] / "model_cards" / "builtin_teacher"


@pytest.fixture(scope="module")
def teacher():
    return load_model("builtin")


@pytest.fixture(scope="module")
def rows(teacher):
    train, held_out = split_documents(load_documents("stdlib"))
    tokenizer = load_tokenizer("builtin", teacher)
    return pack_rows(train.take(20), tokenizer, 256), pack_rows(held_out, tokenizer, 256).take(24)


def test_is_small_deep_and_safe(teacher):
    names = sorted(path.name for path in builtin_teacher_path().iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (builtin_teacher_path() / "model.safetensors").stat().st_size < 8e6
    assert 12 <= teacher.config.num_hidden_layers <= 16
    assert teacher.config.num_key_value_heads < teacher.config.num_attention_heads
    assert teacher.config.use_cache


def test_predicts_held_out_modules_as_its_card_says(teacher, rows):
    results = json.loads((CARD / "results.json").read_text())
    assert (
        results["tokens"] == math.ceil(20e6 / (32 * 256)) * 32 * 256
    )  # whole steps of `train_teacher.py --tokens 20e6`
    assert results["parameters"] == teacher.num_parameters()
    result = evaluate_model(teacher, rows[1], tokenizer=load_tokenizer("builtin", teacher))
    # Other versions of Python have other modules, and these are a part of them.
    assert result["bits_per_byte"] == pytest.approx(results["held_out"]["bits_per_byte"], rel=0.2)


def test_card_agrees_with_its_results():
    results, card = json.loads((CARD / "results.json").read_text()), (CARD / "README.md").read_text()
    held_out = results["held_out"]
    assert held_out["perplexity"] == pytest.approx(math.exp(held_out["loss"]))
    for figure in (f"{held_out['perplexity']:.3f}", f"{held_out['bits_per_byte']:.4f}", results["command"]):
        assert figure in card
    assert "None" not in card


def test_tokenizer_loses_nothing(teacher):
    tokenizer = load_tokenizer("builtin", teacher)
    text = "def f(x):\n\treturn {'ä': x ** 2}  # → 😀\n\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_few_steps_bring_its_student_closer(teacher, rows, tmp_path):
    train_rows, held_out_rows = rows
    student, _ = convert(teacher, SharingPlan.from_ratio(12, 0.41))
    converted = evaluate_model(student, held_out_rows, teacher=teacher)
    args = EchoAttTrainingArguments(
        output_dir=str(tmp_path),
        stage1_steps=12,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    torch.manual_seed(0)
    EchoAttTrainer(
        model=student, teacher=teacher, args=args, train_dataset=train_rows, data_collator=collate_rows
    ).train()
    distilled = evaluate_model(student, held_out_rows, teacher=teacher)
    assert distilled["kl"] < 0.9 * converted["kl"]  # 0.77 to 0.80: the text is that of the Python at hand
    assert distilled["agreement"] > converted["agreement"]
    assert distilled["perplexity"] < converted["perplexity"]
