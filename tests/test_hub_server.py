"""The server that stands for the Hub, as the client of huggingface_hub sees it."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hub_server import TOKEN, USER
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError


pytestmark = pytest.mark.hub

REPOSITORY = f"{USER}/student"
CARD = b"---\nlicense: mit\n---\n\n# A card\n"


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.url, token=TOKEN)


def push(api, message="first", **options):
    operations = [
        CommitOperationAdd(path, content)
        for path, content in {
            "README.md": CARD,
            "config.json": b"{}",
            "model.safetensors": b"weights" * 1000,
            "figures/a.png": b"png",
        }.items()
    ]
    return api.create_commit(REPOSITORY, operations, commit_message=message, **options)


def test_push_and_load_back(api, hub, tmp_path):
    assert api.whoami()["name"] == USER
    assert api.create_repo("student").repo_id == REPOSITORY
    made = push(api)
    assert hub.repositories[REPOSITORY].history() == ["initial commit", "first"]
    folder = api.snapshot_download(REPOSITORY, cache_dir=tmp_path)
    assert folder.endswith(made.oid)
    assert api.hf_hub_download(REPOSITORY, "model.safetensors", cache_dir=tmp_path).startswith(folder)
    with open(f"{folder}/model.safetensors", "rb") as file:
        assert file.read() == b"weights" * 1000
    large, missing = api.get_paths_info(REPOSITORY, ["model.safetensors", "nothing"]), "not there"
    assert [(file.path, file.size, file.lfs is not None) for file in large] == [("model.safetensors", 7000, True)]
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPOSITORY, missing, cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPOSITORY, revision="nowhere")
    assert {entry.path for entry in api.list_repo_tree(REPOSITORY)} >= {"figures", "config.json"}
    assert api.model_info(REPOSITORY).card_data.license == "mit"


def test_unchanged_files_are_not_sent_again(api, hub):
    api.create_repo(REPOSITORY)
    first, second = push(api), push(api, "second")
    assert second.oid == first.oid and len([line for line in hub.requests if line.startswith("PUT")]) == 2


def test_branch_and_pull_request_leave_main_as_it_is(api, hub):
    api.create_repo(REPOSITORY)
    api.create_branch(REPOSITORY, branch="next/try")
    api.create_branch(REPOSITORY, branch="next/try", exist_ok=True)
    push(api, revision="next/try")
    request = push(api, "proposed", create_pr=True)
    assert request.pr_url.endswith("/discussions/1") and request.pr_revision == "refs/pr/1"
    repository = hub.repositories[REPOSITORY]
    assert repository.history() == ["initial commit"]
    assert repository.history("next/try") == ["initial commit", "first"]
    assert api.model_info(REPOSITORY, revision="refs/pr/1").sha == request.oid
    assert {ref.name for ref in api.list_repo_refs(REPOSITORY).branches} == {"main", "next/try"}


def test_two_pushes_from_one_parent_cannot_both_be(api, hub):
    api.create_repo(REPOSITORY)
    parent = api.model_info(REPOSITORY).sha

    def attempt(message):
        try:
            return api.create_commit(
                REPOSITORY,
                [CommitOperationAdd("name.txt", message.encode())],
                commit_message=message,
                parent_commit=parent,
            )
        except HfHubHTTPError as error:
            return error.response.status_code

    with ThreadPoolExecutor(2) as pool:
        results = [*pool.map(attempt, ["one", "two"])]
    assert results.count(412) == 1
    repository = hub.repositories[REPOSITORY]
    assert len(repository.history()) == 2
    assert repository.find("main").files["name.txt"].content.decode() == repository.history()[-1]


def test_private_repository_is_not_found_without_the_token(api, hub, tmp_path):
    api.create_repo(REPOSITORY, private=True)
    push(api)
    assert api.model_info(REPOSITORY).private
    stranger = HfApi(endpoint=hub.url, token=False)
    for ask in (
        lambda: stranger.model_info(REPOSITORY),
        lambda: stranger.hf_hub_download(REPOSITORY, "config.json", cache_dir=tmp_path),
        lambda: stranger.model_info("alice/nothing"),
    ):
        with pytest.raises(RepositoryNotFoundError) as error:
            ask()
        assert error.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError) as error:
        api.model_info("alice/nothing")
    assert error.value.response.status_code == 404
    with pytest.raises(HfHubHTTPError, match="401|403"):
        stranger.create_repo("alice/other")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("bob/student")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("a: [", "YAML is invalid"),
        ("base_model: runs/local/teacher", "not valid"),
        ("base_model_relation: child", "must be one of"),
    ],
)
def test_wrong_metadata_is_refused_before_anything_is_sent(api, hub, metadata, message):
    api.create_repo(REPOSITORY)
    card = CommitOperationAdd("README.md", f"---\n{metadata}\n---\n".encode())
    weights = CommitOperationAdd("model.safetensors", b"weights")
    with pytest.raises(ValueError, match=message):
        api.create_commit(REPOSITORY, [weights, card], commit_message="bad")
    assert not hub.large_files and hub.repositories[REPOSITORY].history() == ["initial commit"]


def test_client_repeats_an_upload_whose_connection_dropped(api, hub):
    api.create_repo(REPOSITORY)
    hub.interrupt_upload(1)
    push(api)
    assert hub.repositories[REPOSITORY].find("main").files["model.safetensors"].content == b"weights" * 1000
    assert len([line for line in hub.requests if line.startswith("PUT")]) == 3


KILLED = """
import sys
from huggingface_hub import CommitOperationAdd, HfApi

operations = [CommitOperationAdd(f"{n}.safetensors", bytes([n]) * 100_000) for n in range(3)]
HfApi().create_commit(sys.argv[1], operations, commit_message="all", num_threads=1)
"""


def test_push_whose_client_died_can_be_repeated(api, hub, tmp_path):
    api.create_repo(REPOSITORY)
    start = {"args": [sys.executable, "-c", KILLED, REPOSITORY], "env": hub.environment(tmp_path)}
    client = subprocess.Popen(**start, stderr=subprocess.DEVNULL)
    hub.interrupt_upload(2, lambda: os.kill(client.pid, signal.SIGKILL))
    assert client.wait(timeout=60) == -signal.SIGKILL
    assert len(hub.large_files) == 1 and hub.repositories[REPOSITORY].history() == ["initial commit"]
    again = subprocess.run(**start, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert hub.repositories[REPOSITORY].history() == ["initial commit", "all"]
    assert len([line for line in hub.requests if line.startswith("PUT")]) == 4  # what had arrived was not sent again
