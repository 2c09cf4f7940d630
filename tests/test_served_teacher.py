"""Stored teachers that are made from a server: the same store as from the model, and what servers do wrong."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import train_byte_level_bpe, write_workplace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from echoatt_hf import EchoAttForCausalLM, ServedTeacher, StoredTeacher, write_stored_teacher
from echoatt_hf.cli.app import app
from echoatt_hf.distillation import served_teacher
from echoatt_hf.distillation.served_teacher import API_KEY


pytestmark = pytest.mark.once

TEXT = [f"Story {n}. Once upon a time {n} small bears ate {n * 3} pots of honey.\n" * 20 for n in range(24)]
TOP_K, CONTEXT, MOST_LOGPROBS = 5, 64, 20
KEY = "sk-a-key-that-nobody-may-see"


class FakeServer:
    """
    As much of vLLM's server as a store asks for, in its form, with a model on the loopback.

    `failures` are answers in place of the next ones: a status with a body and headers, or `None`, which hangs up. `spoil`
    changes a choice before it is sent, and `delay(prompt)` is how long an answer takes.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.lock = model, tokenizer, threading.Lock()
        self.reset()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.answer(self)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def reset(self):
        self.names, self.key, self.failures, self.version = ["tiny"], None, [], "0.32.0"
        self.spoil, self.delay, self.context = lambda choice: choice, lambda prompt: 0, CONTEXT
        self.prompts, self.running, self.most_running, self.keys = [], 0, 0, set()

    def answer(self, request):
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.lock:
            self.keys.add(key)
            failure = self.failures.pop(0) if self.failures and request.command == "POST" else ()
        if failure is None:
            request.close_connection = True
            return
        status, answer, *headers = failure or self.find(request.path, json.loads(body or "null"), key)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers[0] if headers else {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)

    def find(self, path, body, key):
        if self.key and key != self.key:
            return 401, {"error": f"Incorrect API key: {key}"}
        if path == "/version" and self.version:
            return 200, {"version": self.version}
        if path == "/v1/models":
            facts = {
                "object": "model",
                "owned_by": "vllm",
                "root": "/home/somebody/tiny",
                "max_model_len": self.context,
            }
            return 200, {"data": [{"id": name, **facts} for name in self.names]}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if body["prompt_logprobs"] > MOST_LOGPROBS:
            message = f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed: 20"
            return 400, {"error": {"message": message}}
        with self.lock:
            self.prompts.append(body["prompt"])
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(self.delay(body["prompt"]))
        with self.lock:
            self.running -= 1
            choice = self.complete(**body)
        return 200, {"choices": [self.spoil(choice)]}

    def complete(self, model, prompt, max_tokens, prompt_logprobs, logprobs, return_tokens_as_token_ids, temperature):
        assert (model, max_tokens, return_tokens_as_token_ids) == (self.names[0], 1, True)
        with torch.no_grad():
            found = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)

        def entries(position, token, count):
            ids = dict.fromkeys([token, *found[position].topk(count).indices.tolist()])  # the token itself comes first
            return {index: found[position, index].item() for index in ids}

        positions = [
            {
                str(index): {"logprob": value, "rank": 1, "decoded_token": self.tokenizer.decode([index])}
                for index, value in entries(position, token, prompt_logprobs).items()
            }
            for position, token in enumerate(prompt[1:])
        ]
        sampled = int(found[-1].argmax())
        last = {f"token_id:{index}": value for index, value in entries(-1, sampled, logprobs).items()}
        return {"prompt_logprobs": [None, *positions], "logprobs": {"top_logprobs": [last]}}


