"""Publishing a student: what is checked, what is sent, and that it loads anywhere. The client is the real one."""

import importlib
import inspect
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import FP32_TOLERANCE, make_teacher, process_environment, train_byte_level_bpe
from hub_server import TOKEN, USER, HubError
from huggingface_hub import HfApi, ModelCard, RepoCard, constants
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

import echoatt_hf
from echoatt_hf import DataSettings, builtin_teacher_path, convert, load_model, load_tokenizer, push_student
from echoatt_hf.cli import app as cli
from echoatt_hf.models.checks import find_tokenizer
from echoatt_hf.models.loading import load_config
from echoatt_hf.outputs.provenance import describe_conversion, describe_data, describe_teacher
from echoatt_hf.publishing import push as publishing
from echoatt_hf.publishing.callbacks import CODE_FILES
from echoatt_hf.publishing.card import find_gaps, write_model_card


pytestmark = pytest.mark.hub

REPOSITORY = f"{USER}/student"
PLAN = [0, 1, 1, 1, 4]
INPUTS = {"input_ids": torch.arange(3, 19).reshape(2, 8)}
WHOLE = {
    *("README.md", "config.json", "configuration_echoatt.py", "conversion.json", "generation_config.json"),
    *("model.safetensors", "modeling_echoatt.py", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as `echoatt convert` writes it."""
    folder = tmp_path_factory.mktemp("saved") / "mine"
    student, report = convert(make_teacher(num_hidden_layers=5, vocab_size=300), PLAN)
    student.save_pretrained(folder)
    tokenizer = train_byte_level_bpe(["Once upon a time"] * 3, 290, ["<|endoftext|>"])
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    (folder / "conversion.json").write_text(json.dumps(report.to_dict()))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "mine"))


@pytest.fixture
def logits(saved):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(saved)(**INPUTS).logits


@pytest.fixture
def quick(monkeypatch):
    """Without the load in a clean process, for tests of other things."""
    monkeypatch.setattr(publishing, "_check_remote_load", lambda staged: None)


@pytest.fixture
def run():
    """The command `echoatt push`, in this process."""
    from typer.testing import CliRunner

    return lambda *arguments: CliRunner().invoke(cli.app, ["push", *map(str, arguments)])


def files_of(hub, revision="main", repository=REPOSITORY):
    return hub.repositories[repository].find(revision).files


def in_process(script, hub, home, *arguments, plugin=True, token=TOKEN):
    """Run a script in a process that takes the server for the Hub, with or without `echoatt_hf`."""
    environment = hub.environment(home, token)
    prelude = ""
    if plugin:
        environment["PYTHONPATH"] = process_environment()["PYTHONPATH"]
    else:
        environment.pop("PYTHONPATH", None)
        prelude = 'import sys\nsys.modules["echoatt_hf"] = None\n'
    return subprocess.run(
        [sys.executable, *([] if plugin else ["-I"]), "-c", prelude + textwrap.dedent(script), *map(str, arguments)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )


# From the command to the model in a process that has no plugin


CLEAN = """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    name, inputs, outputs, revision = sys.argv[1:]
    inputs, found = load_file(inputs), {}
    try:
        AutoConfig.from_pretrained(name)
    except ValueError as error:
        print(" ".join(str(error).split()))
    else:
        raise SystemExit("loaded without being told that the code is trusted")
    options = {"trust_remote_code": True, "revision": revision}
    assert type(AutoConfig.from_pretrained(name, **options)).__name__ == "EchoAttConfig"
    for auto_class in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        model = auto_class.from_pretrained(name, **options).eval()
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        with torch.no_grad():
            found[auto_class.__name__] = model(**inputs)[0].contiguous()
    assert AutoTokenizer.from_pretrained(name, revision=revision)("Once")["input_ids"]
    save_file(found, outputs)
"""


def load_in_clean_process(hub, home, revision="main", token=TOKEN, repository=REPOSITORY):
    save_file(INPUTS, home / "inputs.safetensors")
    arguments = [repository, home / "inputs.safetensors", home / "outputs.safetensors", revision]
    return in_process(CLEAN, hub, home, *arguments, plugin=False, token=token)


def test_pushed_student_loads_where_the_plugin_is_not(online, folder, run, logits, tmp_path):
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"weights")
    pushed = run(folder, REPOSITORY, "--private", "--license", "mit", "--commit-message", "My student")
    assert pushed.exit_code == 0, pushed.stderr
    assert "left out: checkpoint-5/, training_args.bin" in pushed.stdout
    assert online.repositories[REPOSITORY].private
    assert online.repositories[REPOSITORY].history() == ["initial commit", "My student"]
    files = files_of(online)
    assert {*files} == WHOLE | {".gitattributes"}
    assert not (folder / "README.md").exists()  # the folder is left as it is
    for name in WHOLE - {"README.md"}:
        assert files[name].content == (folder / name).read_bytes()
    loaded = load_in_clean_process(online, tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert "trust_remote_code=True" in loaded.stdout  # the message of transformers itself
    found = load_file(tmp_path / "outputs.safetensors")
    torch.testing.assert_close(found["AutoModelForCausalLM"], logits, **FP32_TOLERANCE)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**INPUTS).last_hidden_state
    torch.testing.assert_close(found["AutoModel"], hidden, **FP32_TOLERANCE)
    assert found["AutoModelForSequenceClassification"].shape == (2, 2)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    refused = load_in_clean_process(online, stranger, token=None)
    assert refused.returncode != 0 and "401" in refused.stderr and REPOSITORY in refused.stderr


def test_card_on_the_hub_names_the_repository_and_the_licence(online, folder, quick):
    push_student(folder, REPOSITORY, license="mit")
    card = files_of(online)["README.md"].content.decode()
    assert f'name = "{REPOSITORY}"' in card and "revision=revision" in card
    assert HfApi(endpoint=online.url).model_info(REPOSITORY).card_data.license == "mit"


# About metadata older clients ask the Hub itself, whatever their endpoint is.
CLIENT_ASKS_ITS_ENDPOINT = "constants.ENDPOINT" in inspect.getsource(RepoCard.validate)


def test_dry_run_lists_what_would_be_sent_and_sends_nothing(online, folder, run, quick):
    listed = run(folder, REPOSITORY, "--license", "mit", "--dry-run")
    assert listed.exit_code == 0, listed.stderr
    assert online.repositories == {}
    asked = [line for line in online.requests if line.startswith(("PUT", "POST"))]
    assert asked == ["POST /api/validate-yaml"] * CLIENT_ASKS_ITS_ENDPOINT
    rows = [line.split() for line in listed.stdout.splitlines()[:-1]]
    published = push_student(folder, REPOSITORY, license="mit")
    sent = {name: file for name, file in files_of(online).items() if name != ".gitattributes"}
    assert [row[0] for row in rows] == sorted(sent) and len(rows) == len(WHOLE)
    for name, size, sha256 in rows:
        assert int(size.replace(",", "")) == len(sent[name].content) == published.files[name][0]
        assert sent[name].sha256.startswith(sha256) and len(sha256) == 12


SENT = [
    "LICENSE",
    "NOTICE",
    "USE_POLICY.md",
    "tekken.json",
    "additional_chat_templates/tool_use.jinja",
    "figures/a.txt",
]
LEFT_OUT = {
    **dict.fromkeys(("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")),
    **dict.fromkeys(
        ("run.log", "rows.jsonl", "rows.jsonl.gz", ".env", "id_rsa", "figures/.DS_Store", "figures/a.pkl")
    ),
    **{
        "checkpoint-5/model.safetensors": "checkpoint-5/",
        "runs/x/events.out.tfevents.1": "runs/",
        ".git/config": ".git/",
    },
}


def test_everything_is_sent_but_what_is_named(online, folder, quick):
    for name in [*SENT, *LEFT_OUT]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    for name in ("tokenizer.model", "spiece.model", "tokenizer.model.v3"):  # of sentencepiece, which are no texts
        (folder / name).write_bytes(b"\n\x0e\n\x05<unk>\x15\xff")
    published = push_student(folder, REPOSITORY, license="mit")
    sent = {*SENT, "tokenizer.model", "spiece.model", "tokenizer.model.v3"}
    assert {*files_of(online)} == {*published.files, ".gitattributes"} == WHOLE | sent | {".gitattributes"}
    assert sorted(published.left_out) == sorted(shown or name for name, shown in LEFT_OUT.items())


def test_weights_of_before_are_deleted_wherever_they_were(online, folder, quick):
    push_student(folder, REPOSITORY, license="mit")
    repository = online.repositories[REPOSITORY]
    files = dict(repository.find("main").files)
    kind = type(files["README.md"])
    old = ["pytorch_model.bin", "model.safetensors.index.json", "old/model.safetensors"]
    repository.commit("main", "older", files | {name: kind(b"old", True) for name in [*old, "notes.txt"]})
    before = len(repository.history())
    push_student(folder, REPOSITORY)
    assert {*files_of(online)} == WHOLE | {".gitattributes", "notes.txt"}
    assert len(repository.history()) == before + 1  # one commit


def test_branch_and_pull_request(online, folder, quick):
    push_student(folder, REPOSITORY, license="mit")
    before = online.repositories[REPOSITORY].find("main").oid
    (folder / "generation_config.json").write_text('{"max_length": 7}')
    push_student(folder, REPOSITORY, license="mit", revision="next")
    proposed = push_student(folder, REPOSITORY, license="mit", create_pr=True)
    assert "/discussions/1" in str(proposed) and online.repositories[REPOSITORY].find("main").oid == before
    for revision in ("next", "refs/pr/1"):
        assert b"7" in files_of(online, revision)["generation_config.json"].content
    with pytest.raises(ValueError, match="A pull request goes to main, not to 'next'"):
        push_student(folder, REPOSITORY, revision="next", create_pr=True)


def test_private_is_not_promised_of_a_public_repository(online, folder, quick, run):
    HfApi(endpoint=online.url, token=TOKEN).create_repo(REPOSITORY)
    refused = run(folder, REPOSITORY, "--license", "mit", "--private")
    assert refused.exit_code == 2 and "there already, and public" in refused.stderr
    assert online.repositories[REPOSITORY].history() == ["initial commit"] and not online.large_files


def test_update_keeps_what_was_written_on_the_hub_and_drops_old_weights(online, folder, quick):
    push_student(folder, REPOSITORY, license="mit")
    repository = online.repositories[REPOSITORY]
    files = dict(repository.find("main").files)
    card = files["README.md"].content.decode().replace("## Limits", "## Uses\n\nOn the Hub.\n\n## Limits")
    kind = type(files["README.md"])
    files |= {"README.md": kind(card.encode(), False), "model-1-of-2.safetensors": kind(b"old", True)}
    repository.commit("main", "edited by hand", files)
    push_student(folder, REPOSITORY)  # the licence is that of the card on the Hub
    assert repository.history() == ["initial commit", "Upload EchoAtt student", "edited by hand", "Upload EchoAtt student"]  # fmt: skip
    updated = files_of(online)
    assert "On the Hub." in updated["README.md"].content.decode() and "model-1-of-2.safetensors" not in updated
    (folder / "README.md").write_text(card.replace("On the Hub.", "In the folder."))
    push_student(folder, REPOSITORY)
    assert "In the folder." in files_of(online)["README.md"].content.decode()


def test_licence_and_language_of_the_teacher(online, folder, quick):
    api = HfApi(endpoint=online.url, token=TOKEN)
    api.create_repo(f"{USER}/teacher")
    card = "---\nlicense: apache-2.0\nlanguage: de\n---\n"
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=f"{USER}/teacher")
    report = {"teacher": {"name": f"{USER}/teacher", "repository": f"{USER}/teacher", "revision": "a" * 40}}
    (folder / "report.json").write_text(json.dumps(report))
    push_student(folder, REPOSITORY)
    data = ModelCard(files_of(online)["README.md"].content.decode()).data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", "de", f"{USER}/teacher")


@pytest.fixture
def teacher_on_hub(online, saved, tmp_path):
    """A repository with a teacher of two commits: the first one is the branch `old`."""
    api = HfApi(endpoint=online.url, token=TOKEN)
    api.create_repo(f"{USER}/teacher", private=True)
    for layers in (2, 5):
        local = tmp_path / f"teacher-{layers}"
        make_teacher(num_hidden_layers=layers, vocab_size=300).save_pretrained(local)
        for file in saved.glob("tokenizer*"):
            shutil.copy(file, local)
        api.upload_folder(repo_id=f"{USER}/teacher", folder_path=local)
        if layers == 2:
            api.create_branch(f"{USER}/teacher", branch="old")
    return f"{USER}/teacher"


def test_teacher_is_named_with_its_repository_and_commit(online, teacher_on_hub, tmp_path):
    repository = online.repositories[teacher_on_hub]
    for name, revision in ((teacher_on_hub, "main"), (f"{teacher_on_hub}@old", "old")):
        expected = {"name": teacher_on_hub, "repository": teacher_on_hub, "revision": repository.find(revision).oid}
        assert describe_teacher(load_model(name)) == expected
    teacher = make_teacher()
    assert describe_teacher(teacher) == {}
    for name, expected in {
        teacher_on_hub: {"name": teacher_on_hub, "repository": teacher_on_hub},
        f"{USER}/unknown": {"name": "unknown"},
        str(tmp_path / "teacher-2"): {"name": "teacher-2"},
        str(builtin_teacher_path()): {"name": "the built-in teacher of echoatt_hf", "license": "apache-2.0"},
    }.items():
        teacher.name_or_path = name
        assert describe_teacher(teacher) == expected


# Models of the Hub


def test_revision_of_a_model_is_part_of_its_name(online, teacher_on_hub, tmp_path, monkeypatch):
    oid = online.repositories[teacher_on_hub].find("old").oid
    for revision, layers in (("old", 2), (oid, 2), ("main", 5)):
        model = load_model(f"{teacher_on_hub}@{revision}")
        assert model.config.num_hidden_layers == layers
        assert load_config(f"{teacher_on_hub}@{revision}").num_hidden_layers == layers
        assert model.name_or_path == teacher_on_hub  # of which PEFT and others make a repository
        assert load_tokenizer(f"{teacher_on_hub}@{revision}", model)("Once")["input_ids"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher-2").rename(tmp_path / "mine@home")
    assert load_config("mine@home").num_hidden_layers == 2  # a folder that is there


def test_tokenizer_of_a_model_is_of_its_revision(online, teacher_on_hub, tmp_path):
    old = load_model(f"{teacher_on_hub}@old")
    other = train_byte_level_bpe(["other words"], 280, ["<|other|>"])
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<|other|>").save_pretrained(tmp_path / "other")
    HfApi(token=TOKEN).upload_folder(repo_id=teacher_on_hub, folder_path=tmp_path / "other")
    assert "<|other|>" not in find_tokenizer(old).get_vocab()
    assert "<|other|>" in find_tokenizer(load_model(teacher_on_hub)).get_vocab()


def gate(handler, name, to_write=False):
    raise HubError(403, "GatedRepo", f"Access to model {name} is restricted. Ask for it.")


def limit(handler, name, to_write=False):
    raise HubError(429, "", "Too many requests")


def fail(handler, name, to_write=False):
    raise HubError(500, "", "Internal error")


BAD_TOKEN = "hf_" + "x" * 34
REFUSED_MODELS = {
    "gated": ("{name}", gate, TOKEN, "gated. Accept its terms at {url}/{name} with the account of your token"),
    "gated, no token": ("{name}", gate, None, "with your account, and log in with `hf auth login`"),
    "private": ("{name}", None, None, "no public repository 'alice/teacher'. .* if it is private, log in"),
    "missing": (f"{USER}/nothing", None, TOKEN, "no repository 'alice/nothing' that your token may read"),
    "bad token": (
        "{name}",
        None,
        BAD_TOKEN,
        "the Hub does not know the token .401.. Make one at {url}/settings/tokens",
    ),
    "revision": ("{name}@nowhere", None, TOKEN, "no branch, tag or commit 'nowhere'. See {url}/{name}/tree/main"),
    "no revision": ("{name}@", None, TOKEN, "give owner/name@revision"),
    "limit": ("{name}", limit, TOKEN, "takes no more requests for now .429: Too many requests"),
    "trouble": ("{name}", fail, TOKEN, "the Hub is in trouble .500: Internal error"),
    "address": ("https://huggingface.co/{name}", None, TOKEN, "is an address: give the repository as owner/name"),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_model_of_the_hub_that_is_refused(case, online, teacher_on_hub, monkeypatch):
    name, handle, token, message = REFUSED_MODELS[case]
    if handle is not None:
        monkeypatch.setattr("hub_server._Handler._repository", handle)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    places = {"name": teacher_on_hub, "url": online.url}
    with pytest.raises(FileNotFoundError, match=message.format(**places)) as error:
        load_model(name.format(**places))
    assert "\n" not in str(error.value) and BAD_TOKEN not in str(error.value)


def test_hub_that_is_not_there_and_hub_that_is_not_asked(online, teacher_on_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE keeps the Hub from being asked"):
        load_model(teacher_on_hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{nobody}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    with pytest.raises(FileNotFoundError, match=f"not in the cache, and {nobody} cannot be reached"):
        load_model(teacher_on_hub)


def test_conversion_is_known_of_a_student_of_the_hub(online, folder, quick, tmp_path):
    push_student(folder, REPOSITORY, license="mit")
    expected = json.loads((folder / "conversion.json").read_text())
    assert describe_conversion(REPOSITORY) == describe_conversion(f"{REPOSITORY}@main") == expected
    (folder / "report.json").write_text(json.dumps({"conversion": {"kl": {"copied": 7.0}}}))
    assert describe_conversion(folder) == expected
    (folder / "conversion.json").unlink()
    assert describe_conversion(str(folder)) == {"kl": {"copied": 7.0}}  # a student of `echoatt compress`
    assert describe_conversion(tmp_path / "gone") == describe_conversion("") == {}
    (folder / "report.json").write_text("{")
    with pytest.raises(ValueError, match="report.json of .* is not JSON"):
        describe_conversion(folder)


def test_data_is_named_without_its_place(tmp_path):
    (tmp_path / "mine.txt").write_text("text")
    described = describe_data(DataSettings(data=[str(tmp_path / "mine.txt"), "org/rows"]))
    assert described == {"names": ["mine.txt", "org/rows"], "repositories": ["org/rows"]}
    assert describe_data(DataSettings())["language"] == "code"
    assert describe_data(DataSettings(data="org/rows")) == describe_data(DataSettings(data=["org/rows"]))


KILLED = """
    import sys
    from echoatt_hf.publishing import push
    from echoatt_hf import push_student

    push._check_remote_load = lambda staged: None
    push_student(sys.argv[1], sys.argv[2], license="mit")
"""


@pytest.mark.slow
def test_push_that_was_killed_can_be_repeated(online, folder, quick, tmp_path):
    environment = online.environment(tmp_path) | {"PYTHONPATH": process_environment()["PYTHONPATH"]}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder), REPOSITORY]
    client = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    online.interrupt_upload(1, lambda: os.kill(client.pid, signal.SIGKILL))
    assert client.wait(timeout=100) == -signal.SIGKILL
    assert online.repositories[REPOSITORY].history() == ["initial commit"]
    push_student(folder, REPOSITORY, license="mit")
    assert {*files_of(online)} == WHOLE | {".gitattributes"}


def test_of_two_pushes_at_once_one_is_told_to_repeat(online, folder, quick, monkeypatch, run):
    push_student(folder, REPOSITORY, license="mit")
    list_files = HfApi.list_repo_files

    def meanwhile(api, *arguments, **options):
        files = files_of(online)
        online.repositories[REPOSITORY].commit("main", "somebody else", dict(files))
        return list_files(api, *arguments, **options)

    (folder / "generation_config.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "list_repo_files", meanwhile)
        refused = run(folder, REPOSITORY)
    assert refused.exit_code == 2 and "somebody else pushed to it meanwhile" in refused.stderr
    assert online.repositories[REPOSITORY].history()[-1] == "somebody else"
    assert run(folder, REPOSITORY).exit_code == 0
    assert files_of(online)["generation_config.json"].content == b"{}"


# What is refused before anything is sent


def change_config(folder, **changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )


def write_card(folder, text):
    write_model_card(folder)
    (folder / "README.md").write_text((folder / "README.md").read_text() + text)


REFUSED = {
    "no licence": (lambda folder: None, "give it with --license", []),
    "no folder": (shutil.rmtree, "no config.json", None),
    "a gap in the card": (
        lambda folder: write_card(folder, "More information needed\n"),
        "README.md, line 96, holds something that is left open, 'More information needed'",
        None,
    ),
    "None in the card": (lambda folder: write_card(folder, "by None\n"), "'None'", None),
    "the home folder": (
        lambda folder: write_card(folder, "in <HOME/x>\n"),
        "holds the path of the home folder, 'HOME/x'",
        None,
    ),
    "a path after a line break of JSON": (
        lambda folder: (folder / "sharing_plan.json").write_text(json.dumps({"from": "\n" + str(Path.cwd() / "x")})),
        "sharing_plan.json, line 1, holds the path of the working folder",
        None,
    ),
    "the cache": (
        lambda folder: write_card(folder, f"from {constants.HF_HUB_CACHE}.\n"),
        "holds the path of the cache",
        None,
    ),
    "a token": (
        lambda folder: (folder / "results.json").write_text(f'{{\n"with": "hf_{"x" * 30}"}}'),
        "results.json, line 2, holds what looks like a token, 'hf_xxxxx…'",
        None,
    ),
    "a key": (
        lambda folder: (folder / "NOTICE").write_text("-----BEGIN OPENSSH PRIVATE KEY-----"),
        "NOTICE, line 1, holds what looks like a token",
        None,
    ),
    "a token in the weights": (
        lambda folder: save_file({"x": torch.ones(1)}, folder / "other.safetensors", {"by": "sk-" + "a1B2" * 12}),
        "other.safetensors holds what looks like a token, 'sk-a1B2a…'",
        None,
    ),
    "its own token": (lambda folder: write_card(folder, TOKEN), "the token of the Hub", None),
    "its own path": (lambda folder: write_card(folder, str(folder)), "its own path", None),
    "weights that are no safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04pickle"),
        "is not safetensors",
        None,
    ),
    "only a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "no weights in safetensors",
        None,
    ),
    "a text that is none": (
        lambda folder: (folder / "results.json").write_bytes(b"\xff\xfe\x00"),
        "results.json holds what is neither text, weights nor a picture, 'fffe00'",
        None,
    ),
    "a pickle of another name": (
        lambda folder: (folder / "spiece.model").write_bytes(pickle.dumps({})),
        "spiece.model holds what is neither text",
        None,
    ),
    "metadata that are not YAML": (
        lambda folder: (folder / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n"),
        "The metadata of README.md cannot be read",
        None,
    ),
    "metadata with a tab": (
        lambda folder: (folder / "README.md").write_text("---\nlicense:\tmit\n---\n# Mine\n"),
        "The metadata of README.md cannot be read",
        None,
    ),
    "metadata that are a list": (
        lambda folder: (folder / "README.md").write_text("---\n- mit\n---\n# Mine\n"),
        "The metadata of README.md cannot be read",
        None,
    ),
    "a card in another encoding": (
        lambda folder: (folder / "README.md").write_bytes("---\nlicense: mit\n---\n# Modèle\n".encode("latin-1")),
        "README.md is not UTF-8 text (byte 26)",
        None,
    ),
    "a licence of no name": (
        lambda folder: None,
        "README.md, line 3, holds its license, which is none of the names that the Hub knows (did you mean 'apache-2.0'",
        [REPOSITORY, "--license", "Apache 2.0"],
    ),
    "a licence in the card": (
        lambda folder: (folder / "README.md").write_text("---\nlicense:\n- mit\n- gpl-3.0-or-later\n---\n# Mine\n"),
        "holds its license, which is none of the names that the Hub knows (did you mean 'gpl-3.0'",
        [],
    ),
    "a language of no name": (
        lambda folder: (folder / "README.md").write_text("---\nlicense: mit\nlanguage: English\n---\n# Mine\n"),
        "line 2, holds its language, which is no code of ISO 639 such as 'en'",
        [],
    ),
    "a base model that is a path": (
        lambda folder: (folder / "README.md").write_text("---\nlicense: mit\nbase_model: ./a/b/c\n---\n# Mine\n"),
        "holds its base_model, which is no name of a repository",
        [],
    ),
    "no architectures": (
        lambda folder: change_config(folder, architectures=None),
        "names the architectures None, where one of EchoAttForCausalLM",
        None,
    ),
    "no auto_map": (lambda folder: change_config(folder, auto_map=None), "no auto_map", None),
    "another model": (
        lambda folder: change_config(folder, model_type="llama", auto_map=None),
        "not an EchoAtt student",
        None,
    ),
    "no owner": (lambda folder: None, "give it with its owner", ["student", "--license", "mit"]),
    "no name of a repository": (lambda folder: None, "Repo id", ["a/b/c", "--license", "mit"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_anything_is_sent(case, online, folder, quick, run, monkeypatch, tmp_path):
    home = tmp_path / "home" / "carol"
    monkeypatch.setenv("HOME", str(home))
    spoil, message, arguments = REFUSED[case]
    spoil(folder)
    for name in ("README.md",) if (folder / "README.md").exists() else ():
        text = (folder / name).read_bytes()
        (folder / name).write_bytes(text.replace(b"HOME", str(home).encode()))
    if not arguments:
        arguments = [REPOSITORY, *([] if arguments == [] else ["--license", "mit"])]
    refused = run(folder, *arguments)
    assert refused.exit_code == 2, refused.output
    [line] = refused.stderr.strip().splitlines()
    assert line.startswith("echoatt: error: ") and message.replace("HOME", str(home)) in line
    assert TOKEN not in line and online.repositories == {}
    assert not any(line.startswith(("PUT", "POST")) for line in online.requests)


HONEST = {
    "the path of somebody's container": "It reads /data/train and writes /opt/app, /mnt/data and /home/user/x.",
    "hyphens": "task-specific-and-language-agnostic-distillation, sk-learn-like-estimators-of-any-kind-whatsoever",
    "a longer token's letters": "xhf_" + "x" * 30,
    "neighbours of the home folder": "/somewhere{home} {home}s {home}-2 https://x.org{home}/y",
    "code": "```python\nf(x=None)  # TODO\n```",
}


@pytest.mark.parametrize("case", HONEST)
def test_honest_users_may_write_what_they_like(case, online, folder, quick, monkeypatch):
    monkeypatch.setenv("HOME", "/home/carol")
    for name in ("LOGNAME", "USER"):  # which are words of every card
        monkeypatch.setenv(name, "student")
    text = HONEST[case].replace("{home}", "/home/carol")
    write_card(folder, f"\n{text}\n")
    (folder / "chat_template.jinja").write_text(f"{{{{ messages }}}} {text.replace('{', '(')}")
    published = push_student(folder, REPOSITORY, license="mit", dry_run=True)
    assert published.commit is None and "chat_template.jinja" in published.files


def test_a_user_without_a_name_and_a_home(online, folder, quick, monkeypatch):
    """As in a container that runs under any number."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert push_student(folder, REPOSITORY, license="mit", dry_run=True).commit is None


def test_findings_are_let_through_one_by_one(online, folder, quick, run, monkeypatch):
    monkeypatch.setenv("HOME", "/home/carol")
    write_card(folder, "\nNone of it is in /home/carol/[x].\nTODO\n")
    (folder / "NOTICE").write_text("Kept in /home/carol/y")
    allowed = []
    for name, shown in {
        "README.md:TODO": "README.md:TODO",
        "NOTICE:/home/carol/y": "NOTICE:/home/carol/y",
        "README.md:/home/carol/[x].": "'README.md:/home/carol/[[]x].'",
    }.items():
        refused = run(folder, REPOSITORY, "--license", "mit", "--dry-run", *allowed)
        file, _, text = name.partition(":")
        assert refused.exit_code == 2 and f"--allow {shown}." in refused.stderr and repr(text) in refused.stderr
        allowed += ["--allow", shown.strip("'")]
    assert (
        run(folder, REPOSITORY, "--license", "mit", "--dry-run", *allowed[:-2], "--allow", "*:/home/*").exit_code == 0
    )
    assert run(folder, REPOSITORY, "--license", "mit", "--dry-run", "--allow", "README.md:*").exit_code == 2
    patterns = [part for part in allowed if part != "--allow"]
    assert push_student(folder, REPOSITORY, license="mit", allow=patterns).commit is not None


@pytest.mark.skipif(not CLIENT_ASKS_ITS_ENDPOINT, reason="this client asks the Hub itself")
def test_dry_run_asks_the_hub_about_the_metadata(online, folder, quick, monkeypatch):
    def refuse(handler):
        handler._send(400, {"errors": [{"message": '"license" is too new'}], "warnings": []})

    monkeypatch.setattr("hub_server._Handler.validate_yaml", refuse)
    with pytest.raises(ValueError, match="The Hub does not take the metadata of README.md.*too new"):
        push_student(folder, REPOSITORY, license="mit", dry_run=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push_student(folder, REPOSITORY, license="mit", dry_run=True).commit is None


@pytest.mark.slow
def test_without_a_tokenizer_it_does_not_load(online, folder, run):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused = run(folder, REPOSITORY, "--license", "mit", "--dry-run")
    assert refused.exit_code == 2 and "does not load where echoatt_hf is not installed" in refused.stderr


def test_weights_that_do_not_load_are_a_mistake_of_the_user(online, folder, run):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused = run(folder, REPOSITORY, "--license", "mit", "--dry-run")
    assert refused.exit_code == 2 and "The folder does not load" in refused.stderr


@pytest.mark.slow
def test_other_outputs_in_the_clean_process_are_noticed(online, folder, monkeypatch):
    run, seen = subprocess.run, []

    def spoil(command, **options):
        result = run(command, **options)
        outputs = load_file(command[-1])
        save_file({"output": outputs["output"] + 1}, command[-1])
        seen.append(command)
        return result

    monkeypatch.setattr(subprocess, "run", spoil)
    with pytest.raises(ValueError, match=r"gives other outputs, by \d+\.\d%"):
        push_student(folder, REPOSITORY, license="mit", dry_run=True)
    assert seen


def test_no_answer_or_no_right_is_one_line(online, folder, quick, run, monkeypatch):
    refused = run(folder, "bob/student", "--license", "mit")
    assert refused.exit_code == 2 and "can be repeated" in refused.stderr
    assert "the token has no right to that (403: You don't have the rights" in refused.stderr
    assert f"{online.url}/settings/tokens" in refused.stderr
    monkeypatch.setenv("HF_TOKEN", BAD_TOKEN)
    refused = run(folder, REPOSITORY, "--license", "mit", "--dry-run")
    assert refused.exit_code == 2 and "the Hub does not know the token (401)" in refused.stderr
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
    refused = run(folder, REPOSITORY, "--license", "mit")
    assert refused.exit_code == 2 and "401" in refused.stderr and "hf auth login" in refused.stderr
    assert online.repositories == {}
    with monkeypatch.context() as patch:
        patch.setattr("hub_server._Handler._repository", gate)
        refused = run(folder, REPOSITORY, "--license", "mit")
    assert refused.exit_code == 2 and len(refused.stderr.strip().splitlines()) == 1


# `push_to_hub` of models and trainers


TRAINED = """
    import sys
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
    from echoatt_hf import EchoAttForCausalLM, EchoAttTrainer, EchoAttTrainingArguments, PublishingCallback, collate_rows

    folder, home, user = sys.argv[1:]
    student, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert student.push_to_hub(f"{user}/alone", commit_message="one", private=True)
    tokenizer.push_to_hub(f"{user}/alone")
    assert type(AutoModelForCausalLM.from_pretrained(f"{user}/alone")) is EchoAttForCausalLM  # the plugin wins
    rows = Dataset.from_list([{"input_ids": list(range(3, 11)), "labels": list(range(3, 11))}] * 4)
    common = {
        "push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True, "save_steps": 2, "report_to": "none",
        "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True,
    }
    args = EchoAttTrainingArguments(
        f"{home}/distilled", hub_model_id=f"{user}/distilled", stage1_steps=0, stage2_steps=4, learning_rate=1e-4, **common
    )

    class Wait(TrainerCallback):  # Trainer writes into the folder while it is still being pushed

        def on_step_begin(self, *_, **__):
            trainer._finish_current_push()

    options = {"train_dataset": rows, "data_collator": collate_rows, "processing_class": tokenizer}
    trainer = EchoAttTrainer(model=student, args=args, callbacks=[Wait()], **options)
    trainer.train()
    trainer.push_to_hub(license="mit", language="en", dataset="org/rows", tags="mine", finetuned_from="org/teacher")
    args = TrainingArguments(f"{home}/tuned", hub_model_id=f"{user}/tuned", max_steps=2, **common)
    trainer = Trainer(model=student, args=args, callbacks=[PublishingCallback(), Wait()], **options)
    trainer.train()
    trainer._finish_current_push()
"""


@pytest.fixture(scope="module")
def trained(saved, tmp_path_factory):
    """A server to which a process has pushed a student by each `push_to_hub`, and the folder it trained in."""
    from hub_server import HubServer

    home = tmp_path_factory.mktemp("trained")
    with HubServer() as hub:
        result = in_process(TRAINED, hub, home, saved, home, USER)
        assert result.returncode == 0, result.stderr
        yield hub, home


@pytest.mark.slow
def test_model_is_pushed_with_code_and_card_in_one_commit(trained):
    hub, _ = trained
    repository = hub.repositories[f"{USER}/alone"]
    assert repository.history()[1] == "one" and repository.private
    first = [commit for commit in repository.commits.values() if commit.title == "one"][0]
    assert {*first.files} >= {"README.md", "config.json", "model.safetensors", *CODE_FILES}
    files = files_of(hub, repository=f"{USER}/alone")
    card = files["README.md"].content.decode()
    assert "tokenizer.json" in files and find_gaps(card) == [] and f'name = "{USER}/alone"' in card


@pytest.mark.slow
def test_pushes_in_the_middle_of_a_run_are_whole(trained):
    hub, _ = trained
    for name in ("distilled", "tuned"):
        repository = hub.repositories[f"{USER}/{name}"]
        middle = next(commit for commit in repository.commits.values() if "step 2" in commit.title)
        assert {*middle.files} >= (WHOLE - {"conversion.json"}) | {"report.json"}
        for code in CODE_FILES:
            assert middle.files[code].content == (Path(echoatt_hf.__file__).parent / code).read_bytes()
        assert find_gaps(middle.files["README.md"].content.decode()) == []


@pytest.mark.slow
def test_push_in_the_middle_loads_where_the_plugin_is_not(trained, tmp_path):
    hub, _ = trained
    repository = hub.repositories[f"{USER}/distilled"]
    middle = next(commit for commit in repository.commits.values() if "step 2" in commit.title)
    loaded = load_in_clean_process(hub, tmp_path, middle.oid, repository=f"{USER}/distilled")
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.slow
def test_card_of_a_trainer_says_what_it_knows(trained):
    hub, home = trained
    card = files_of(hub, repository=f"{USER}/distilled")["README.md"].content.decode()
    data = ModelCard(card).data
    assert (data.license, data.language, data.datasets) == ("mit", "en", ["org/rows"])
    assert (data.base_model, data.base_model_relation) == ("org/teacher", "finetune") and "mine" in data.tags
    assert "4 steps on the text alone" in card.lower() and "| `learning_rate` | 0.0001 |" in card
    assert f'name = "{USER}/distilled"' in card and str(home) not in card and TOKEN not in card
    assert "hub_token" not in card and "output_dir" not in card


@pytest.mark.slow
def test_trainer_folder_can_be_pushed_with_the_checks(trained, online, quick):
    _, home = trained
    published = push_student(home / "distilled", REPOSITORY)
    assert "training_args.bin" in published.left_out and "checkpoint-2/" in published.left_out


# The examples


def example(name, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module(name)


def test_example_lists_and_pushes_a_student(online, folder, quick, monkeypatch, capsys):
    main = example("push_to_hub", monkeypatch).main
    write_model_card(folder, license="mit")
    main([REPOSITORY, "--folder", str(folder)])
    assert "model.safetensors" in capsys.readouterr().out and online.repositories == {}
    main([REPOSITORY, "--folder", str(folder), "--publish"])
    assert online.repositories[REPOSITORY].private


@pytest.mark.slow
def test_example_makes_the_student_it_pushes(online, quick, monkeypatch, tmp_path):
    example("push_to_hub", monkeypatch).main(
        [REPOSITORY, "--folder", str(tmp_path / "new"), "--steps", "1", "--publish"]
    )
    data = ModelCard(files_of(online)["README.md"].content.decode()).data
    assert (data.license, data.language) == ("apache-2.0", "code")


@pytest.mark.slow
def test_example_loads_a_student_in_both_ways(online, folder, quick, tmp_path):
    push_student(folder, REPOSITORY, license="mit")
    oid = online.repositories[REPOSITORY].find("main").oid
    script = str(Path(__file__).parents[1] / "examples" / "load_from_hub.py")
    printed = []
    for plugin, arguments in ((True, []), (False, ["--trust-remote-code"])):
        run = 'import runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name="__main__")'
        result = in_process(run, online, tmp_path, script, REPOSITORY, *arguments, plugin=plugin)
        assert result.returncode == 0, result.stderr
        assert f"revision {oid}" in result.stdout and "2 echo layers" in result.stdout
        printed.append(result.stdout.splitlines())
    assert printed[0][1].startswith("echoatt_hf.") and printed[1][1].startswith("transformers_modules.")
    assert printed[0][2:] == printed[1][2:]


@pytest.fixture(scope="module")
def pair(saved, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        app = example("app_gradio", patch)
    teacher = tmp_path_factory.mktemp("teacher")
    make_teacher(num_hidden_layers=5, vocab_size=300).save_pretrained(teacher)
    return app, app.load_pair(str(teacher), str(saved))


def test_app_streams_both_texts_and_shows_sizes_and_the_heat_map(pair, tmp_path, monkeypatch):
    app, models = pair
    monkeypatch.setattr(app.tempfile, "tempdir", str(tmp_path))
    *growing, last = app.compare(models, "Once upon", 6, 0)
    message, *texts, teacher_words, student_words, image = last
    inputs = models.tokenizer("Once upon", return_tensors="pt")
    for text, model in zip(texts, (models.teacher, models.student), strict=True):
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert text == models.tokenizer.decode(expected, skip_special_tokens=True)
    assert message == "" and len(growing) > 3
    for number in (1, 2):  # no text gets shorter, and the student waits for the teacher
        shown = [outputs[number] for outputs in growing]
        assert all(later.startswith(earlier) for earlier, later in zip(shown, shown[1:], strict=False))
    assert growing[0][2] == "" and growing[0][1] != texts[0]
    for words, model in ((teacher_words, models.teacher), (student_words, models.student)):
        assert f"{model.num_parameters():,} parameters" in words and float(words.split()[0]) > 0
        assert f"{echoatt_hf.count_kv_bytes_per_token(model):,} bytes of KV cache per token" in words
    assert teacher_words.split(",")[-1] != student_words.split(",")[-1]
    assert image.ndim == 3 and image.dtype == "uint8" and image.min() < 100 and growing[0][-1] is None
    assert list(tmp_path.iterdir()) == []
    sampled = [list(app.generate(models.student, models.tokenizer, inputs, 6, 1.0))[-1][0] for _ in range(2)]
    assert sampled[0] == sampled[1]  # sampling starts from the same seed on both sides


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ("", 6, "The prompt is empty: write something"),
        (" \n", 6, "The prompt is empty: write something"),
        ("Once upon a time " * 90, 6, "tokens, which with 6 new ones do not fit into the context of 128: shorten it"),
        ("Once", 200, "with 200 new ones do not fit"),
    ],
)
def test_app_says_on_the_page_what_is_wrong(pair, prompt, tokens, message):
    app, models = pair
    [outputs] = app.compare(models, prompt, tokens, 0)
    assert message in outputs[0] and outputs[1:] == ("", "", "", "", None)


def test_app_raises_what_goes_wrong_while_it_generates(pair, monkeypatch):
    app, models = pair

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(models.student, "generate", fail)
    inputs = models.tokenizer("Once", return_tensors="pt")
    with pytest.raises(RuntimeError, match="out of memory"):
        list(app.generate(models.student, models.tokenizer, inputs, 4, 0))


def test_app_uses_the_chat_template(pair, monkeypatch):
    app, models = pair
    monkeypatch.setattr(models.tokenizer, "chat_template", "User: {{ messages[0]['content'] }} Bot:")
    inputs = app.encode(models, "Once", 4)
    assert models.tokenizer.decode(inputs["input_ids"][0]) == "User: Once Bot:"
    assert list(app.compare(models, "Once", 4, 0))[-1][0] == ""


def test_app_without_gradio_needs_it_only_for_the_page(pair, monkeypatch):
    app, models = pair
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError):
        app.build_app(models)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(SystemExit, match="name a teacher and a student"):
        app.main()


def test_page_of_the_app(pair):
    gradio = pytest.importorskip("gradio")
    app, models = pair
    page = app.build_app(models)
    assert isinstance(page, gradio.Blocks)
    [click] = page.fns.values()
    assert len(click.inputs) == 3 and [type(part).__name__ for part in click.outputs] == [
        *("Markdown", "Textbox", "Textbox", "Markdown", "Markdown", "Image")
    ]
    assert all(len(outputs) == len(click.outputs) for outputs in click.fn("Once upon", 4, 0))
