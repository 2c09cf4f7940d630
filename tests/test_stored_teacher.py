"""Stored teachers: what is written, that a stopped store ends the same, what is refused, and training from one."""

import hashlib
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FP32_TOLERANCE, train_byte_level_bpe
from processes import run_python
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from echoatt_hf import EchoAttForCausalLM, StoredTeacher, collate_rows, write_stored_teacher
from echoatt_hf.distillation import stored_teacher
from echoatt_hf.distillation.losses import (
    HardLabelLoss,
    divergence_from_stored,
    forward_kl,
    hard_labels_from_stored,
    keep_top,
    merge_rest,
)
from echoatt_hf.distillation.trainer import EchoAttTrainer, EchoAttTrainingArguments
from echoatt_hf.models.checks import hash_tokenizer, hash_weights


pytestmark = pytest.mark.once

TEXT = [f"Story {n}. Once upon a time {n} small bears ate {n * 3} pots of honey.\n" * 20 for n in range(24)]
PLAN = [0, 1, 1, 3]
TOP_K = 5


def make_teacher(vocab_size, **changes):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=vocab_size, max_position_embeddings=64, initializer_range=0.3,
        eos_token_id=0, pad_token_id=0, bos_token_id=0, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    trained = train_byte_level_bpe(TEXT, 300, ["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def teacher(tokenizer):
    return make_teacher(len(tokenizer))


@pytest.fixture(scope="module")
def rows(tokenizer):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": row} for row in torch.randint(0, len(tokenizer), (14, 12), generator=generator).tolist()]


def write(folder, teacher, tokenizer, rows, **changes):
    values = {"top_k": TOP_K, "shard_rows": 4, "batch_size": 3}
    return write_stored_teacher(folder, teacher, tokenizer, rows[:-2], rows[-2:], **{**values, **changes})


@pytest.fixture(scope="module")
def store(tmp_path_factory, teacher, tokenizer, rows):
    folder = tmp_path_factory.mktemp("stored") / "store"
    write(folder, teacher, tokenizer, rows)
    return folder


@pytest.fixture
def copy_of(store, tmp_path):
    """A store to damage."""
    folder = tmp_path / "store"
    folder.mkdir()
    for file in store.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is written.


def test_rows_are_those_of_the_text_with_what_the_teacher_says(store, teacher, rows):
    stored = StoredTeacher(store)
    assert len(stored) == 12 and stored.held_out_rows == rows[-2:]
    batch = collate_rows([stored[index] for index in range(12)])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [row["input_ids"] for row in rows[:-2]]
    with torch.no_grad():
        probs = teacher(batch["input_ids"]).logits.double().softmax(-1)
    expected, ids = probs.topk(TOP_K)
    assert torch.equal(batch["teacher_ids"], ids)
    stored_probs = batch["teacher_logprobs"].double().exp()
    torch.testing.assert_close(stored_probs[..., :-1], expected, rtol=4e-3, atol=0)  # float16 of up to 8 nats
    torch.testing.assert_close(stored_probs[..., -1], 1 - expected.sum(-1), rtol=4e-3, atol=1e-7)


def test_manifest_says_what_it_was_made_of(store, teacher, tokenizer, rows):
    manifest = json.loads((store / "manifest.json").read_text())
    assert (manifest["rows"], manifest["tokens"], manifest["row_length"], manifest["top_k"]) == (12, 144, 12, TOP_K)
    assert manifest["vocab_size"] == len(tokenizer) and manifest["teacher_dtype"] == "float32"
    assert manifest["teacher_sha256"] == hash_weights(teacher)
    assert manifest["tokenizer_sha256"] == hash_tokenizer(tokenizer)
    ids = np.asarray([row["input_ids"] for row in rows[:-2]], "<i4")
    assert manifest["data_sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
    batch = collate_rows([StoredTeacher(store)[index] for index in range(12)])
    rest = batch["teacher_logprobs"][..., -1].double().exp().mean().item()
    assert manifest["rest_mass"] == pytest.approx(rest, abs=2e-6)
    files = sum((store / shard["file"]).stat().st_size for shard in manifest["shards"])
    headers = sum(
        8 + int.from_bytes((store / shard["file"]).read_bytes()[:8], "little") for shard in manifest["shards"]
    )
    assert manifest["bytes_per_token"] * manifest["tokens"] == files - headers == 24 * 144


def test_the_teacher_sees_document_masks_and_the_store_keeps_them(tmp_path, teacher, tokenizer, rows):
    masked = [row | {"position_ids": [*range(5), *range(7)]} for row in rows]
    manifest = write(tmp_path / "store", teacher, tokenizer, masked)
    stored = StoredTeacher(tmp_path / "store")
    assert stored.held_out_rows == masked[-2:] and manifest["bytes_per_token"] == 28
    batch = collate_rows([stored[index] for index in range(12)])
    assert batch["position_ids"].tolist() == [masked[0]["position_ids"]] * 12
    with torch.no_grad():
        logits = teacher(batch["input_ids"][:, 5:]).logits  # of the second document alone
    expected, ids = logits.double().softmax(-1).topk(TOP_K)
    assert torch.equal(batch["teacher_ids"][:, 5:], ids)
    torch.testing.assert_close(batch["teacher_logprobs"][:, 5:, :-1].double().exp(), expected, rtol=4e-3, atol=0)


def test_ids_of_a_large_vocabulary_are_not_cut(tmp_path, tokenizer):
    teacher = make_teacher(2**16 + 40)
    with torch.no_grad():  # the likeliest tokens are beyond 16 bits
        teacher.lm_head.weight[2**16 :] *= 30
    manifest = write(tmp_path / "store", teacher, tokenizer, [{"input_ids": [1, 2, 3]}] * 4)
    stored = StoredTeacher(tmp_path / "store")
    assert manifest["id_dtype"] == "int32" and manifest["bytes_per_token"] == 6 * 6
    assert stored[0]["teacher_ids"].max() >= 2**16
    assert stored[1]["input_ids"].tolist() == [1, 2, 3]


def test_a_row_is_read_when_asked_for_also_in_another_process(copy_of):
    stored = StoredTeacher(copy_of)
    expected = stored[5]
    (copy_of / "shard-00000.safetensors").unlink()
    stored = pickle.loads(pickle.dumps(stored))  # as to a worker of a data loader
    again = stored[5]
    assert all((again[name] == value).all() for name, value in expected.items())
    with pytest.raises(FileNotFoundError):
        stored[3]
    with pytest.raises(IndexError):
        stored[12]


def test_hash_of_weights_is_that_of_their_values(teacher, tokenizer):
    same = make_teacher(len(tokenizer))
    assert hash_weights(same) == hash_weights(teacher)
    half = make_teacher(len(tokenizer)).bfloat16()
    assert hash_weights(half) == hash_weights(half.float())  # however it is loaded
    assert hash_weights(half) != hash_weights(teacher)
    with torch.no_grad():
        same.model.norm.weight[3] += 1e-3
    assert hash_weights(same) != hash_weights(teacher)


def test_hash_of_a_tokenizer_is_that_of_its_vocabulary(tokenizer):
    before = hash_tokenizer(tokenizer)
    tokenizer("padded", padding="max_length", max_length=20, truncation=True)  # which leaves traces in it
    assert hash_tokenizer(tokenizer) == before
    other = train_byte_level_bpe(TEXT[::-1] + ["other words"] * 99, 300, ["<|endoftext|>"])
    assert hash_tokenizer(PreTrainedTokenizerFast(tokenizer_object=other)) != before


# Stopped, damaged, and of something else.


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_stopped_store_becomes_the_same(store, tmp_path, teacher, tokenizer, rows, monkeypatch, stop_after):
    from echoatt_hf.distillation import stored_teacher

    folder, ask, asked = tmp_path / "store", stored_teacher._ask, []

    def stop(teacher, head, columns, top_k):
        asked.append(len(columns["input_ids"]))
        if sum(asked) > 4 * stop_after + 3:  # in the second batch of a shard
            raise KeyboardInterrupt
        return ask(teacher, head, columns, top_k)

    with monkeypatch.context() as patch:
        patch.setattr(stored_teacher, "_ask", stop)
        with pytest.raises(KeyboardInterrupt):
            write(folder, teacher, tokenizer, rows)
    assert len(list(folder.glob("shard-*"))) == stop_after
    if stop_after:
        with pytest.raises(ValueError, match="not finished"):
            StoredTeacher(folder)
    (folder / ".shard-00001.safetensors.abc").write_bytes(b"half")  # what a killed run leaves
    asked.clear()
    monkeypatch.setattr(stored_teacher, "_ask", lambda *given: asked.append(len(given[2]["input_ids"])) or ask(*given))
    write(folder, teacher, tokenizer, rows)
    assert sum(asked) == 12 - 4 * stop_after  # what was there is kept
    assert files_of(folder) == files_of(store)
    asked.clear()
    write(folder, teacher, tokenizer, rows)
    assert not asked and files_of(folder) == files_of(store)


@pytest.mark.parametrize("is_first", [True, False])
def test_one_process_of_a_machine_checks_the_files(store, monkeypatch, is_first):
    checked = []
    monkeypatch.setattr(stored_teacher, "processes", lambda: SimpleNamespace(is_local_main_process=is_first))
    monkeypatch.setattr(stored_teacher, "_check_file", lambda folder, entry, remedy: checked.append(entry["file"]))
    manifest = StoredTeacher(store).manifest
    files = [entry["file"] for entry in (*manifest["shards"], manifest["held_out"])]
    assert checked == (files if is_first else []) and len(files) == 4


@pytest.fixture
def stopped(copy_of):
    """A store of which the last shard is missing."""
    manifest = json.loads((copy_of / "manifest.json").read_text())
    for name in ("rows", "tokens", "rest_mass", "data_sha256", "held_out", "environment"):
        del manifest[name]
    (copy_of / manifest["shards"].pop()["file"]).unlink()
    (copy_of / "manifest.json").write_text(json.dumps(manifest))
    return copy_of


def test_resume_of_something_else_is_refused(stopped, teacher, tokenizer, rows):
    other = make_teacher(len(tokenizer))
    with torch.no_grad():
        other.lm_head.weight[0] += 1
    with pytest.raises(ValueError, match="teacher_sha256 changed"):
        write(stopped, other, tokenizer, rows)
    with pytest.raises(ValueError, match="top_k, bytes_per_token changed"):
        write(stopped, teacher, tokenizer, rows, top_k=7)
    with pytest.raises(ValueError, match=r"shard-00001.*not those of the text any more"):
        write(stopped, teacher, tokenizer, rows[:5] + rows[6:])
    with pytest.raises(ValueError, match="fewer rows"):
        write(stopped, teacher, tokenizer, rows[:4] + rows[-2:])
    assert len(list(stopped.glob("shard-*"))) == 2


def test_a_store_goes_on_in_a_version_that_describes_more(stopped, teacher, tokenizer, rows):
    manifest = json.loads((stopped / "manifest.json").read_text())
    (stopped / "manifest.json").write_text(json.dumps(manifest | {"data": {"row_length": 16}}))
    made = write(stopped, teacher, tokenizer, rows, about={"data": {"row_length": 16, "colour": "red"}})
    assert made["data"]["colour"] == "red" and len(made["shards"]) == 3
    assert made["shards"][:2] == manifest["shards"]


DAMAGE = {
    "truncated": (lambda data: data[:-7], r"of [\d,]+ bytes"),
    "changed": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "content has changed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_shard_is_named(copy_of, damage):
    change, message = DAMAGE[damage]
    for name in ("shard-00001.safetensors", "held_out.safetensors"):
        file = copy_of / name
        whole = file.read_bytes()
        file.write_bytes(change(whole))
        with pytest.raises(ValueError, match=rf"{name}.*corrupt.*{message}.*restore it"):
            StoredTeacher(copy_of)
        file.write_bytes(whole)
    StoredTeacher(copy_of)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="held_out.safetensors.*is missing"):
        StoredTeacher(copy_of)


def test_corrupt_shard_of_a_stopped_store_is_named_and_made_anew(stopped, store, teacher, tokenizer, rows):
    file = stopped / "shard-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors.*corrupt.*delete it"):
        write(stopped, teacher, tokenizer, rows)
    file.unlink()
    write(stopped, teacher, tokenizer, rows)
    assert files_of(stopped) == files_of(store)


def test_what_is_no_store_is_refused(tmp_path, copy_of):
    with pytest.raises(FileNotFoundError, match="no stored teacher"):
        StoredTeacher(tmp_path / "nowhere")
    manifest = json.loads((copy_of / "manifest.json").read_text())
    (copy_of / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        StoredTeacher(copy_of)
    for text in ("{}", "[]", '{"format": 1'):
        (copy_of / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="not the manifest"):
            StoredTeacher(copy_of)


def test_bad_rows_are_refused(tmp_path, teacher, tokenizer, rows):
    with pytest.raises(ValueError, match="no rows"):
        write(tmp_path / "none", teacher, tokenizer, [])
    with pytest.raises(ValueError, match="12 and 11 tokens"):
        write(tmp_path / "ragged", teacher, tokenizer, [*rows[:5], {"input_ids": [1] * 11}, *rows])
    for top_k in (0, len(tokenizer)):
        with pytest.raises(ValueError, match=f"top_k is {top_k}"):
            write(tmp_path / "k", teacher, tokenizer, rows, top_k=top_k)
    assert not (tmp_path / "none").exists() and not (tmp_path / "k").exists()


def test_a_teacher_that_gives_nan_is_not_stored(tmp_path, tokenizer, rows):
    teacher = make_teacher(len(tokenizer))
    token = next(token for token in rows[6]["input_ids"] if not any(token in row["input_ids"] for row in rows[:6]))
    with torch.no_grad():
        teacher.model.embed_tokens.weight[token] = torch.inf  # of which attention makes NaN
    with pytest.raises(ValueError, match="NaN for row 6"):
        write(tmp_path / "store", teacher, tokenizer, rows)
    assert len(list((tmp_path / "store").glob("shard-*"))) == 1


# The loss.


def random_logits(seed=0, vocab=30, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(3, 7, vocab, generator=generator) for _ in range(2))
    return student, teacher.log_softmax(-1)


def test_merged_rest_equals_a_loop():
    logits, _ = random_logits()
    ids = logits.neg().topk(4).indices
    merged = merge_rest(logits, ids)
    for place in [(0, 0), (1, 3), (2, 6)]:
        chosen = ids[place].tolist()
        rest = sum(logits[place][token].double().exp() for token in range(30) if token not in chosen).log()
        assert merged[place].tolist() == pytest.approx([*logits[place][chosen].tolist(), rest.item()], abs=1e-5)


def test_merged_kl_is_a_lower_bound_that_rises_to_the_whole():
    student, teacher = random_logits()
    whole = forward_kl(student, teacher).mean().item()
    values = []
    for k in (1, 4, 12, 29):
        ids = teacher.topk(k).indices
        values.append(forward_kl(merge_rest(student, ids), merge_rest(teacher, ids)).mean().item())
    assert 0 < values[0] < values[1] < values[2] < values[3] == pytest.approx(whole, rel=1e-5)


def test_gradient_moves_the_rest_as_a_whole():
    student, teacher = random_logits()
    student.requires_grad_()
    ids = teacher.topk(4).indices
    forward_kl(merge_rest(student, ids), merge_rest(teacher, ids)).sum().backward()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    kept = torch.zeros_like(p).scatter(-1, ids, 1.0)
    # Of the k tokens q - p as always; of the others q, times by how much of the rest there is too much.
    rest_p, rest_q = ((1 - kept) * p).sum(-1, keepdim=True), ((1 - kept) * q).sum(-1, keepdim=True)
    expected = torch.where(kept > 0, q - p, q * (1 - rest_p / rest_q))
    torch.testing.assert_close(student.grad, expected, **FP32_TOLERANCE)


def test_tokens_without_any_probability_stay_finite():
    student = torch.tensor([[0.0, -300.0, -300.0, -300.0]] * 2)
    student.requires_grad_()
    ids = torch.tensor([[[0]] * 2])
    stored = torch.tensor([[[0.0, torch.finfo(torch.float16).min]] * 2]).half()
    loss = divergence_from_stored("forward", ids, stored)(student, slice(None)).sum()
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(student.grad).all()


# Training.


def make_arguments(folder, **changes):
    values = {
        "stage1_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return EchoAttTrainingArguments(str(folder), **{**values, **changes})


def train(teacher, folder, rows, live=None, **changes):
    student = EchoAttForCausalLM.from_teacher(teacher, PLAN)
    arguments = make_arguments(folder, **changes)
    trainer = EchoAttTrainer(
        model=student, teacher=live, args=arguments, train_dataset=rows, data_collator=collate_rows
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], student


def test_training_from_a_whole_store_equals_training_from_the_teacher(tmp_path, teacher, tokenizer, rows):
    vocab_size = len(tokenizer)
    write(tmp_path / "store", teacher, tokenizer, rows, top_k=vocab_size - 1)
    live, _ = train(teacher, tmp_path, [{"input_ids": row["input_ids"]} for row in rows[:-2]], teacher, ce_weight=0.5)
    stored, _ = train(teacher, tmp_path, StoredTeacher(tmp_path / "store"), ce_weight=0.5)
    for one, other in zip(live, stored, strict=True):
        assert one["kl_loss"] == pytest.approx(other["kl_loss"], rel=3e-3) != 0
        assert one["ce_loss"] == pytest.approx(other["ce_loss"], rel=3e-3)


def test_first_loss_is_that_of_the_stored_rows(tmp_path, store, teacher):
    stored = StoredTeacher(store)
    log, _ = train(teacher, tmp_path, stored, stage1_steps=1, stage2_steps=1, per_device_train_batch_size=12)
    batch = collate_rows([stored[index] for index in range(12)])
    student = EchoAttForCausalLM.from_teacher(teacher, PLAN).eval()
    with torch.no_grad():
        p = teacher(batch["input_ids"]).logits[:, :-1].double().softmax(-1)
        q = student(batch["input_ids"]).logits[:, :-1].double().softmax(-1)
    ids = p.topk(TOP_K).indices
    p, q = (torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], -1) for x in (p, q))
    assert log[0]["kl_loss"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=3e-3)
    assert log[1]["stage"] == 2 and "kl_loss" not in log[1] and "ce_loss" in log[1]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize("size", [40, 60], ids=["fewer tokens", "more tokens"])
def test_padding_of_a_vocabulary_is_cut(size, divergence):
    """A teacher of 50 tokens; what it or the student has beyond 40 is padding."""
    torch.manual_seed(0)
    teacher, student = torch.randn(1, 6, 50), torch.randn(6, size)
    stored, ids = keep_top(teacher, 45)  # so that padding is among what is kept
    found = divergence_from_stored(divergence, ids, stored, 50)(student, slice(None))
    common = min(size, 50)
    # Of what both have the probabilities that were kept are those of the teacher; the rest is one outcome.
    log_probs = torch.full((6, 50), -torch.inf).scatter(-1, ids[0], stored[0, :, :-1].float())
    expected = torch.zeros(6)
    for row in range(6):
        kept = [token for token in ids[0, row].tolist() if token < common]
        others = [token for token in range(common) if token not in kept]
        q = student[row, :common].softmax(-1)
        q = torch.cat([q[kept], q[others].sum()[None]])
        p = torch.cat([log_probs[row, kept], stored[0, row, -1:].float()]).softmax(-1)
        middle = (p + q) / 2
        expected[row] = {
            "forward": (p * (p / q).log()).sum(),
            "reverse": (q * (q / p).log()).sum(),
            "jensen_shannon": ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2,
        }[divergence]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hard_labels_are_tokens_that_the_student_has():
    teacher = torch.tensor([[[0.0, 1.0, 2.0, 5.0], [4.0, 1.0, 2.0, 3.0]]])
    student = torch.randn(2, 3)
    expected = torch.nn.functional.cross_entropy(student, torch.tensor([2, 0]), reduction="none")
    for loss in (hard_labels_from_stored(keep_top(teacher, 3)[1]), HardLabelLoss(lambda tokens: teacher[0, tokens])):
        assert torch.equal(loss(student, slice(None)), expected)


def test_workers_of_a_data_loader_read_the_store(tmp_path, store, teacher):
    alone, _ = train(teacher, tmp_path, StoredTeacher(store), stage1_steps=2)
    helped, _ = train(teacher, tmp_path, StoredTeacher(store), stage1_steps=2, dataloader_num_workers=2)
    assert [entry["loss"] for entry in alone] == [entry["loss"] for entry in helped]


def test_a_loss_that_needs_the_teacher_itself_is_refused(tmp_path, store, teacher):
    stored = StoredTeacher(store)
    for changes, message in [
        ({"hidden_weight": 1.0}, "hidden_weight is 1.0"),
        ({"attention_weight": 0.1}, "attention_weight is 0.1"),
        ({"kl_temperature": 2.0}, "kl_temperature is 2.0.*temperature 1 only"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(teacher, tmp_path, stored, **changes)
    with pytest.raises(ValueError, match="give one of them"):
        train(teacher, tmp_path, stored, teacher)
    with pytest.raises(ValueError, match="lacks teacher_ids or teacher_logprobs"):
        EchoAttTrainer(
            model=EchoAttForCausalLM.from_teacher(teacher, PLAN),
            args=make_arguments(tmp_path),
            train_dataset=stored,
            data_collator=lambda rows: {
                name: value for name, value in collate_rows(rows).items() if not name.startswith("teacher")
            },
        ).train()


def test_students_that_do_not_fit_are_refused(store, teacher, tokenizer):
    stored = StoredTeacher(store)
    stored.check_student(teacher, tokenizer)
    stored.check_teacher(teacher)
    with pytest.raises(ValueError, match="30 tokens and the stored teacher"):
        stored.check_student(make_teacher(30))
    with pytest.raises(
        ValueError, match=f"30 tokens and the stored teacher {len(tokenizer)}: .* the student's tokenizer"
    ):
        stored.check_student(make_teacher(30), tokenizer)
    stored.check_student(make_teacher(len(tokenizer) + 9), tokenizer)  # by padding alone
    short = make_teacher(len(tokenizer))
    short.config.max_position_embeddings = 8
    with pytest.raises(ValueError, match="context is 8"):
        stored.check_student(short)
    other = train_byte_level_bpe(TEXT[::-1] + ["other words"] * 99, 300, ["<|endoftext|>"])
    with pytest.raises(ValueError, match="another tokenizer: its tokenizer_sha256"):
        stored.check_student(teacher, PreTrainedTokenizerFast(tokenizer_object=other))
    with torch.no_grad():
        short.lm_head.weight[0] += 1
    with pytest.raises(ValueError, match="another teacher: its teacher_sha256"):
        stored.check_teacher(short)


# The command line.


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, teacher, tokenizer):
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "text").mkdir()
    for number, text in enumerate(TEXT):
        (folder / "text" / f"{number}.txt").write_text(text)
    for model, name in ((teacher, "teacher"), (EchoAttForCausalLM.from_teacher(teacher, PLAN), "student")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    store = ["store-teacher", "teacher", "--data", "text", "--row-length", 32, "--evaluation-rows", 8, "--top-k", 20]
    result = run(folder, *store, "--rows", 160, "--shard-rows", 64, "--output", "store")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def run(folder, *arguments):
    return run_python("-m", "echoatt_hf.cli", *arguments, cwd=folder)


@pytest.fixture
def run_in_process(workplace, monkeypatch):
    """The command line in this process: as the real one, but without the seconds an import takes."""
    from typer.testing import CliRunner

    from echoatt_hf.cli.app import app

    monkeypatch.chdir(workplace[0])
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_store_teacher_says_what_it_costs(workplace):
    folder, output = workplace
    manifest = StoredTeacher(folder / "store").manifest
    assert "5,120 tokens in 160 rows and 3 files" in output and "84 bytes per token" in output
    assert f"{1 - manifest['rest_mass']:.2%} of the probability is that of the top 20" in output
    assert manifest["teacher"] == {"name": "teacher"} and manifest["data"]["data"] == ["text"]
    assert sorted(path.name for path in folder.iterdir()) == ["store", "student", "teacher", "text"]


def test_distill_needs_neither_teacher_nor_text(workplace, tmp_path, run_in_process):
    folder, _ = workplace
    arguments = ["student", "--stored-teacher", "store", "--steps", 40, "--stage2-steps", 4, "--learning-rate", 3e-3]
    result = run_in_process("distill", *arguments, "--eval-steps", 6, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "perplexity" in result.stdout and "agreement" not in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["name"] for entry in report["results"]] == ["converted", "stage 1", "stage 2"]
    assert report["results"][0]["tokens"] == 31 * len(StoredTeacher(folder / "store").held_out_rows)
    assert report["tokens"] == 40 * 8 * 32
    assert report["settings"]["stored_teacher"]["folder"] == "store"
    assert report["settings"]["data"]["row_length"] == 32
    card = (tmp_path / "out" / "README.md").read_text()
    assert "EchoAtt student of teacher" in card and "20 likeliest tokens" in card and "agreement" not in card
    assert "None" not in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    # With the teacher it is compared, and learns the same.
    result = run_in_process("distill", *arguments, "--teacher", "teacher", "--output", tmp_path / "compared")
    assert result.exit_code == 0, result.stderr
    compared = json.loads((tmp_path / "compared" / "report.json").read_text())["results"]
    assert [entry["name"] for entry in compared] == ["teacher", "converted", "stage 1", "stage 2"]
    assert compared[2]["kl"] < 0.9 * compared[1]["kl"]
    assert [entry["loss"] for entry in compared[1:]] == [entry["loss"] for entry in report["results"]]


BAD = {
    "text of its own": (["--data", "text"], "leave out the options of the data"),
    "other teacher": (["--teacher", "student-of-another"], "another teacher"),
    "temperature": (["--kl-temperature", "2"], "kl_temperature is 2.0"),
    "hidden states": (["--hidden-weight", "1"], "hidden_weight is 1.0"),
    "no store": (["--stored-teacher", "text"], "no stored teacher"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(workplace, tmp_path, run_in_process, teacher, tokenizer, case):
    folder, _ = workplace
    arguments, message = BAD[case]
    if "student-of-another" in arguments:
        other = make_teacher(len(tokenizer))
        with torch.no_grad():
            other.lm_head.weight[0] += 1
        other.save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        arguments = ["--teacher", tmp_path / "other"]
    stored = [] if "--stored-teacher" in arguments else ["--stored-teacher", "store"]
    result = run_in_process("distill", "student", *stored, *arguments, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.stderr
    assert "echoatt: error: " in result.stderr and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_store_that_changed_is_not_resumed_from(workplace, tmp_path, run_in_process, monkeypatch):
    folder, _ = workplace
    store = ["store-teacher", "teacher", "--data", "text", "--row-length", 32, "--evaluation-rows", 8]
    assert run_in_process(*store, "--top-k", 4, "--output", tmp_path / "store").exit_code == 0
    # As a version with other settings of text would have written it.
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    del manifest["data"]["num_proc"]
    manifest["data"]["colour"] = "red"
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    distill = ["distill", "student", "--stored-teacher", tmp_path / "store", "--steps", 4, "--save-steps", 1]

    def fail(self, logs, *rest):
        raise OSError("cut short")

    with monkeypatch.context() as patch:
        patch.setattr(EchoAttTrainer, "log", fail)
        assert "cut short" in run_in_process(*distill, "--output", tmp_path / "out").stderr
    assert list((tmp_path / "out.partial").glob("checkpoints/*"))
    assert run_in_process(*store, "--top-k", 5, "--output", tmp_path / "store", "--overwrite").exit_code == 0
    result = run_in_process(*distill, "--resume", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "other settings: " in result.stderr
    assert "stored_teacher.top_k was 4 and is 5" in result.stderr


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError()],
    ids=["gpu", "cpu"],
)
def test_a_run_that_needs_less_memory_goes_on(workplace, tmp_path, run_in_process, monkeypatch, error):
    distill = ["distill", "student", "--teacher", "teacher", "--data", "text", "--row-length", 32, "--steps", 6]
    distill += ["--stage2-steps", 2, "--save-steps", 2, "--batch-size", 4, "--evaluation-rows", 4]
    assert run_in_process(*distill, "--output", tmp_path / "whole").exit_code == 0
    step, calls = EchoAttTrainer.training_step, []

    def fail(self, *given):
        calls.append(self.state.global_step)
        if len(calls) == 4:
            raise error
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(EchoAttTrainer, "training_step", fail)
        result = run_in_process(*distill, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "bug" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("echoatt: error: There is not enough memory") and "4 rows in 1 micro-batches" in line
    assert "More accumulation_steps" in line and "--resume" in line
    # Other settings than those that say what a step needs are refused, by name.
    result = run_in_process(*distill, "--learning-rate", 0.5, "--resume", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "distillation.learning_rate was 0.001 and is 0.5" in result.stderr
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(EchoAttTrainer, "training_step", lambda self, *given: calls.append(0) or step(self, *given))
        less = ["--accumulation-steps", 4, "--gradient-checkpointing", "--resume"]
        result = run_in_process(*distill, *less, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert len(calls) == 4 * 4  # from the checkpoint of step 2
    one, other = (json.loads((tmp_path / name / "report.json").read_text())["results"] for name in ("whole", "out"))
    assert [entry["loss"] for entry in other] == pytest.approx([entry["loss"] for entry in one], rel=1e-4)


def test_too_little_memory_is_one_line_in_every_command(workplace, tmp_path, run_in_process, monkeypatch):
    def fail(*given, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("echoatt_hf.pipeline.steps.measure_on_rows", fail)
    analyze = ["analyze", "teacher", "--data", "text", "--row-length", 32, "--calibration-rows", 4]
    result = run_in_process(*analyze, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "There is not enough memory (CUDA out of memory.)" in result.stderr


def test_storing_with_too_little_memory_says_so(tmp_path, teacher, tokenizer, rows, monkeypatch):
    def fail(*given, **options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(type(teacher), "forward", fail)
    with pytest.raises(MemoryError, match="can't allocate memory.*batch_size 3 rows. Give a smaller one"):
        write(tmp_path / "store", teacher, tokenizer, rows)


def test_teacher_with_another_tokenizer_is_one_line(workplace, tmp_path, run_in_process, teacher):
    trained = train_byte_level_bpe(["quite different things"] * 9, 300, ["<|endoftext|>"])
    other = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>")
    teacher.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    text = ["--teacher", tmp_path / "other", "--data", "text", "--row-length", 32]
    for command in (["distill", "student", *text, "--output", tmp_path / "out"], ["evaluate", "student", *text]):
        result = run_in_process(*command)
        assert result.exit_code == 2 and "The teacher has another tokenizer than the student" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