def make_teacher(vocab_size):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=vocab_size, max_position_embeddings=CONTEXT, initializer_range=0.3,
        eos_token_id=0, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with text, a student, and the teacher: its configuration and tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = write_workplace(folder, TEXT)
    teacher = make_teacher(len(tokenizer))
    EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 3]).save_pretrained(folder / "student")
    teacher.config.save_pretrained(folder / "teacher")
    teacher.save_pretrained(folder / "whole")
    for name in ("student", "teacher", "whole"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def teacher(workplace):
    return LlamaForCausalLM.from_pretrained(workplace / "whole")


@pytest.fixture(scope="module")
def tokenizer(workplace):
    return PreTrainedTokenizerFast.from_pretrained(workplace / "whole")


@pytest.fixture(scope="module")
def running(teacher, tokenizer):
    server = FakeServer(teacher, tokenizer)
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def server(running, monkeypatch):
    running.reset()
    monkeypatch.delenv(API_KEY, raising=False)
    monkeypatch.setattr(served_teacher, "FIRST_DELAY_S", 0.001)
    return running


@pytest.fixture(scope="module")
def rows(tokenizer):
    ids = iter(tokenizer("".join(TEXT))["input_ids"])
    return [{"input_ids": [next(ids) for _ in range(24)]} for _ in range(14)]


def write(folder, teacher, tokenizer, rows, **changes):
    values = {"top_k": TOP_K, "shard_rows": 4, "batch_size": 3}
    return write_stored_teacher(folder, teacher, tokenizer, rows[:-2], rows[-2:], **{**values, **changes})


def write_served(folder, server, workplace, tokenizer, rows, **changes):
    return write(folder, ServedTeacher(server.url, workplace / "teacher"), tokenizer, rows, **changes)


def assert_same_store(one, other):
    one, other = StoredTeacher(one), StoredTeacher(other)
    assert len(one) == len(other) and one.held_out_rows == other.held_out_rows
    for index in range(len(one)):
        first, second = one[index], other[index]
        assert first.keys() == second.keys()
        for name in first.keys() - {"teacher_logprobs"}:
            assert first[name].dtype == second[name].dtype and np.array_equal(first[name], second[name]), name
        assert first["teacher_logprobs"].dtype == second["teacher_logprobs"].dtype == np.float16
        probs = (np.exp(row["teacher_logprobs"].astype(float)) for row in (first, second))
        np.testing.assert_allclose(*probs, rtol=4e-3, atol=1e-6)  # float16 of up to 8 nats
        np.testing.assert_allclose(first["teacher_logprobs"], second["teacher_logprobs"], atol=0.05)


# The same store.


def test_store_is_that_of_the_model(tmp_path, server, workplace, teacher, tokenizer, rows):
    server.delay = lambda prompt: 0.002 * (prompt[5] % 4)  # so that answers come in another order
    write_served(tmp_path / "served", server, workplace, tokenizer, rows)
    write(tmp_path / "local", teacher, tokenizer, rows)
    assert_same_store(tmp_path / "served", tmp_path / "local")
    # One at first, to look at; then all, some at once.
    assert sorted(server.prompts) == sorted([rows[0]["input_ids"], *(row["input_ids"] for row in rows[:-2])])
    assert 1 < server.most_running <= 3


def test_almost_all_of_the_vocabulary(tmp_path, server, workplace, teacher, tokenizer, rows, monkeypatch):
    monkeypatch.setattr(f"{__name__}.MOST_LOGPROBS", 10**6)
    top_k = len(tokenizer) - 1  # the rest is one token, which float32 may lose beside the others
    write_served(tmp_path / "served", server, workplace, tokenizer, rows[:4], top_k=top_k)
    write(tmp_path / "local", teacher, tokenizer, rows[:4], top_k=top_k)
    served, local = (StoredTeacher(tmp_path / name) for name in ("served", "local"))
    for index in range(2):
        one, other = (np.exp(store[index]["teacher_logprobs"].astype(float)) for store in (served, local))
        np.testing.assert_allclose(one, other, rtol=8e-3, atol=1e-6)
        assert (served[index]["teacher_logprobs"] > -100).all()  # which a reverse divergence could not take


def test_documents_are_asked_for_one_by_one(tmp_path, server, workplace, teacher, tokenizer, rows):
    masked = [row | {"position_ids": [*range(1), *range(9), *range(14)]} for row in rows]
    write_served(tmp_path / "served", server, workplace, tokenizer, masked)
    write(tmp_path / "local", teacher, tokenizer, masked)
    assert_same_store(tmp_path / "served", tmp_path / "local")
    assert {len(prompt) for prompt in server.prompts} == {1, 9, 14}


def test_manifest_says_what_the_server_said(tmp_path, server, workplace, tokenizer, rows):
    manifest = write_served(tmp_path / "store", server, workplace, tokenizer, rows)
    said = {"id": "tiny", "root": "tiny", "owned_by": "vllm", "max_model_len": CONTEXT, "version": "0.32.0"}
    assert manifest["server"] == said  # of a path the last part
    assert not {"teacher_sha256", "teacher_dtype"} & set(manifest)
    assert "127.0.0.1" not in (tmp_path / "store" / "manifest.json").read_text()
    server.version = None
    assert "version" not in ServedTeacher(server.url, workplace / "teacher").about


def test_stopped_store_becomes_the_same(tmp_path, server, workplace, tokenizer, rows):
    write_served(tmp_path / "whole", server, workplace, tokenizer, rows)
    asked = len(server.prompts)
    server.spoil = lambda choice: choice if len(server.prompts) < asked + 8 else {}
    with pytest.raises(ValueError, match="gives no prompt_logprobs"):
        write_served(tmp_path / "store", server, workplace, tokenizer, rows, batch_size=1)
    assert len(list((tmp_path / "store").glob("shard-*"))) == 1
    server.reset()
    write_served(tmp_path / "store", server, workplace, tokenizer, rows)
    assert len(server.prompts) == 1 + 8
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "store")]
    assert files[0] == files[1]
    server.version = "0.33.0"
    (tmp_path / "store" / "shard-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="server changed"):
        write_served(tmp_path / "store", server, workplace, tokenizer, rows)


def test_what_passes_is_waited_for(tmp_path, server, workplace, teacher, tokenizer, rows, monkeypatch):
    served = ServedTeacher(server.url, workplace / "teacher")
    server.failures = [(429, {}, {"Retry-After": "0"}), (503, b"busy"), None, (500, {"error": {"message": "sad"}})]
    write(tmp_path / "served", served, tokenizer, rows)
    write(tmp_path / "local", teacher, tokenizer, rows)
    assert_same_store(tmp_path / "served", tmp_path / "local")
    pauses = []
    monkeypatch.setattr(served_teacher, "FIRST_DELAY_S", 1.0)
    monkeypatch.setattr(served._stopped, "wait", pauses.append)
    server.failures = [(429, {}, {"Retry-After": "7"}), (429, {}, {"Retry-After": "9999"}), *[(502, b"<html>")] * 9]
    with pytest.raises(ConnectionError, match=r"answers 502: .*, 6 times: check that it runs"):
        write(tmp_path / "other", served, tokenizer, rows)
    assert pauses == [7, 30, 4, 8, 16]  # the pause before giving up is none
    assert not (tmp_path / "other").exists()


def test_an_error_ends_the_waiting_of_later_rows(tmp_path, server, workplace, tokenizer, rows, monkeypatch):
    served = ServedTeacher(server.url, workplace / "teacher")
    monkeypatch.setattr(served, "check_answers", lambda *_: None)
    monkeypatch.setattr(served_teacher, "FIRST_DELAY_S", 30.0)
    refuse, busy = (400, {"error": {"message": "no"}}), (503, b"")
    monkeypatch.setattr(
        server, "find", lambda _, body, *__: refuse if body["prompt"] == rows[0]["input_ids"] else busy
    )
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"refuses a row \(400: no\)"):
        write(tmp_path / "store", served, tokenizer, rows)
    assert time.monotonic() - start < 20


