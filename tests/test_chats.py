"""Conversations as data: what is read, which tokens they become, which of them are answers, and how rows are packed."""

import copy
import importlib.util
import json
import logging
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_teacher, train_byte_level_bpe
from datasets import Dataset, DatasetDict
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from echoatt_hf import EchoAttForCausalLM, EchoAttTrainer, EchoAttTrainingArguments, compress, evaluate_model
from echoatt_hf.cli.app import app
from echoatt_hf.distillation.stored_teacher import StoredTeacher, write_stored_teacher
from echoatt_hf.models.predictions import compare_predictions
from echoatt_hf.pipeline import steps
from echoatt_hf.pipeline.preparation import load_calibration_rows, load_held_out_rows, load_rows
from echoatt_hf.settings import (
    CalibrationSettings,
    CompressionSettings,
    DataSettings,
    DistillationSettings,
    EvaluationSettings,
    PlanSettings,
    ScoringSettings,
)
from echoatt_hf.text.documents import load_documents, split_documents
from echoatt_hf.text.rows import _Tokenize, collate_rows, draw_rows, pack_rows, slide_rows


pytestmark = [pytest.mark.once, pytest.mark.usefixtures("own_datasets_cache")]


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' }}MARK{{ message.content }}{{ '<|im_end|>\n' }}END{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if think %}{{ '<think>' }}{% endif %}{% endif %}"
)
BY_PREFIX = TEMPLATE.replace("MARK", "").replace("END", "")
BY_MARKS = (
    TEMPLATE.replace("MARK{{ message.content }}{{ '<|im_end|>\n' }}END", "{% if message.role == 'assistant' %}MARKEND{% else %}MARKEND{% endif %}")
    .replace("MARKEND", "{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}", 1)
    .replace("MARKEND", "{{ message.content + '<|im_end|>\n' }}")
)  # fmt: skip
CHATS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {number} and {number}?"},
        {"role": "assistant", "content": f"\n{2 * number} 🙂"},
        {"role": "user", "content": "Why, ünïcödé?"},
        {"role": "assistant", "content": "So it is." * (number % 3)},
    ]
    for number in range(24)
]
TEXTS = [f"A text no. {number} without any talk in it.\n" * 3 for number in range(12)]


def make_tokenizer(template: str | None = BY_PREFIX, bos: bool = False) -> PreTrainedTokenizerFast:
    words = [message["content"] for chat in CHATS for message in chat]
    backend = train_byte_level_bpe([*TEXTS, *words], 320, SPECIAL)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<s>", pad_token="<|endoftext|>",
        chat_template=template,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_teacher("llama", num_hidden_layers=4, vocab_size=len(tokenizer))


def expect(chat: list[dict], first: int = 0) -> list[tuple[str, bool]]:
    """Pieces of a conversation by a plain loop, and whether they are answers, from message `first` on."""
    pieces = []
    for number, message in enumerate(chat):
        is_answer = message["role"] == "assistant" and number >= first
        pieces += [
            (f"<|im_start|>{message['role']}\n", False),
            (f"{message['content']}<|im_end|>\n", is_answer),
        ]
    return pieces


def tokens_of(documents, tokenizer, assistant_only: bool = True) -> list[tuple[list[int], list[int]]]:
    tokenize = _Tokenize(tokenizer, assistant_only)
    found = tokenize(documents["text"][:], documents["chat"][:])
    masks = found.get("assistant_masks", [[]] * len(documents))
    return [(list(ids), list(mask)) for ids, mask in zip(found["input_ids"], masks, strict=True)]


def check_tokens(found, tokenizer, pieces: list[tuple[str, bool]]) -> None:
    tokens, mask = found
    text = "".join(piece for piece, _ in pieces)
    assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
    answers = "".join(piece for piece, is_answer in pieces if is_answer)
    assert tokenizer.decode([token for token, is_answer in zip(tokens, mask, strict=True) if is_answer]) == answers


# Forms and sources


def as_sharegpt(chat: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(each["role"], each["role"]), "value": each["content"]} for each in chat]


FORMS = {
    "messages": lambda chat: {"messages": chat},
    "conversations": lambda chat: {"conversations": as_sharegpt(chat)},
    "conversations with roles": lambda chat: {"conversations": chat},
    "prompt and completion": lambda chat: {"prompt": chat[:-1], "completion": chat[-1:]},
}


def write_json_lines(rows: list[dict], folder: Path):
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_parquet(rows: list[dict], folder: Path):
    pq.write_table(pa.Table.from_pylist(rows), folder / "chats.parquet")
    return folder


def save_data_set(rows: list[dict], folder: Path):
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


