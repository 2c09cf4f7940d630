"""Rows whose documents do not see each other: everywhere a row of two documents counts as two rows."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import FP32_TOLERANCE, make_batch, make_teacher, plan_of, train_byte_level_bpe
from datasets import Dataset
from families import FAMILIES
from transformers import PreTrainedTokenizerFast

from echoatt_hf import (
    DataSettings,
    EchoAttForCausalLM,
    EchoAttTrainer,
    EchoAttTrainingArguments,
    add_lora,
    collate_rows,
    evaluate_model,
    load_documents,
    pack_rows,
    refit_outputs,
    search_plan,
)
from echoatt_hf.analysis.similarity import measure_on_rows
from echoatt_hf.pipeline.preparation import load_calibration_rows, load_held_out_rows, load_rows
from echoatt_hf.settings import CompressionSettings


HALF = 10
EOS = "<|endoftext|>"
TEXTS = [f"document {number}: " + "the cat sat on the mat. " * (number % 3) for number in range(30)]


def make_rows(count, seed=0):
    """The same tokens as `count` rows of two documents each, and as rows of one."""
    tokens = make_batch(count, 2 * HALF, seed=seed)["input_ids"].tolist()
    packed = [{"input_ids": row, "position_ids": [*range(HALF), *range(HALF)]} for row in tokens]
    alone = [{"input_ids": row[start : start + HALF]} for row in tokens for start in (0, HALF)]
    return packed, alone


def logits_of_each(model, packed):
    """Logits `(B, T, V)` with each document in a forward pass of its own."""
    tokens = torch.tensor([row["input_ids"] for row in packed])
    with torch.no_grad():
        return torch.cat([model(part, use_cache=False).logits for part in tokens.split(HALF, dim=1)], dim=1)


@pytest.fixture
def teacher():
    return make_teacher(initializer_range=0.3)  # whose layers attend in different ways


@pytest.fixture
def student(teacher):
    return EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"))


@pytest.fixture(scope="module")
def tokenizer():
    backend = train_byte_level_bpe(TEXTS, 300, [EOS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


# Rows


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_positions_start_again_with_each_row_and_document(tokenizer, streaming):
    documents = load_documents(Dataset.from_dict({"text": TEXTS}), streaming=streaming)
    rows = list(pack_rows(documents, tokenizer, 16, document_masks=True))
    assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in pack_rows(documents, tokenizer, 16)]
    starts = 0
    for row in rows:
        place = -1
        for before, position in zip([None, *row["input_ids"]], row["position_ids"], strict=False):
            place = 0 if before == tokenizer.eos_token_id else place + 1
            assert position == place
            starts += place == 0
    assert len(rows) < starts < 2 * len(rows) + len(TEXTS)  # rows with one document, and with several


def test_documents_without_an_end_token_are_kept_apart(tokenizer):
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    lengths = [len(plain(text)["input_ids"]) for text in TEXTS[:3]]
    documents = load_documents(Dataset.from_dict({"text": TEXTS[:3]}))
    (row,) = pack_rows(documents, plain, sum(lengths), document_masks=True)
    assert row["position_ids"] == [position for length in lengths for position in range(length)]


def test_a_batch_holds_positions_if_the_rows_do():
    packed, alone = make_rows(2)
    batch = collate_rows(packed)
    assert list(batch) == ["input_ids", "position_ids", "labels"]
    assert batch["position_ids"].tolist() == [row["position_ids"] for row in packed]
    assert torch.equal(batch["labels"], batch["input_ids"]) and list(collate_rows(alone)) == ["input_ids", "labels"]


# What uses them


@pytest.mark.parametrize(
    "attention",
    ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)],  # torch traces it
)
def test_evaluation(teacher, student, attention):
    packed, _ = make_rows(3)
    expected, target = logits_of_each(student, packed), logits_of_each(teacher, packed)
    for model in (student, teacher):
        model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"):  # flex attention without its compiler
        found = evaluate_model(student, packed, teacher=teacher, batch_size=2)
    tokens = torch.tensor([row["input_ids"] for row in packed])
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    log_probs, target = expected[:, :-1].log_softmax(-1), target[:, :-1].log_softmax(-1)
    assert found["tokens"] == tokens[:, 1:].numel()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["kl"] == pytest.approx((target.exp() * (target - log_probs)).sum(-1).mean().item(), rel=1e-4)
    whole = evaluate_model(student, [{"input_ids": row["input_ids"]} for row in packed], teacher=teacher)
    assert abs(whole["kl"] / found["kl"] - 1) > 0.01


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("adapters", [False, True], ids=["weights", "adapters"])
def test_distillation(teacher, student, tmp_path, use_cache, adapters):
    packed, _ = make_rows(4)
    teacher.config.use_cache = use_cache  # with a cache documents would see each other
    expected, target = logits_of_each(student, packed), logits_of_each(teacher, packed)
    arguments = EchoAttTrainingArguments(
        str(tmp_path), stage1_steps=1, learning_rate=0.0, per_device_train_batch_size=4, ce_weight=1.0,
        attention_weight=1.0, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = EchoAttTrainer(
        model=add_lora(student, 2) if adapters else student, teacher=teacher, args=arguments, data_collator=collate_rows,
        train_dataset=Dataset.from_list(packed), eval_dataset=Dataset.from_list(packed),
    )  # fmt: skip
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "kl_loss" in entry]
    tokens = torch.tensor([row["input_ids"] for row in packed])
    log_probs, target = expected[:, :-1].log_softmax(-1), target[:, :-1].log_softmax(-1)
    loss = F.cross_entropy(log_probs.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert log["kl_loss"] == pytest.approx((target.exp() * (target - log_probs)).sum(-1).mean().item(), rel=1e-4)
    assert log["ce_loss"] == pytest.approx(loss, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_similarity(family):
    packed, alone = make_rows(5)
    teacher = make_teacher(family, initializer_range=0.3)
    found, expected = measure_on_rows(teacher, packed), measure_on_rows(teacher, alone)
    assert found.rows == expected.rows == 10 * (HALF - 1)
    torch.testing.assert_close(found.heads, expected.heads, **FP32_TOLERANCE)
    whole = measure_on_rows(teacher, [{"input_ids": row["input_ids"]} for row in packed])
    assert (whole.heads - expected.heads).abs().max() > 1e-3


def test_refit(teacher):
    errors, weights = [], []
    for rows, held_out in zip(make_rows(24), make_rows(8, seed=1), strict=True):
        student = EchoAttForCausalLM.from_teacher(teacher, plan_of("llama"))
        errors.append(refit_outputs(student, teacher, rows, held_out))
        weights.append(student.state_dict())
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert min(errors[0].values()) < 0.9
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-3)


def test_search(teacher):
    """The KL of a plan that was found is that of its student, on the same rows."""
    packed, _ = make_rows(8)
    search = search_plan(teacher, packed, ratio=0.2, align=False, refit=False)
    student = EchoAttForCausalLM.from_teacher(teacher, search.plan)
    assert min(search.kl.values()) == pytest.approx(
        evaluate_model(student, packed[-2:], teacher=teacher)["kl"], rel=1e-4
    )


# Settings


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(f"\n{EOS}\n".join(TEXTS))
    return file


def test_all_rows_of_a_run_have_positions(tokenizer, teacher, text_file):
    data = DataSettings(data=[str(text_file)], row_length=16, held_out_fraction=0.3, document_masks=True)
    train, held_out = load_rows(data, tokenizer, teacher)
    calibration = load_calibration_rows(CompressionSettings(data=data), tokenizer, teacher)
    for rows in (train, held_out, calibration, load_held_out_rows(data, tokenizer, teacher)):
        assert any(0 in row["position_ids"][1:] for row in rows)
    data = DataSettings(data=[str(text_file)], row_length=16, held_out_fraction=0.3)
    assert list(load_rows(data, tokenizer, teacher)[0][0]) == ["input_ids"]


@pytest.mark.parametrize("family", ["opt", "biogpt", "afmoe", "jamba"])
def test_families_whose_packed_rows_see_each_other_are_refused(family, tokenizer, text_file):
    data = DataSettings(data=[str(text_file)], row_length=16, held_out_fraction=0.3, document_masks=True)
    model = make_teacher(family, attention=FAMILIES[family].attention)
    with pytest.raises(ValueError, match=f"document_masks is set, but models of type '{family}'.*see each other"):
        load_rows(data, tokenizer, model)


def test_command_line(tokenizer, text_file, tmp_path, capsys):
    from typer.testing import CliRunner

    from echoatt_hf.cli.app import app

    model = make_teacher("llama", vocab_size=len(tokenizer), initializer_range=0.3)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    data = ["--data", str(text_file), "--row-length", "16", "--held-out-fraction", "0.3", "--document-masks"]
    result = CliRunner().invoke(
        app,
        ["compress", str(tmp_path / "teacher"), "--plan", "0,1,1,3,4,4", "--steps", "2", "--calibration-rows", "8"]
        + [*data, "--output", str(tmp_path / "student")],
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "student/report.json").read_text())
    assert report["settings"]["data"]["document_masks"] is True
    settings = DataSettings(data=[str(text_file)], row_length=16, held_out_fraction=0.3, document_masks=True)
    expected = evaluate_model(model, load_held_out_rows(settings, tokenizer, model))["loss"]
    assert report["results"][0]["loss"] == pytest.approx(expected, rel=1e-6)