# The key.


def test_key_is_sent_and_not_shown(tmp_path, server, workplace, tokenizer, rows, monkeypatch, caplog):
    server.key = KEY
    with pytest.raises(ValueError, match=rf"wants another key \(401: .*\): set {API_KEY}\."):
        ServedTeacher(server.url, workplace / "teacher")
    monkeypatch.setenv(API_KEY, f"{KEY}\n")
    with caplog.at_level(logging.DEBUG):
        write_served(tmp_path / "store", server, workplace, tokenizer, rows)
    assert server.keys == {"", KEY}
    assert KEY not in caplog.text
    assert all(KEY.encode() not in path.read_bytes() for path in (tmp_path / "store").iterdir())
    monkeypatch.setenv(API_KEY, KEY[:-1])
    with pytest.raises(ValueError, match=r"Incorrect API key: \*\*\*"):
        ServedTeacher(server.url, workplace / "teacher")
    monkeypatch.setenv(API_KEY, "two\nlines")
    with pytest.raises(ValueError, match="has characters that no key has") as caught:
        ServedTeacher(server.url, workplace / "teacher")
    assert "lines" not in str(caught.value)


def test_key_does_not_leave_the_machine_over_http_nor_follow_elsewhere(server, workplace, monkeypatch, caplog):
    monkeypatch.setenv(API_KEY, KEY)
    with pytest.raises(ValueError, match="is asked over http, where others can read it") as caught:
        ServedTeacher("http://gpu.example:8000/v1", workplace / "teacher")
    assert KEY not in str(caught.value)
    other = []
    monkeypatch.setattr(server, "find", lambda path, *_: other.append(path) or (302, b"", {"Location": "/elsewhere"}))
    with pytest.raises(ValueError, match="elsewhere .302"):
        ServedTeacher(server.url, workplace / "teacher")
    assert other == ["/v1/models"]