SOURCES = {
    "JSON lines": write_json_lines,
    "parquet": write_parquet,
    "data set": lambda rows, folder: Dataset.from_list(rows),
    "stream": lambda rows, folder: Dataset.from_list(rows).to_iterable_dataset(),
    "saved data set": save_data_set,
    "splits": lambda rows, folder: DatasetDict(train=Dataset.from_list(rows)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_every_source(form, source, tokenizer, tmp_path):
    rows = [FORMS[form](chat) for chat in CHATS[:3]]
    data = SOURCES[source](copy.deepcopy(rows), tmp_path)
    for streaming in (False, True):
        documents = load_documents(data, streaming=streaming)
        found = Dataset.from_list(list(documents))
        assert all(found["chat"]) and found["name"][:] == [""] * 3
        for tokens, chat in zip(tokens_of(found, tokenizer), CHATS, strict=False):
            check_tokens(tokens, tokenizer, expect(chat, first=len(chat) - 1 if form.startswith("prompt") else 0))


def test_a_column_may_be_named(tokenizer):
    data = Dataset.from_list([{"text": "plain", "messages": CHATS[1], "talk": CHATS[2]}])
    for name, chat in (("messages", CHATS[1]), ("talk", CHATS[2])):
        (found,) = tokens_of(load_documents(data, text_column=name), tokenizer)
        check_tokens(found, tokenizer, expect(chat))
    assert load_documents(data, text_column="text")["text"][:] == ["plain"]
    with pytest.raises(ValueError, match=r"data set, row 0 has 'text' and 'messages', and only one .*--text-column"):
        load_documents(data)


def test_texts_and_conversations_in_one_file(tokenizer, tmp_path):
    file = write_json_lines([{"text": "plain", "messages": None}, {"text": None, "messages": CHATS[1]}], tmp_path)
    documents = load_documents(file)
    plain, chat = tokens_of(documents, tokenizer)
    check_tokens(plain, tokenizer, [("plain<|im_end|>", True)])
    check_tokens(chat, tokenizer, expect(CHATS[1]))
    assert documents["chat"][:] == ["", f"{str(file)!r}, line 2"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python's own, of a fork
def test_several_processes_make_the_same_rows_and_say_the_same(tokenizer, tmp_path):
    documents = load_documents(write_json_lines([{"messages": chat} for chat in CHATS], tmp_path))
    rows = [pack_rows(documents, tokenizer, 48, assistant_only=True, num_proc=number) for number in (1, 2)]
    assert rows[0][:] == rows[1][:]
    with pytest.raises(ValueError, match="line 1 holds a conversation, but the tokenizer has no chat template"):
        pack_rows(documents, make_tokenizer(None), 48, num_proc=2)


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no columns of JSON")
def test_a_column_of_json_is_read(tokenizer):
    features = datasets.Features({"messages": datasets.Json()})
    documents = load_documents(Dataset.from_dict({"messages": CHATS[1:3]}, features=features))
    for found, chat in zip(tokens_of(documents, tokenizer), CHATS[1:3], strict=True):
        check_tokens(found, tokenizer, expect(chat))


def test_the_split_of_conversations_does_not_depend_on_their_place():
    rows = [{"messages": chat} for chat in CHATS]
    held_out = [
        sorted(split_documents(load_documents(Dataset.from_list(each)), 0.3)[1]["text"][:])
        for each in (rows, rows[::-1])
    ]
    assert held_out[0] == held_out[1] and 0 < len(held_out[0]) < len(rows)


# Tokens and answers


@pytest.mark.parametrize("template", [BY_MARKS, BY_PREFIX], ids=["marks", "prefix"])
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "BOS"])
def test_answers_are_found_by_marks_and_by_prefix(template, bos):
    tokenizer = make_tokenizer(template, bos)
    for form, first in (("messages", 0), ("prompt and completion", 4)):
        documents = load_documents(Dataset.from_list([FORMS[form](chat) for chat in CHATS]))
        for found, chat in zip(tokens_of(documents, tokenizer), CHATS, strict=True):
            check_tokens(found, tokenizer, expect(chat, first))
        whole = tokens_of(documents, tokenizer, assistant_only=False)
        assert [tokens for tokens, _ in whole] == [tokens for tokens, _ in tokens_of(documents, tokenizer)]


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "BOS"])
def test_completion_of_a_text(bos):
    tokenizer = make_tokenizer(bos=bos)
    documents = load_documents(Dataset.from_dict({"prompt": ["Why ", ""], "completion": ["so?", "All of it"]}))
    start = "<s>" if bos else ""
    found = tokens_of(documents, tokenizer)
    check_tokens(found[0], tokenizer, [(f"{start}Why ", False), ("so?<|im_end|>", True)])
    check_tokens(found[1], tokenizer, [(start, False), ("All of it<|im_end|>", True)])


