"""`echoatt serve`: a student behind the interface of OpenAI, in a process of its own."""

import contextlib
import inspect
import json
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from conftest import make_teacher
from families import VOCAB_SIZE
from processes import ForkedPython, run_python
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from echoatt_hf import EchoAttForCausalLM
from echoatt_hf.serving import server
from echoatt_hf.settings import ServingSettings


needs_server = pytest.mark.skipif(
    any(find_spec(name) is None for name in server.NEEDED), reason='needs `pip install "echoatt-hf[serve]"`'
)
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
PROMPTS = [f"w{3 * n + 7} w{5 * n + 11} w{n + 20}" for n in range(8)]
LIMIT_S = 120


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """A folder with a student that has a chat template, and one that has none."""
    folder = tmp_path_factory.mktemp("students")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB_SIZE)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    student = EchoAttForCausalLM.from_teacher(make_teacher("llama"), [0, 1, 1, 1, 4, 4])
    student.generation_config.eos_token_id = None
    for name, template in (("chatty", TEMPLATE), ("plain", None)):
        tokenizer.chat_template = template
        student.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Server:
    """A server that runs until the context ends."""

    def __init__(self, folder, name, *options):
        self.url = f"http://localhost:{(port := free_port())}"
        self._process = ForkedPython("-m", "echoatt_hf.cli", "serve", name, "--port", port, *options, cwd=folder)

    def __enter__(self):
        end = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(urllib.error.URLError):
                assert self.get("/health") == (200, {"status": "ok"})
                return self
            if not self._process.is_running() or time.monotonic() > end:
                self._process.send_signal(signal.SIGKILL)
                pytest.fail(f"it does not start: {self._process.wait().stderr}")
            time.sleep(0.2)

    def __exit__(self, *_):
        self._process.send_signal(signal.SIGINT)
        self.result = self._process.wait(LIMIT_S)

    def _ask(self, request):
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path):
        status, text = self._ask(self.url + path)
        return status, json.loads(text)

    def post(self, path, **body):
        headers = {"Content-Type": "application/json"}
        status, text = self._ask(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers))
        return status, text if body.get("stream") else json.loads(text)


@pytest.fixture(scope="module")
def greedy(students):
    """What `generate` says after a text, in eight tokens."""
    model = AutoModelForCausalLM.from_pretrained(students / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(students / "chatty")

    def generate(text):
        prompt = tokenizer(text, return_tensors="pt")["input_ids"]
        row = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        return tokenizer.decode(row[0, prompt.shape[1] :])

    return generate


def pieces(stream, read):
    """The text of a stream of events."""
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    return [text for event in events if (text := read(event["choices"][0]))]


@needs_server
def test_completions_and_chat_are_those_of_generate(students, greedy):
    with Server(students, "chatty") as served:
        status, listed = served.get("/v1/models")
        assert status == 200 and [model["id"] for model in listed["data"]] == ["chatty"]
        how = {"model": "chatty", "max_tokens": 8, "temperature": 0}
        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            answers = list(threads.map(lambda prompt: served.post("/v1/completions", prompt=prompt, **how), PROMPTS))
        expected = [(200, greedy(prompt)) for prompt in PROMPTS]
        assert [(status, answer["choices"][0]["text"]) for status, answer in answers] == expected

        messages = [{"role": "user", "content": PROMPTS[0]}]
        expected = greedy(f"user: {PROMPTS[0]}\nassistant:")
        status, answer = served.post("/v1/chat/completions", messages=messages, **how)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, expected)
        status, stream = served.post("/v1/chat/completions", messages=messages, stream=True, **how)
        texts = pieces(stream, lambda choice: choice["delta"].get("content"))
        assert status == 200 and "".join(texts) == expected and len(texts) > 1
        status, stream = served.post("/v1/completions", prompt=PROMPTS[1], stream=True, **how)
        texts = pieces(stream, lambda choice: choice["text"])
        assert status == 200 and "".join(texts) == answers[1][1]["choices"][0]["text"] and len(texts) > 1
    assert served.result.stdout.startswith(f"chatty at {served.url}/v1, as the model 'chatty'\n")


@needs_server
def test_bad_requests_are_told_so_and_the_server_goes_on(students):
    with Server(students, "plain") as served:
        status, answer = served.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], max_tokens=2
        )
        assert status == 400 and "chat template" in answer["error"] and "\n" not in answer["error"]
        assert served.post("/v1/completions", prompt=3)[0] == 400
        assert served.post("/v1/completions", model="other", prompt="Once")[0] == 400
        assert served.post("/v1/completions", prompt="Once", colour="red")[0] == 422
        assert served.post("/v1/completions", prompt="Once", max_tokens=2)[0] == 200


@needs_server
def test_continuous_batching_gives_the_same(students, greedy):
    with Server(students, "chatty", "--continuous-batching") as served, ThreadPoolExecutor(len(PROMPTS)) as threads:
        how = {"max_tokens": 8, "temperature": 0}
        answers = list(threads.map(lambda prompt: served.post("/v1/completions", prompt=prompt, **how), PROMPTS))
    expected = [(200, greedy(prompt)) for prompt in PROMPTS]
    assert [(status, answer["choices"][0]["text"]) for status, answer in answers] == expected


def run_serve(folder, *arguments):
    result = run_python("-m", "echoatt_hf.cli", "serve", *arguments, cwd=folder)
    errors = [line for line in result.stderr.splitlines() if line.startswith("echoatt: error: ")]
    assert result.returncode == 2 and len(errors) == 1, result.stderr
    return errors[0]


@needs_server
def test_what_cannot_be_served_is_said_in_one_line(students):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Nothing can listen at localhost:{port}" in run_serve(students, "chatty", "--port", port)
    assert "There is no model folder './nothing'" in run_serve(students, "./nothing", "--port", free_port())
    (students / "a@b").symlink_to(students / "chatty")
    assert "has an @ in its name" in run_serve(students, "a@b", "--port", free_port())


@pytest.mark.parametrize(
    "setting, said",
    [
        ({"port": 0}, "port is 0; it must be 1 to 65535"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of"),
        ({"cache_blocks": 0, "continuous_batching": True}, "cache_blocks is 0; it must be at least 1"),
        ({"cache_blocks": 4}, "cache_blocks is 4, but only continuous_batching"),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else "",
)
def test_bad_settings(setting, said):
    with pytest.raises(ValueError, match=said):
        ServingSettings(**setting)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None if name == "fastapi" else name)
    with pytest.raises(ValueError, match=r'needs fastapi, not installed: `pip install "echoatt-hf\[serve\]"`'):
        server.check_server("builtin", ServingSettings())


def test_what_is_taken_from_inside_of_transformers():
    """If this fails, transformers has moved its server: see `echoatt_hf/serving/server.py`."""
    serve = pytest.importorskip("transformers.cli.serve")
    from transformers.cli.serving import model_manager
    from transformers.cli.serving import server as built

    arguments = {"force_model", "host", "port", "device", "dtype", "attn_implementation", "continuous_batching"}
    missing = {*arguments, "cb_num_blocks", "cb_max_batch_tokens"} - {*inspect.signature(serve.Serve).parameters}
    assert not missing, f"the command's class Serve has no arguments {missing}"
    loading = inspect.getsource(model_manager.ModelManager._load_model)
    assert "getattr(transformers, config.architectures[0])" in loading, "models are found otherwise"
    assert "model_manager.get_gen_models()" in inspect.getsource(built.build_server), "models are listed otherwise"
    assert "from .serving.server import build_server" in inspect.getsource(serve.Serve.__init__), (
        "it is built otherwise"
    )
