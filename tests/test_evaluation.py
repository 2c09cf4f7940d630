import copy
import math
import socket
from pathlib import Path

import evaluate
import pytest
import torch
from conftest import train_byte_level_bpe
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import echoatt_hf
from echoatt_hf.evaluation.held_out import compute_agreement, compute_perplexity, evaluate_model, metric_path
from echoatt_hf.models.loading import load_model
from echoatt_hf.text.documents import load_documents
from echoatt_hf.text.rows import pack_rows


TEXTS = [f"Story {index}: the ünïcödé cat no. {index * 7} sat on a mat 🙂 and sang." for index in range(12)]
TOLERANCE = 1e-6
SHARED_DATA = Path(__file__).parents[2] / "shared/data"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes only: a token is a byte."""
    tokenizer = train_byte_level_bpe(TEXTS, 257, ["<|endoftext|>"], use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def make_model(seed: int, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**({"vocab_size": 257, "initializer_range": 0.2, "attention_dropout": 0.5} | sizes | options))
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return make_model(0)


@pytest.fixture(scope="module")
def student(teacher) -> LlamaForCausalLM:
    """Near enough to the teacher to agree with it on some tokens."""
    student = copy.deepcopy(teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return student


@pytest.fixture(scope="module")
def rows(tokenizer) -> Dataset:
    return pack_rows(load_documents(Dataset.from_dict({"text": TEXTS})), tokenizer, 32)


def evaluate_naively(model, teacher, rows) -> dict:
    """Token by token, in Python floats."""
    nll, kl, same, tokens = 0.0, 0.0, 0, 0
    for row in rows:
        with torch.no_grad():
            logits, teacher_logits = (
                each(torch.tensor([row["input_ids"]])).logits[0].double().tolist() for each in (model, teacher)
            )
        for position, target in enumerate(row["input_ids"][1:]):
            log_p, log_q = (log_softmax(each[position]) for each in (teacher_logits, logits))
            nll -= log_q[target]
            kl += sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
            same += log_p.index(max(log_p)) == log_q.index(max(log_q))
            tokens += 1
    loss = nll / tokens
    return {
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(loss),
        "kl": kl / tokens,
        "agreement": same / tokens,
    }


def log_softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    log_sum = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
    return [logit - log_sum for logit in logits]


def test_agrees_with_a_naive_loop_over_tokens(student, teacher, rows):
    expected = evaluate_naively(student, teacher, rows)
    assert expected["tokens"] == 31 * len(rows)
    assert 0 < expected["agreement"] < 1 and expected["kl"] > 0.01
    result = evaluate_model(student, rows, teacher=teacher)
    assert result == pytest.approx(expected, rel=TOLERANCE)
    assert evaluate_model(student, rows) == pytest.approx(
        {key: expected[key] for key in ("tokens", "loss", "perplexity")}, rel=TOLERANCE
    )


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_batch_size_does_not_matter(batch_size, student, teacher, tokenizer, rows):
    assert len(rows) % 5 and len(rows) < 1000, "the last batch is smaller"
    results = [
        evaluate_model(student, rows, teacher=teacher, tokenizer=tokenizer, batch_size=size)
        for size in (batch_size, 8)
    ]
    assert results[0] == pytest.approx(results[1], rel=TOLERANCE)


@pytest.mark.parametrize("mask", [[0, 0, 1, 1], [1, 0, 1, 1]], ids=["left", "within"])
def test_padding_that_tokens_would_see_is_refused(mask, student):
    rows = [
        {"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [1, 2, 3, 4], "attention_mask": mask},
    ]
    with pytest.raises(ValueError, match=r"attention_mask is 0 before tokens of a row.*padding_side = 'right'"):
        evaluate_model(student, rows)
    padded = [{"input_ids": [3, 4, 7, 7], "attention_mask": [1, 1, 0, 0]}]
    assert evaluate_model(student, padded) == pytest.approx(evaluate_model(student, [{"input_ids": [3, 4]}]), rel=1e-5)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_a_row(size, student, rows):
    with pytest.raises(ValueError, match=f"batch_size is {size}; it must be at least 1"):
        evaluate_model(student, rows, batch_size=size)


def test_rows_may_be_a_list_a_stream_or_a_generator(student, tokenizer, rows):
    expected = evaluate_model(student, rows)
    streamed = pack_rows(load_documents(Dataset.from_dict({"text": TEXTS}), streaming=True), tokenizer, 32)
    for other in (list(rows), streamed, (row for row in rows)):
        assert evaluate_model(student, other) == expected


def test_bits_per_byte_of_a_token_that_is_a_byte(student, tokenizer):
    text = "The quick brown fox jumps over it"
    (row,) = rows = pack_rows(load_documents(Dataset.from_dict({"text": [text]})), tokenizer, 33)
    assert len(row["input_ids"]) == len(text) == 33
    result = evaluate_model(student, rows, tokenizer=tokenizer)
    assert result["tokens"] == 32
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2), rel=TOLERANCE)


def test_bits_per_byte_counts_no_special_tokens(student, tokenizer):
    (row,) = rows = pack_rows(load_documents(Dataset.from_dict({"text": ["four", "more bytes"]})), tokenizer, 16)
    assert row["input_ids"].count(tokenizer.eos_token_id) == 2
    result = evaluate_model(student, rows, tokenizer=tokenizer)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * 15 / math.log(2) / 13, rel=TOLERANCE)


def test_bits_per_byte_counts_the_space_that_decoding_drops():
    """A row that begins inside a text, of a tokenizer that writes a space as the first character of a token."""
    pieces = {"<unk>": 0, "▁one": 1, "▁two": 2, "▁three": 3}
    backend = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([2, 3]) == "two three"
    result = evaluate_model(make_model(0, vocab_size=4), [{"input_ids": [1, 2, 3]}], tokenizer=tokenizer)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * 2 / math.log(2) / len(" two three"))


def test_modes_are_restored_and_dropout_is_off(student, teacher, rows):
    expected = evaluate_model(student, rows, teacher=teacher)
    model, other = copy.deepcopy(student).train(), copy.deepcopy(teacher).train()
    model.model.layers[1].eval()
    modes = [module.training for each in (model, other) for module in each.modules()]
    assert evaluate_model(model, rows, teacher=other) == expected
    assert [module.training for each in (model, other) for module in each.modules()] == modes
    with pytest.raises(ValueError, match="no rows"):
        evaluate_model(model, [], teacher=other)
    assert [module.training for each in (model, other) for module in each.modules()] == modes


def test_no_graph_is_built(student, teacher, rows):
    model, graphs = copy.deepcopy(student), []
    model.register_forward_hook(lambda module, inputs, output: graphs.append(output.logits.requires_grad))
    evaluate_model(model, rows, teacher=teacher)
    assert graphs and not any(graphs)
    assert torch.is_grad_enabled()


def test_a_model_agrees_with_itself(teacher, rows):
    result = evaluate_model(teacher, rows, teacher=teacher)
    assert result["kl"] == 0
    assert result["agreement"] == 1


def test_bfloat16(student, teacher, rows):
    models = [copy.deepcopy(model).bfloat16() for model in (student, teacher)]
    assert evaluate_model(models[0], rows, teacher=models[1]) == pytest.approx(
        evaluate_naively(*models, rows), rel=TOLERANCE
    ), "only the forward pass is in bfloat16"


def test_an_echoatt_student(tokenizer, rows, tmp_path):
    config = make_model(0).config
    torch.manual_seed(0)
    student = echoatt_hf.EchoAttForCausalLM(echoatt_hf.EchoAttConfig(text_config=config, echo_sources=[0, 1, 1]))
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = evaluate_naively(student.eval(), student, rows)
    assert evaluate_model(student, rows, teacher=student) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert compute_perplexity(TEXTS, tmp_path, row_length=32)["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_another_vocabulary_is_refused(teacher, rows):
    with pytest.raises(ValueError, match=r"student has 300 tokens and the teacher 257, and it is not known whether"):
        evaluate_model(make_model(0, vocab_size=300), rows, teacher=teacher)


def test_padding_of_a_vocabulary_is_cut(student, tokenizer, rows, tmp_path):
    padded = make_model(0, vocab_size=300)
    padded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    padded, cut = load_model(tmp_path), make_model(0)
    cut.load_state_dict(
        {name: value[:257] if len(value) == 300 else value for name, value in padded.state_dict().items()}
    )
    found = evaluate_model(student, rows, teacher=padded, tokenizer=tokenizer)
    expected = evaluate_model(student, rows, teacher=cut, tokenizer=tokenizer)
    assert found == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="another tokenizer than the student"):
        other = train_byte_level_bpe(["other words"] * 9, 260, ["<|endoftext|>"])
        evaluate_model(student, rows, teacher=padded, tokenizer=PreTrainedTokenizerFast(tokenizer_object=other))


def test_a_loss_that_is_no_number_is_said(teacher, rows, caplog):
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    result = evaluate_model(model, rows)
    assert math.isnan(result["loss"]) and math.isnan(result["perplexity"])
    assert "The loss is NaN" in caplog.text


@pytest.mark.parametrize("rows", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_rows_are_refused(rows, teacher):
    with pytest.raises(ValueError, match="no rows to evaluate on: give held-out text that fills at least one row"):
        evaluate_model(teacher, rows)


def test_a_diverged_model_has_infinite_perplexity(teacher, rows):
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    result = evaluate_model(model, rows)
    assert result["perplexity"] == math.inf and math.isfinite(result["loss"])


def test_progress_bar_only_with_a_description(teacher, rows, capfd):
    evaluate_model(teacher, rows)
    assert not capfd.readouterr().err
    evaluate_model(teacher, rows, description="held-out rows", batch_size=4)
    assert f"/{math.ceil(len(rows) / 4)} [" in (error := capfd.readouterr().err) and "held-out rows" in error


def test_texts_give_the_numbers_of_their_rows(student, teacher, tokenizer, rows):
    expected = evaluate_model(student, rows, teacher=teacher, tokenizer=tokenizer)
    perplexity = compute_perplexity(TEXTS, student, tokenizer, row_length=32)
    assert perplexity == {key: expected[key] for key in ("tokens", "loss", "perplexity", "bits_per_byte")}
    agreement = compute_agreement(iter(TEXTS), student, teacher, tokenizer, row_length=32)
    assert agreement == {key: expected[key] for key in ("tokens", "kl", "agreement")}
    assert compute_perplexity("one text " * 9, student, tokenizer, row_length=32)["tokens"] == 62


def test_models_are_named_as_on_the_command_line(tokenizer, tmp_path):
    named, model = compute_perplexity(TEXTS, "builtin", row_length=32), load_model("builtin")
    assert named == compute_perplexity(TEXTS, model, "builtin", row_length=32)
    assert compute_agreement(TEXTS, "builtin", model, row_length=32)["agreement"] == 1
    make_model(0, vocab_size=100).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="257 tokens but the model only 100"):
        compute_perplexity(TEXTS, tmp_path, row_length=32)


def test_texts_and_models_that_are_missing(student, tokenizer):
    with pytest.raises(ValueError, match="tokenizer is not known: give tokenizer"):
        compute_perplexity(TEXTS, student)
    with pytest.raises(ValueError, match="No model is given"):
        compute_perplexity(TEXTS, None, tokenizer)
    with pytest.raises(ValueError, match=r"No teacher is given.*teacher_id"):
        compute_agreement(TEXTS, student, None, tokenizer)
    with pytest.raises(ValueError, match="does not fill a row of 256 tokens"):
        compute_perplexity("short", student, tokenizer)
    with pytest.raises(ValueError, match="holds no text"):
        compute_perplexity([" "], student, tokenizer)


@pytest.fixture
def load_metric(tmp_path, monkeypatch):
    """`evaluate.load` of a metric of the package, without network and with caches of its own."""

    def refuse(*_, **__):
        raise OSError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = package_files()
    yield lambda name: evaluate.load(metric_path(name), cache_dir=str(tmp_path / "metrics"))
    assert package_files() == before, "nothing is written into the package"


def package_files() -> list[Path]:
    return sorted(path for path in Path(echoatt_hf.__file__).parent.rglob("*") if "__pycache__" not in path.parts)


@pytest.fixture(scope="module")
def saved_models(student, teacher, tokenizer, tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "student")
    return str(folder / "student"), str(folder / "teacher")


def test_perplexity_metric(load_metric, saved_models, student, tokenizer, rows):
    expected = evaluate_model(student, rows, tokenizer=tokenizer)
    metric = load_metric("echoatt_perplexity")
    options = {"predictions": TEXTS, "row_length": 32}
    assert metric.compute(model_id=saved_models[0], **options) == pytest.approx(expected, rel=TOLERANCE)
    assert metric.compute(model=student, tokenizer=tokenizer, batch_size=3, **options) == pytest.approx(
        expected, rel=TOLERANCE
    )
    assert metric.compute(model=student, model_id=saved_models[0], **options) == expected
    for text in TEXTS:
        metric.add(prediction=text)
    assert metric.compute(model=student, tokenizer=tokenizer, row_length=32) == expected


def test_agreement_metric(load_metric, saved_models, student, teacher, tokenizer, rows):
    expected = evaluate_model(student, rows, teacher=teacher)
    expected = {key: expected[key] for key in ("tokens", "kl", "agreement")}
    metric = load_metric("echoatt_agreement")
    options = {"predictions": TEXTS, "row_length": 32}
    student_id, teacher_id = saved_models
    assert metric.compute(model_id=student_id, teacher_id=teacher_id, **options) == pytest.approx(
        expected, rel=TOLERANCE
    )
    assert metric.compute(model=student, teacher=teacher, tokenizer=tokenizer, **options) == expected
    assert metric.compute(model_id=teacher_id, teacher=teacher, tokenizer=student_id, **options) == pytest.approx(
        {"tokens": expected["tokens"], "kl": 0, "agreement": 1}, abs=1e-6
    ), "loaded weights lie elsewhere in memory, so sums of them may round otherwise"
    with pytest.raises(ValueError, match=r"No teacher is given.*teacher_id"):
        metric.compute(model_id=student_id, **options)


@pytest.mark.parametrize("name", ["echoatt_perplexity", "echoatt_agreement"])
def test_metrics_describe_themselves(name, load_metric):
    metric = load_metric(name)
    assert metric.name == name
    assert list(metric.features) == ["predictions"]
    assert "row_length" in metric.inputs_description
    assert "2409.14595" in metric.citation
    assert metric.description.strip() in type(metric).__doc__


def test_an_unknown_metric():
    with pytest.raises(ValueError, match=r"no metric 'perplexity'; known are echoatt_agreement, echoatt_perplexity\."):
        metric_path("perplexity")


@pytest.mark.real_weights
def test_the_real_teacher_on_stories():
    folder, stories = SHARED_DATA / "stories260k/hf", SHARED_DATA / "tinystories/stories.txt"
    if not folder.exists() or not stories.exists():
        pytest.skip("shared/data/stories260k or shared/data/tinystories is not here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stories = load_documents(stories).select(range(400))["text"]
    rows = [tokenizer(story, truncation=True, max_length=256) for story in stories]
    rows = [{"input_ids": row["input_ids"]} for row in rows if len(row["input_ids"]) == 256][:200]
    assert len(rows) == 200
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    result = evaluate_model(teacher, rows, teacher=teacher, tokenizer=tokenizer)
    assert 3.5 < result["perplexity"] < 5.5
    assert 0.5 < result["bits_per_byte"] < 1.5
    assert (result["kl"], result["agreement"]) == (0, 1)