def test_a_token_on_both_sides_of_the_prompt_is_of_the_completion(tokenizer):
    joined = next(token for token in tokenizer.get_vocab() if len(token) == 2 and token.isascii() and token.isalpha())
    documents = load_documents(Dataset.from_dict({"prompt": [joined[0]], "completion": [joined[1]]}))
    ((tokens, mask),) = tokens_of(documents, tokenizer)
    assert len(tokens) == 2 and mask == [1, 1]


@pytest.mark.parametrize("template", [BY_MARKS, BY_PREFIX], ids=["marks", "prefix"])
@pytest.mark.parametrize("as_json", [False, True], ids=["list", "JSON"])
def test_tools_are_kept(template, as_json, tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
    chat = [*CHATS[1][:2], {"role": "tool", "content": "2"}, *CHATS[1][2:]]
    row = {"messages": chat, "tools": json.dumps(tools) if as_json else tools}
    tokenizer = make_tokenizer(template)
    (found,) = tokens_of(load_documents(write_json_lines([row], tmp_path)), tokenizer)
    check_tokens(found, tokenizer, [(f"<|im_start|>tools\n{json.dumps(tools)}<|im_end|>\n", False), *expect(chat)])


def test_options_of_the_template_are_kept(tmp_path):
    tokenizer = make_tokenizer(BY_PREFIX.replace("message.role + '\n'", "message.role + (sign or '') + '\n'"))
    file = write_json_lines([{"messages": CHATS[1], "chat_template_kwargs": {"sign": "!"}}], tmp_path)
    ((tokens, _),) = tokens_of(load_documents(file), tokenizer, assistant_only=False)
    assert tokenizer.decode(tokens).startswith("<|im_start|>system!\nBe brief.")


def test_a_template_whose_prefix_does_not_hold_is_refused(tmp_path):
    # As templates that show the thinking of the last answer alone.
    tokenizer = make_tokenizer(BY_PREFIX.replace("{{ message.content }}", "{{ loop.last }}{{ message.content }}"))
    file = write_json_lines([{"messages": CHATS[1]}, {"messages": CHATS[1]}], tmp_path)
    message = r"assistant_only is set, but .*chats\.jsonl', line 1 in another way when message 2 .*\{% generation %\}"
    with pytest.raises(ValueError, match=message):
        pack_rows(load_documents(file), tokenizer, 48, assistant_only=True)
    pack_rows(load_documents(file), tokenizer, 48)
    with_prompt = [{"messages": CHATS[1], "chat_template_kwargs": {"think": True}}]
    with pytest.raises(ValueError, match="in another way"):
        pack_rows(load_documents(write_json_lines(with_prompt, tmp_path)), make_tokenizer(), 16, assistant_only=True)


def test_an_assistant_that_begins_answers_nothing(tokenizer):
    chat = [{"role": "assistant", "content": "Hello."}, *CHATS[1][1:]]
    (found,) = tokens_of(load_documents(Dataset.from_list([{"messages": chat}])), tokenizer)
    check_tokens(found, tokenizer, expect(chat, first=1))


BAD = {
    "no messages": ({"messages": []}, r"'messages' of .*line 2 holds no messages: .*'role' and 'content'"),
    "text for messages": ({"messages": "Hello"}, r"'messages' of .*line 2 holds str: it must be a list of messages"),
    "no role": ({"messages": [{"content": "x"}]}, r"Message 0 in column 'messages' of .*line 2 has no role"),
    "no message": ({"conversations": ["x"]}, r"Message 0 in column 'conversations' of .*line 2 has no role"),
    "neither": ({"body": "x"}, r"line 2, has no column 'text' or 'messages' or 'conversations' or 'prompt' with"),
    "prompt alone": ({"prompt": "x"}, r"line 2, has no column 'text'"),
    "both": ({"messages": CHATS[0], "text": "x"}, r"line 2 has 'text' and 'messages', and only one"),
    "half a conversation": (
        {"prompt": "x", "completion": CHATS[0]},
        r"'prompt' of .*line 2 holds str: it must be a list",
    ),
    "tools": ({"messages": CHATS[0], "tools": "x"}, r"'tools' of .*line 2 is not JSON"),
    "text": ({"text": ["x"]}, r"'text' of .*line 2 holds list, not text or a list of messages"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud83d"}]}, r"line 2: .*surrogate pair"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("case", BAD)
def test_rows_that_cannot_be_read(case, streaming, tmp_path):
    row, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        list(load_documents(write_json_lines([{"messages": CHATS[0]}, row], tmp_path), streaming=streaming))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_conversations_that_no_template_takes(streaming, tokenizer, tmp_path):
    file = write_json_lines([{"messages": chat} for chat in CHATS], tmp_path)
    with pytest.raises(ValueError, match=r"line 1 holds a conversation, but the tokenizer has no chat template: give"):
        list(pack_rows(load_documents(file, streaming=streaming), make_tokenizer(None), 16))
    wrong = [{"role": "user", "content": "x"}, {"role": "wizard", "content": "x"}]
    file = write_json_lines([{"messages": CHATS[0]}, {"messages": wrong}], tmp_path)
    with pytest.raises(ValueError, match=r"refuses the conversation of .*line 2, whose roles are user, wizard \(unkn"):
        list(pack_rows(load_documents(file, streaming=streaming), tokenizer, 16))


# Rows


def pack_naively(documents: list[tuple[list[int], list[int], bool]], length: int, go_on: bool) -> list[tuple]:
    """Rows of tokens, masks and positions, token by token."""
    rows, queue = [], [(list(zip(*document[:2], range(10**6), strict=False)), document[2]) for document in documents]
    while True:
        row, index, rest = [], 0, None
        while len(row) < length and index < len(queue):
            tokens, is_chat = queue[index]
            taken, left = tokens[: length - len(row)], tokens[length - len(row) :]
            base = taken[0][2]
            row += [(token, mask, place - base) for token, mask, place in taken]
            if left and (go_on or not is_chat):
                rest = [(left, is_chat)]
            elif left and index:
                rest = [(tokens, is_chat)]
            index += 1
        if len(row) < length:
            return rows
        rows.append(tuple(list(values) for values in zip(*row, strict=True)))
        queue = (rest or []) + queue[index:]


def chats_and_texts() -> Dataset:
    rows = [{"messages": chat, "text": None} for chat in CHATS]
    rows += [{"text": text, "messages": None} for text in TEXTS]
    rows.append({"messages": [{"role": "user", "content": "long " * 60}, CHATS[1][-1]], "text": None})
    order = np.random.default_rng(0).permutation(len(rows))
    return load_documents(Dataset.from_list([rows[index] for index in order]))


@pytest.mark.parametrize("row_start", ["bos", "text"])
@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_no_row_goes_on_with_a_conversation_unless_asked(row_start, streaming, tokenizer, caplog):
    documents = chats_and_texts()
    parts = tokens_of(documents, tokenizer)
    assert max(len(tokens) for tokens, _ in parts) > 100 > 48 > min(len(tokens) for tokens, _ in parts)
    expected = pack_naively(
        [(*part, bool(place)) for part, place in zip(parts, documents["chat"], strict=True)], 48, row_start == "text"
    )
    if streaming:
        documents = documents.to_iterable_dataset()
    with caplog.at_level(logging.WARNING):
        rows = list(pack_rows(documents, tokenizer, 48, row_start=row_start, document_masks=True, assistant_only=True))
    found = [(row["input_ids"], row["assistant_masks"], row["position_ids"]) for row in rows]
    assert [tuple(list(values) for values in row) for row in found] == expected
    said = "conversations are longer than a row, and the last"
    assert (said in caplog.text) is (row_start == "bos")


def test_rows_with_bos_add_none_before_a_conversation(caplog):
    tokenizer = make_tokenizer(bos=True)
    begin, bos = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<s>"])
    rows = pack_rows(load_documents(Dataset.from_list([{"messages": chat} for chat in CHATS])), tokenizer, 40)
    assert {row["input_ids"][0] for row in rows} == {begin}
    assert not any(bos in row["input_ids"] for row in rows)


def test_drawn_rows_begin_with_a_conversation(tokenizer):
    documents = load_documents(Dataset.from_list([{"messages": chat} for chat in CHATS * 40]))
    rows = draw_rows(documents, tokenizer, 16, 8, document_masks=True)
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert len(rows) == 8 and {row["input_ids"][0] for row in rows} == {begin}
    starts = {tuple(tokens[:16]) for tokens, _ in tokens_of(documents, tokenizer)}
    assert all(tuple(row["input_ids"]) in starts for row in rows)


# From settings


@pytest.fixture
def chat_file(tmp_path):
    return write_json_lines([{"messages": chat} for chat in CHATS], tmp_path)


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_settings_of_conversations(streaming, chat_file, tmp_path, tokenizer, model):
    settings = DataSettings(
        data=[str(chat_file)], row_length=48, streaming=streaming, assistant_only=True, held_out_fraction=0.3
    )
    columns = {"input_ids", "position_ids", "assistant_masks"}
    rows, held_out = load_rows(settings, tokenizer, model)
    assert (
        set(next(iter(rows))) == set(held_out[0]) == set(load_held_out_rows(settings, tokenizer, model)[0]) == columns
    )
    calibration = CompressionSettings(data=settings, calibration=CalibrationSettings(calibration_rows=4))
    assert set(load_calibration_rows(calibration, tokenizer, model)[0]) == {"input_ids", "position_ids"}
    rows, _ = load_rows(DataSettings(data=[str(chat_file)], document_masks=False, row_length=48), tokenizer, model)
    assert set(next(iter(rows))) == {"input_ids"}
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(TEXTS))
    mixed = DataSettings(
        data=[f"{text}:1", f"{chat_file}:1"],
        row_length=48,
        streaming=streaming,
        assistant_only=True,
        held_out_fraction=0.4,
    )
    masks = [row["assistant_masks"] for row, _ in zip(load_rows(mixed, tokenizer, model)[0], range(20), strict=False)]
    assert {min(mask) for mask in masks} == {0, 1}, "rows of text count as a whole"
    assert all(set(row) == columns for row in load_rows(mixed, tokenizer, model)[0].take(20))
    with pytest.raises(ValueError, match="assistant_only is set, but the data holds no conversations"):
        load_rows(replace(mixed, data=[str(text)]), tokenizer, model)


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("which", ["data", "held_out_data"])
def test_one_of_data_and_held_out_data_has_conversations(which, streaming, chat_file, tmp_path, tokenizer, model):
    """What is held out has the same rows in an evaluation as in a training, and plain text is scored as plain text."""
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(TEXTS))
    files = {"data": [str(text)], "held_out_data": [str(text)]} | {which: [str(chat_file)]}
    settings = DataSettings(**files, row_length=48, streaming=streaming)
    with_masks, without = {"input_ids", "position_ids"}, {"input_ids"}
    of_data, of_held_out = (with_masks, without) if which == "data" else (without, with_masks)
    rows, held_out = load_rows(settings, tokenizer, model)
    assert set(next(iter(rows))) == of_data
    assert held_out and all(set(row) == of_held_out for row in held_out)
    assert load_held_out_rows(settings, tokenizer, model) == held_out
    calibration = CompressionSettings(data=settings, calibration=CalibrationSettings(calibration_rows=4))
    assert set(load_calibration_rows(calibration, tokenizer, model)[0]) == of_data
    settings = replace(settings, assistant_only=True)
    if which == "held_out_data":
        with pytest.raises(ValueError, match="assistant_only is set, but the data holds no conversations"):
            load_rows(settings, tokenizer, model)
        assert set(load_held_out_rows(settings, tokenizer, model)[0]) == with_masks | {"assistant_masks"}
        return
    for load in (load_rows, load_held_out_rows):
        with pytest.raises(ValueError, match="assistant_only is set, but the held-out data holds no conversations"):
            load(settings, tokenizer, model)


def test_rows_without_an_answer_are_refused(tokenizer, model, caplog):
    row = {"input_ids": [5, 6, 7], "assistant_masks": [1, 0, 0]}
    assert "answer_loss" not in evaluate_model(model, [row])
    assert "None of the rows holds a token of an answer" in caplog.text
    documents = load_documents(Dataset.from_list([{"messages": chat} for chat in CHATS]))
    with pytest.raises(ValueError, match="No row of 16 tokens holds a token of an answer: .*--row-length"):
        pack_rows(documents, tokenizer, 16, assistant_only=True)


# Losses, stores and evaluation


def answer_rows(tokenizer, length: int = 48) -> Dataset:
    documents = load_documents(Dataset.from_list([{"messages": chat} for chat in CHATS]))
    return pack_rows(documents, tokenizer, length, document_masks=True, assistant_only=True)


@pytest.fixture
def student(model):
    student = EchoAttForCausalLM.from_teacher(model, [0, 1, 1, 3])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student


def make_trainer(folder, student, teacher, rows, **options) -> EchoAttTrainer:
    arguments = EchoAttTrainingArguments(
        str(folder), stage1_steps=2, stage2_steps=1, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, **options,
    )  # fmt: skip
    return EchoAttTrainer(
        model=student, teacher=teacher, args=arguments, train_dataset=rows, data_collator=collate_rows
    )


@pytest.mark.parametrize(
    "weight", ["kl_weight", "hard_label_weight", "ce_weight", "hidden_weight", "attention_weight"]
)
def test_every_loss_is_that_of_answers_alone(weight, tokenizer, model, student, tmp_path):
    rows = answer_rows(tokenizer)
    trainer = make_trainer(tmp_path, student, model, rows, **{"kl_weight": 0.0, weight: 1.0})
    student.train()
    batch = collate_rows(list(rows.take(2)))
    labels = batch["labels"]
    targets = (labels[:, 1:] != -100).nonzero().tolist()
    assert 4 < len(targets) < labels[:, 1:].numel()
    whole = trainer.compute_loss(student, dict(batch), num_items_in_batch=1).item()
    single = []
    for row, place in targets:
        one = torch.full_like(labels, -100)
        one[row, place + 1] = labels[row, place + 1]
        single.append(trainer.compute_loss(student, {**batch, "labels": one}, num_items_in_batch=1).item())
    assert whole == pytest.approx(sum(single), rel=1e-4)
    everything = trainer.compute_loss(student, {**batch, "labels": batch["input_ids"]}, num_items_in_batch=1).item()
    assert everything > 1.2 * whole


def test_a_store_keeps_which_tokens_are_answers(tokenizer, model, student, tmp_path):
    rows = answer_rows(tokenizer)
    manifest = write_stored_teacher(
        tmp_path / "store", model, tokenizer, rows.select(range(6)), rows.select([6]), top_k=8
    )
    assert manifest["columns"] == ["input_ids", "position_ids", "assistant_masks"]
    assert manifest["bytes_per_token"] == 9 * 2 + 8 * 2 + 2 + 4 + 1
    store = StoredTeacher(tmp_path / "store")
    assert [list(store[index]["assistant_masks"]) for index in range(6)] == rows["assistant_masks"][:6]
    assert store.held_out_rows == [rows[6]]
    trainer = make_trainer(tmp_path, student, None, store, kl_weight=1.0)
    student.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert 0 < (batch["labels"] == -100).sum() < batch["labels"].numel()
    masked = trainer.compute_loss(student, dict(batch), num_items_in_batch=1).item()
    whole = trainer.compute_loss(student, {**batch, "labels": batch["input_ids"]}, num_items_in_batch=1).item()
    assert 0 < masked < whole
    trainer.train()


def score_naively(model, teacher, context: list[int], target: int, places: list[int] | None = None) -> list[float]:
    """NLL, KL and agreement of one token, from a forward pass of its own."""
    inputs = {"input_ids": torch.tensor([context])}
    if places is not None:
        inputs["position_ids"] = torch.tensor([places])
    with torch.no_grad():
        log_q, log_p = (
            each(**inputs, use_cache=False).logits[0, -1].double().log_softmax(-1) for each in (model, teacher)
        )
    kl = (log_p.exp() * (log_p - log_q)).sum().item()
    return [-log_q[target].item(), kl, float(log_p.argmax() == log_q.argmax())]


def means(scores: list[list[float]]) -> list[float]:
    return np.mean(scores, axis=0).tolist()


NAMES = ("loss", "kl", "agreement")


def test_answers_are_evaluated_for_themselves(tokenizer, model, student):
    student.eval()
    rows = answer_rows(tokenizer).select(range(3))
    scores = {True: [], False: []}
    for row in rows:
        for place in range(1, 48):
            context = row["input_ids"][:place], row["input_ids"][place], row["position_ids"][:place]
            scores[bool(row["assistant_masks"][place])].append(score_naively(student, model, *context))
    found = evaluate_model(student, rows, teacher=model, tokenizer=tokenizer, batch_size=2)
    assert [found[name] for name in NAMES] == pytest.approx(means(scores[True] + scores[False]), rel=1e-5)
    assert [found[f"answer_{name}"] for name in NAMES] == pytest.approx(means(scores[True]), rel=1e-5)
    assert found["answer_tokens"] == len(scores[True]) < found["tokens"] == 3 * 47
    assert found["answer_perplexity"] == pytest.approx(np.exp(found["answer_loss"]))
    # The same by labels.
    labelled = [
        {
            "input_ids": row["input_ids"],
            "position_ids": row["position_ids"],
            "labels": [
                token if mask else -100 for token, mask in zip(row["input_ids"], row["assistant_masks"], strict=True)
            ],
        }
        for row in rows
    ]
    assert evaluate_model(student, labelled, teacher=model, tokenizer=tokenizer) == pytest.approx(found)
    plain = [{"input_ids": row["input_ids"], "position_ids": row["position_ids"]} for row in rows]
    assert not any("answer" in name for name in evaluate_model(student, plain))


@pytest.mark.parametrize("stride", [1, 3, 6])
def test_each_token_counts_once_with_at_least_half_a_row_before_it(stride, tokenizer, model, student):
    student.eval()
    documents = load_documents(Dataset.from_dict({"text": [TEXTS[0], "Why?", TEXTS[5][:30]]}))
    scores, count_bytes = [], 0
    for text in documents["text"]:
        tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        count_bytes += len(text.encode()) - len(tokenizer.decode(tokens[:1]).encode())
        end = 12  # of the row in which a token counts: the first one that holds it
        for place in range(1, len(tokens)):
            while place >= end:
                end += stride
            context = tokens[max(0, end - 12) : place]
            assert len(context) >= min(place, 6)
            scores.append(score_naively(student, model, context, tokens[place]))
    rows = list(slide_rows(documents, tokenizer, 12, stride))
    found = evaluate_model(student, rows, teacher=model, tokenizer=tokenizer, batch_size=3)
    assert found["tokens"] == len(scores) > 40
    assert [found[name] for name in NAMES] == pytest.approx(means(scores), rel=1e-5)
    total = found["loss"] * found["tokens"] / np.log(2)
    assert found["bits_per_byte"] == pytest.approx(total / count_bytes)


def test_a_stride_on_answers(tokenizer, model):
    documents = load_documents(Dataset.from_list([{"messages": CHATS[1]}, {"messages": CHATS[2]}]))
    rows = list(slide_rows(documents, tokenizer, 16, 4, assistant_only=True))
    expected = sum(sum(mask) for _, mask in tokens_of(documents, tokenizer))
    found = evaluate_model(model, rows)
    assert found["answer_tokens"] == expected < found["tokens"]


@pytest.mark.parametrize("masks", [False, True], ids=["rows", "documents"])
def test_perplexity_by_position(masks, tokenizer, model, student):
    student.eval()
    documents = load_documents(Dataset.from_dict({"text": [text[: 10 + 7 * n] for n, text in enumerate(TEXTS)]}))
    rows = pack_rows(documents, tokenizer, 20, document_masks=masks).select(range(4))
    ranges, scores = [(0, 5), (6, 12), (13, 19)], [[], [], []]
    for row in rows:
        for place in range(1, 20):
            position = row["position_ids"][place] if masks else place
            context = row["input_ids"][:place], row["input_ids"][place], row["position_ids"][:place] if masks else None
            number = next(index for index, (begin, end) in enumerate(ranges) if begin <= position <= end)
            scores[number].append(score_naively(student, model, *context))
    found = evaluate_model(student, rows, teacher=model, position_buckets=3)["by_position"]
    assert [(part["first"], part["last"]) for part in found] == ranges
    assert [part["tokens"] for part in found] == list(map(len, scores))
    for part, each in zip(found, scores, strict=True):
        assert [part[name] for name in NAMES] == pytest.approx(means(each), rel=1e-5)
        assert part["perplexity"] == pytest.approx(np.exp(part["loss"]))
    with pytest.raises(ValueError, match="position_buckets is 20; rows of 20 tokens have 19"):
        compare_predictions(student, rows, position_buckets=20)


def test_scoring_out_of_range():
    with pytest.raises(ValueError, match=r"stride is 129; it must be from 1 to 128, half of the row length"):
        EvaluationSettings("model", scoring=ScoringSettings(stride=129))
    with pytest.raises(ValueError, match="stride is 0"):
        EvaluationSettings("model", scoring=ScoringSettings(stride=0))
    with pytest.raises(ValueError, match="position_buckets is 256; it must be at most 255"):
        EvaluationSettings("model", scoring=ScoringSettings(position_buckets=256))
    with pytest.raises(ValueError, match="position_buckets is -1"):
        ScoringSettings(position_buckets=-1)


# All of it


@pytest.fixture
def teacher_folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_student_learns_answers(teacher_folder, chat_file, tmp_path):
    data = DataSettings(
        data=[str(chat_file)], row_length=48, assistant_only=True, held_out_fraction=0.3, evaluation_rows=4
    )
    settings = CompressionSettings(
        teacher=str(teacher_folder), data=data, plan=PlanSettings(plan="effect", ratio=0.25, search_rows=2),
        calibration=CalibrationSettings(calibration_rows=8),
        distillation=DistillationSettings(steps=4, stage2_steps=1, batch_size=2, eval_steps=2),
    )  # fmt: skip
    report = compress(settings, tmp_path / "student")
    for entry in report["results"]:
        assert 0 < entry["answer_tokens"] < entry["tokens"] and entry["answer_loss"] > 0
    assert report["results"][0]["answer_kl"] == 0 < report["results"][1]["answer_kl"]
    assert "answers: loss" in (tmp_path / "student" / "README.md").read_text()
    logged = [entry["eval_loss"] for entry in report["training_log"] if "eval_loss" in entry]
    assert logged[-1] == pytest.approx(report["results"][-1]["answer_loss"], rel=0.01), "while training too"
    template = (tmp_path / "student" / "chat_template.jinja").read_text()
    assert template == BY_PREFIX
    every_row = replace(data, evaluation_rows=500)
    scored = EvaluationSettings(
        str(tmp_path / "student"), str(teacher_folder), every_row, scoring=ScoringSettings(8, 4)
    )
    found = steps.evaluate(scored, tmp_path / "found.json")
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["by_position"] == found["by_position"] and len(found["by_position"]) == 4
    assert written["answer_kl"] == found["answer_kl"] > 0


def run_echoatt(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_answers_and_positions_from_the_command_line(teacher_folder, chat_file, tmp_path):
    data = ["--data", chat_file, "--row-length", 48, "--evaluation-rows", 4]
    result = run_echoatt(
        "evaluate", teacher_folder, *data, "--assistant-only", "--stride", 12, "--position-buckets", 2,
        "--output", tmp_path / "found.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "answer_loss " in result.output and "| positions | tokens | perplexity |" in result.output
    assert "| 0 to 23   |" in result.output and "| 24 to 47  |" in result.output
    written = json.loads((tmp_path / "found.json").read_text())
    assert (
        written["scoring"] | {"stride": 12, "position_buckets": 2} == written["scoring"]
        and len(written["by_position"]) == 2
    )
    for bad, message in (
        (["--stride", 40], "stride is 40; it must be from 1 to 24"),
        (["--held-out-data", "stdlib", "--assistant-only"], "the held-out data holds no conversations"),
    ):
        result = run_echoatt("evaluate", teacher_folder, *data, *bad)
        assert result.exit_code == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def answer():
    """The script that lets models answer."""
    script = Path(__file__).parents[1] / "examples" / "chat" / "answer.py"
    spec = importlib.util.spec_from_file_location("answer", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROMPTS = ["What is 1 and 1?", "Why?"]


@pytest.fixture(scope="module")
def talker(tokenizer):
    """A model that does not say the same token again and again."""
    return make_teacher("llama", num_hidden_layers=4, vocab_size=len(tokenizer), initializer_range=0.2)


@pytest.fixture(scope="module")
def written(talker, tokenizer):
    """What the model goes on with after each prompt, 12 tokens; and of the first one a token, and where it first comes."""
    tokens = []
    for prompt in PROMPTS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        made = talker.generate(**inputs, do_sample=False, min_new_tokens=12, max_new_tokens=12)
        tokens.append(made[0, inputs["input_ids"].shape[1] :].tolist())
    assert tokenizer.eos_token_id not in tokens[0] + tokens[1]
    place = next(place for place in range(3, 12) if tokens[0].index(tokens[0][place]) == place)
    return tokens, tokens[0][place], place


def test_answers_of_a_tokenizer_without_a_pad_token(answer, talker, written):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    expected = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in written[0]]
    assert answer.answer(talker, tokenizer, PROMPTS, 12) == [(text, False) for text in expected]


@pytest.mark.parametrize("of_model", ["one", "several"])
def test_an_answer_ends_with_each_of_the_ends_of_its_model(of_model, answer, talker, tokenizer, written, monkeypatch):
    tokens, end, place = written
    ends = end if of_model == "one" else [tokenizer.eos_token_id, end]
    monkeypatch.setattr(talker.generation_config, "eos_token_id", ends)
    text = tokenizer.decode(tokens[0][:place], skip_special_tokens=True).strip()
    assert answer.answer(talker, tokenizer, PROMPTS[:1], 12) == [(text, True)]
    assert answer.answer(talker, tokenizer, PROMPTS[:1], place) == [(text, False)]


def test_an_answer_ends_with_the_end_of_its_tokenizer(answer, talker, written, monkeypatch):
    tokens, end, place = written
    tokenizer = make_tokenizer()
    monkeypatch.setattr(talker.generation_config, "eos_token_id", None)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    text = tokenizer.decode(tokens[0][:place], skip_special_tokens=True).strip()
    assert answer.answer(talker, tokenizer, PROMPTS[:1], 12) == [(text, True)]


def test_a_model_writes_conversations_and_answers_beside_another(
    answer, teacher_folder, tmp_path, capsys, monkeypatch
):
    (tmp_path / "prompts.txt").write_text("What is 1 and 1?\n\nWhy?\n")
    common = ["--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "4", "--dtype", "float32"]
    answer.main([str(teacher_folder), str(teacher_folder), *common])
    assert capsys.readouterr().out.count("\nWhy?\n  teacher: ") == 1
    with pytest.raises(SystemExit):
        answer.main([str(teacher_folder), str(teacher_folder), *common, "--output", str(tmp_path / "chats.jsonl")])
    monkeypatch.setattr(answer, "answer", lambda *_: [("Two.", True), ("cut", False)])
    answer.main([str(teacher_folder), *common, "--output", str(tmp_path / "chats.jsonl")])
    (document,) = load_documents(tmp_path / "chats.jsonl")
    assert json.loads(document["text"])["messages"] == [
        {"role": "user", "content": "What is 1 and 1?"},
        {"role": "assistant", "content": "Two."},
    ]