def test_http_to_another_machine_is_warned_of(workplace, monkeypatch, caplog):
    monkeypatch.delenv(API_KEY, raising=False)

    def open_nothing(*_):
        raise OSError("nowhere")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *_, **__: open_nothing())
    for url, is_said in (("http://gpu.example:8000/v1", True), ("https://gpu.example/v1", False)):
        caplog.clear()
        with pytest.raises(ConnectionError, match=r"gpu\.example.*does not answer \(nowhere\)"):
            ServedTeacher(url, workplace / "teacher")
        assert ("asked over http: who is on the way can read the text" in caplog.text) == is_said


# What servers do wrong.


def drop(name):
    return lambda choice: choice | {name: None}


def first_entries(change):
    """A choice with its second position changed."""

    def spoil(choice):
        before, changed, *after = choice["prompt_logprobs"]
        return choice | {"prompt_logprobs": [before, change(changed), *after]}

    return spoil


def logprobs(value):
    return first_entries(lambda found: {index: entry | {"logprob": value} for index, entry in found.items()})


SPOILS = {
    "no prompt_logprobs": (drop("prompt_logprobs"), "gives no prompt_logprobs for 'tiny'"),
    "no logprobs": (drop("logprobs"), "is not as vLLM's"),
    "too few": (
        first_entries(lambda found: dict(list(found.items())[: TOP_K - 1])),
        f"gives 4 log-probabilities where {TOP_K} were asked for",
    ),
    "more tokens": (
        lambda choice: choice | {"prompt_logprobs": [None, *choice["prompt_logprobs"]]},
        "asked of 24 tokens and answers of 25",
    ),
    "other prompt": (
        first_entries(lambda found: dict(list(found.items())[1:]) | {"7": {"logprob": -9.0}}),
        "lacks the token",
    ),
    "beyond the vocabulary": (
        first_entries(lambda found: found | {"300": {"logprob": -9.0}}),
        "answers with the token 300, but the teacher has 300",
    ),
    "nan": (logprobs(float("nan")), "gives the log-probability nan"),
    "infinite": (logprobs(float("inf")), "gives the log-probability inf"),
    "none": (logprobs(None), "is not as vLLM's"),
    "logits": (logprobs(3.5), "so they are none: .*--logprobs-mode raw_logprobs"),
    "other tokenizer": (
        lambda choice: (
            choice
            | {
                "prompt_logprobs": [
                    found and {index: entry | {"decoded_token": "other"} for index, entry in found.items()}
                    for found in choice["prompt_logprobs"]
                ]
            }
        ),
        r"'tiny' has another tokenizer than the teacher: \d+ of \d+ tokens",
    ),
}


@pytest.mark.parametrize("case", SPOILS)
def test_wrong_answers_are_refused_at_the_first_row(tmp_path, server, workplace, tokenizer, rows, case):
    server.spoil, message = SPOILS[case]
    with pytest.raises(ValueError, match=message):
        write_served(tmp_path / "store", server, workplace, tokenizer, rows)
    assert len(server.prompts) == 1 and not (tmp_path / "store").exists()


@pytest.mark.parametrize("case", ["nan", "too few", "no prompt_logprobs"])
def test_wrong_answers_are_refused_later_too(tmp_path, server, workplace, tokenizer, rows, case):
    spoil, message = SPOILS[case]
    server.spoil = lambda choice: spoil(choice) if len(server.prompts) > 6 else choice
    with pytest.raises(ValueError, match=message):
        write_served(tmp_path / "store", server, workplace, tokenizer, rows, batch_size=1)
    assert len(list((tmp_path / "store").glob("shard-*"))) == 1


def values(*logprobs):
    return first_entries(
        lambda found: {
            index: entry | {"logprob": value}
            for (index, entry), value in zip(found.items(), [*logprobs, -40.0], strict=False)
        }
    )


SHARP = {
    "certain": (values(0.0, *[-9999.0] * TOP_K), [0, -10000, -10000, -10000, -10000, -65504]),
    "rounded above 1": (values(*[np.log(0.2) + 1e-7] * TOP_K), [*[-1.609] * TOP_K, np.log(2.0**-24)]),
}
"""vLLM sends -9999 for minus infinity; the rest is never less than rounding can tell, unless the top k say so."""


@pytest.mark.parametrize("case", SHARP)
def test_no_probability_at_all_is_a_number(tmp_path, server, workplace, tokenizer, rows, case):
    server.spoil, expected = SHARP[case]
    write_served(tmp_path / "store", server, workplace, tokenizer, rows)
    assert StoredTeacher(tmp_path / "store")[0]["teacher_logprobs"][0] == pytest.approx(expected, rel=1e-3)


def test_another_tokenizer_of_the_same_size_is_found_by_what_its_tokens_say(
    tmp_path, server, workplace, tokenizer, rows, monkeypatch
):
    other = train_byte_level_bpe(["entirely other words of another language"] * 9, 300, ["<|endoftext|>"])
    monkeypatch.setattr(server, "tokenizer", PreTrainedTokenizerFast(tokenizer_object=other))
    with pytest.raises(ValueError, match="has another tokenizer than the teacher"):
        write_served(tmp_path / "store", server, workplace, tokenizer, rows)


def test_a_compared_teacher_must_say_the_like(tmp_path, server, workplace, teacher, tokenizer, rows):
    write_served(tmp_path / "store", server, workplace, tokenizer, rows)
    store = StoredTeacher(tmp_path / "store")
    store.check_teacher(teacher)
    other = make_teacher(len(tokenizer))
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    with pytest.raises(ValueError, match="made from another teacher, in a server"):
        store.check_teacher(other)


# The command line.


@pytest.fixture
def run(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


DATA = ["--data", "text", "--row-length", 32, "--evaluation-rows", 4, "--top-k", 8, "--rows", 24]


def test_command_stores_and_a_student_learns(tmp_path, server, run):
    result = run("store-teacher", "--server", server.url, "teacher", *DATA, "--output", tmp_path / "served")
    assert result.exit_code == 0, result.stderr
    assert "of the probability is that of the top 8" in result.stdout
    assert run("store-teacher", "whole", *DATA, "--output", tmp_path / "local").exit_code == 0
    assert_same_store(tmp_path / "served", tmp_path / "local")
    reports = []
    for name in ("served", "local"):
        learn = ["--steps", 6, "--stage2-steps", 2, "--teacher", "whole", "--output", tmp_path / f"from {name}"]
        result = run("distill", "student", "--stored-teacher", tmp_path / name, *learn)
        assert result.exit_code == 0, result.stderr
        reports.append(json.loads((tmp_path / f"from {name}" / "report.json").read_text()))
    served, local = ([entry["kl"] for entry in report["results"][1:]] for report in reports)
    assert served == pytest.approx(local, rel=1e-3) and len(set(served)) == 3
    assert reports[0]["settings"]["stored_teacher"]["server"]["id"] == "tiny"
    assert "None" not in (tmp_path / "from served" / "README.md").read_text()
    hidden = ["--hidden-weight", 1, "--output", tmp_path / "hidden"]
    result = run("distill", "student", "--stored-teacher", tmp_path / "served", *hidden)
    assert (
        result.exit_code == 2 and "hidden_weight is 1.0, but a stored teacher has log-probabilities" in result.stderr
    )


def test_command_goes_on_with_the_server_at_another_address(tmp_path, server, run):
    arguments = ["store-teacher", "teacher", *DATA, "--shard-rows", 8, "--output", tmp_path / "store", "--server"]
    server.spoil = lambda choice: choice if len(server.prompts) < 20 else {}
    assert run(*arguments, server.url).exit_code == 2
    server.reset()
    result = run(*arguments, server.url.replace("127.0.0.1", "localhost"), "--resume")
    assert result.exit_code == 0, result.stderr
    assert len(server.prompts) < 24


BAD = {
    "no server": (["--server", "http://127.0.0.1:9/v1"], "does not answer (Connection refused): check that it runs"),
    "other path": (["--server", "{root}"], "give an address such as"),
    "unknown model": (["--server-model", "huge"], "The server has no model 'huge': give one of 'tiny'"),
    "too many": (["--top-k", 21], "max allowed: 20): choose a smaller --top-k, or start it with more"),
    "too long": (
        ["--row-length", CONTEXT, "--data", "nowhere"],
        "takes 63 and one more (max_model_len 64): choose --row-length 63",
    ),
    "dtype": (["--dtype", "float16"], "it is the server that loads the weights"),
    "password": (["--server", "http://me:secret@127.0.0.1/v1"], "server is an address with more than that"),
    "query": (["--server", "http://127.0.0.1/v1?api_key=secret"], "server is an address with more than that"),
    "scheme": (["--server", "file:///etc"], "server is 'file:///etc'; it must be http:// or https://"),
    "port": (["--server", "http://127.0.0.1:port/v1"], "it must be http:// or https://"),
    "no family": (["--server", "{url}", "nowhere"], "'nowhere' cannot be loaded"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, server, run, case):
    changes, message = BAD[case]
    values = {"--server": server.url, **dict(zip(map(str, DATA[::2]), DATA[1::2], strict=True))}
    values |= {name: value for name, value in pairwise([*changes, ""]) if str(name).startswith("--")}
    name = changes[2] if len(changes) == 3 else "teacher"
    options = [str(each).format(url=server.url, root=server.url[:-3]) for pair in values.items() for each in pair]
    result = run("store-teacher", name, *options, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("echoatt: error: ")]
    assert (
        len(lines) == 1 and message in lines[0] and "secret" not in result.output and "Traceback" not in result.stderr
    )
    assert not list(tmp_path.iterdir())


def test_one_of_several_models_must_be_named(server, run, tmp_path, workplace):
    server.names = ["tiny", "other"]
    with pytest.raises(ValueError, match="has several models: give one of 'tiny', 'other'"):
        ServedTeacher(server.url, workplace / "teacher")
    assert ServedTeacher(server.url, workplace / "teacher", "tiny").model == "tiny"
    result = run("store-teacher", "teacher", *DATA, "--server-model", "tiny", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "there is no server: give --server too" in result.stderr
