"""Publishing a student on the Hub: what is sent, the checks before it, and one commit."""

import getpass
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ..configuration_echoatt import EchoAttConfig
from ..modeling_echoatt import EchoAttPreTrainedModel
from ..outputs.files import hash_file, write_whole
from .callbacks import CODE_FILES, copy_code
from .card import find_gaps, has_own_text, make_card


__all__ = ["Publication", "push_model", "push_student"]

# Other files of a folder are left where they are: checkpoints, logs, pickles (the Trainer's training_args.bin is one).
_SENT = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "README.md",
    "*.png",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "report.json",
    "sharing_plan.json",
    "similarity.json",
    "conversion.json",
    "zero_shot.json",
    "benchmark.json",
    "results.json",
]
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")

# Whose text is that of a vocabulary, in which a path may stand for itself.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", *CODE_FILES)

_TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|AKIA[0-9A-Z]{16}|sk-[\w-]{20,}"
)
_PATH = re.compile(
    r"(?<![\w.:/~-])(?:/(?:home|Users|root|tmp|var|private|mnt|media|data|opt|srv|work|workspace|scratch|content)/[\w.-]+"
    r"|[A-Za-z]:\\+Users\\+[\w.-]+)"
)

# Users of machines, whose names tell nothing of a person.
_NOBODY = {"root", "user", "admin", "ubuntu", "runner", "jovyan", "nobody", "app"}


@dataclass(frozen=True)
class Publication:
    """
    What was sent, or would be.

    Args:
        repo_id (`str`): the repository.
        files (`dict[str, tuple[int, str]]`): size in bytes and sha256 of each file.
        left_out (`list[str]`): files of the folder that are not sent.
        commit (`CommitInfo`, *optional*): the commit; `None` of a dry run.
    """

    repo_id: str
    files: dict[str, tuple[int, str]]
    left_out: list[str]
    commit: CommitInfo | None = None

    def __str__(self) -> str:
        width = max(map(len, self.files))
        lines = [f"{name:{width}}  {size:>14,}  {sha256[:12]}" for name, (size, sha256) in self.files.items()]
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        total = f"{len(self.files)} files, {sum(size for size, _ in self.files.values()):,} bytes"
        if self.commit is None:
            return "\n".join([*lines, f"{total}; nothing was sent to {self.repo_id}"])
        return "\n".join([*lines, f"{total} sent to {self.commit.pr_url or self.commit.commit_url}"])


def push_student(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    commit_message: str = "Upload EchoAtt student",
    dry_run: bool = False,
    token: str | None = None,
) -> Publication:
    """
    Publish the folder of a student in one commit, after checks of exactly what is sent.

    It has to load in a process without `echoatt_hf` by the code that is sent, and to give the same logits there as here;
    the card has to leave nothing open; no text may hold a path of this machine, a name of its user, or a token; weights
    have to be safetensors, and pickles are not sent; the licence has to be known. The folder itself is not changed. A
    push that was interrupted has published nothing, and can be repeated: what had arrived is not sent again.

    Args:
        folder (`str` or `Path`):
            What [`compress`] wrote, or any folder with a student and its tokenizer.
        repo_id (`str`):
            Repository to push to; made if it is not there.
        private (`bool`, *optional*):
            Whether a repository that is made is private.
        revision (`str`, *optional*):
            Branch to push to, made if it is not there; `main` if not given.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request instead.
        license (`str`, *optional*):
            Licence of the student, by the Hub's name of it. If not given, that of the card, or of the teacher.
        commit_message (`str`, *optional*, defaults to `"Upload EchoAtt student"`):
            Title of the commit.
        dry_run (`bool`, *optional*, defaults to `False`):
            Do everything but send.
        token (`str`, *optional*):
            Token of the Hub; the stored one if not given.

    Returns:
        [`Publication`]: the files, and the commit unless it was a dry run.

    Raises:
        `ValueError`: a check failed; the message says what to do.
        `OSError`: the folder is no student, or the Hub refused or could not be reached.
    """
    folder, api = Path(folder), HfApi(token=token)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"The repository is {repo_id!r}: give it with its owner, such as 'you/{repo_id}'.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request goes to main, not to {revision!r}: leave out the revision or the request.")
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging)
        left_out = _stage(folder, staged)
        _write_card(staged, api, repo_id, revision, license)
        _check_files(staged, folder, repo_id)
        _check_remote_load(staged)
        files = {path.name: (path.stat().st_size, hash_file(path)) for path in sorted(staged.iterdir())}
        commit = None
        if not dry_run:
            commit = _send(staged, api, repo_id, private, revision, create_pr, commit_message)
    return Publication(repo_id, files, left_out, commit)


def push_model(
    model: EchoAttPreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """
    What `student.push_to_hub` does: the model, the code that loads it and its card, in one commit.

    See [`~transformers.PreTrainedModel.push_to_hub`]; a tokenizer is pushed by its own `push_to_hub`. For a folder with all
    of it, and checks before, see [`push_student`].
    """
    api = HfApi(token=token)
    tags = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging)
        model.save_pretrained(staged, max_shard_size=max_shard_size)
        with _one_line_errors(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        old = _remote_card(api, repo_id, revision)
        write_whole(staged / "README.md", make_card(staged, old, repo_id=repo_id, tags=tags))
        _check_files(staged, staged, repo_id)
        message = commit_message or "Upload model"
        return _send(staged, api, repo_id, private, revision, create_pr, message, commit_description)


# What is sent


def _stage(folder: Path, staged: Path) -> list[str]:
    """Link what is sent of `folder` into `staged`, with the code of this version. Returns what is left out."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"The folder {str(folder)!r} holds no model: it has no config.json.")
    left_out = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(path.match(pattern) for pattern in _SENT):
            (staged / path.name).symlink_to(path.resolve())
        elif path.name not in CODE_FILES:
            left_out.append(path.name + "/" * path.is_dir())
    config = AutoConfig.from_pretrained(staged)
    if not isinstance(config, EchoAttConfig):
        raise ValueError(f"{str(folder)!r} holds a {config.model_type!r} model, not an EchoAtt student.")
    if not getattr(config, "auto_map", None):
        raise ValueError(
            f"{str(folder / 'config.json')!r} has no auto_map, by which the model loads without echoatt_hf: save it anew "
            "with model.save_pretrained."
        )
    if not any(staged.glob("*.safetensors")):
        raise ValueError(
            f"{str(folder)!r} has no weights in safetensors, the only kind that is published: save it with "
            "model.save_pretrained."
        )
    copy_code(staged)
    return left_out


def _write_card(staged: Path, api: HfApi, repo_id: str, revision: str | None, license: str | None) -> None:
    """Bring the card up to date, with the licence and the language of the base model where its own are not known."""
    file = staged / "README.md"
    local = file.read_text(encoding="utf-8") if file.exists() else None
    is_written_by_hand = local is not None and has_own_text(local)
    old = local if is_written_by_hand else _remote_card(api, repo_id, revision) or local
    card = make_card(staged, old, repo_id=repo_id, license=license)
    data = ModelCard(card).data
    if data.license is None and isinstance(data.base_model, str):
        known = _card_data_of(api, data.base_model)
        if known.get("license") not in (None, "other"):
            card = make_card(staged, old, repo_id=repo_id, license=known["license"], language=known.get("language"))
            data = ModelCard(card).data
    if data.license is None:
        raise ValueError(
            "The licence of the student is not known. It has to be one its teacher's licence allows: give it with "
            "--license, such as apache-2.0, or in the metadata of README.md."
        )
    file.unlink(missing_ok=True)
    file.write_text(card, encoding="utf-8")


def _remote_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    try:
        return Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8")
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
        return None


def _card_data_of(api: HfApi, repo_id: str) -> dict:
    """Metadata of the card of a repository; empty if it cannot be had."""
    with suppress(Exception):  # whatever the reason, the licence is asked for
        return api.model_info(repo_id).card_data.to_dict()
    return {}


# Checks


def _check_files(staged: Path, folder: Path, repo_id: str) -> None:
    """Check the files themselves: the card leaves nothing open, weights are safetensors, nothing private is in them."""
    gaps = find_gaps((staged / "README.md").read_text(encoding="utf-8"))
    if gaps:
        raise ValueError(f"README.md leaves something open: {', '.join(map(repr, gaps))}. Write what belongs there.")
    private = _private_texts(folder)
    for path in sorted(staged.iterdir()):
        found = _find_private(path.name, _read_text(path), private, repo_id)
        if found is not None:
            raise ValueError(f"{path.name} holds {found}, which everybody would see: take it out.")


def _read_text(path: Path) -> str:
    """The text in a file that is sent; of weights that of their metadata, which they have to have."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return json.dumps(file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(f"{path.name} is not safetensors ({error}): save the model anew.") from None
    if path.suffix == ".png":
        return path.read_bytes().decode("latin-1")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        if path.suffix == ".model":
            return path.read_bytes().decode("latin-1")
        raise ValueError(f"{path.name} is not a text, and is not sent: take it out.") from None


def _private_texts(folder: Path) -> dict[str, str]:
    """What must not be in any file, and what it is."""
    texts = {
        str(Path.home()): "the home folder",
        str(Path.cwd()): "the path of the working folder",
        str(folder.resolve()): "its own path",
        get_token() or "": "the token of the Hub",
    }
    return {text: what for text, what in texts.items() if len(text) > 5}


def _find_private(name: str, text: str, private: dict[str, str], repo_id: str) -> str | None:
    for secret, what in private.items():
        if secret in text:
            return what
    if _TOKEN.search(text):
        return "what looks like a token"
    if name in _VOCABULARIES or name.endswith((".png", ".model")):
        return None
    path = _PATH.search(text)
    if path:
        return f"the path {path.group()!r}"
    user = getpass.getuser()
    # A name before a slash is that of an account of the Hub, which is public.
    if user not in {*_NOBODY, repo_id.split("/")[0]} and re.search(rf"(?<![\w-]){re.escape(user)}(?![\w/-])", text):
        return f"the name of the user, {user!r}"
    return None


def _check_remote_load(staged: Path) -> None:
    """Check that a process without `echoatt_hf` can load the model and the tokenizer, and gets the logits of this one."""
    config = AutoConfig.from_pretrained(staged)
    auto_class = _auto_class(config)
    input_ids = torch.randint(config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    model = getattr(transformers, auto_class).from_pretrained(staged, dtype="auto").eval()
    with torch.no_grad():
        expected = model(input_ids=input_ids)[0]
    del model
    with tempfile.TemporaryDirectory() as work:
        inputs, outputs = Path(work) / "inputs.safetensors", Path(work) / "outputs.safetensors"
        save_file({"input_ids": input_ids}, inputs)
        environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name}
        result = subprocess.run(
            [sys.executable, Path(__file__).with_name("remote_load.py"), staged, auto_class, inputs, outputs],
            env=environment | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(work) / "modules")},
            cwd=work,
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"The folder does not load where echoatt_hf is not installed: {reason}")
        found = load_file(outputs)["output"]
    worst = (found - expected).abs().max().item()
    if not worst <= 1e-3 * expected.abs().max().item():
        raise ValueError(
            f"Loaded where echoatt_hf is not installed the model gives other outputs, by up to {worst:.3g}: save it anew "
            "with this version, and report it if that does not help."
        )


def _auto_class(config: EchoAttConfig) -> str:
    [architecture] = config.architectures
    return next(name for name, path in config.auto_map.items() if path.endswith(f".{architecture}"))


# Sending


def _send(
    staged: Path,
    api: HfApi,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str,
    description: str | None = None,
) -> CommitInfo:
    """One commit of all files of `staged`, which also takes away weights of before that are no part of it."""
    with _one_line_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main") and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.model_info(repo_id, revision=revision)
        if private and not there.private:
            raise ValueError("it is there already, and public: make it private on the Hub, or push to another")
        files = {path.name: path for path in sorted(staged.iterdir())}
        stale = [
            name
            for name in api.list_repo_files(repo_id, revision=there.sha)
            if name not in files and any(fnmatch(name, pattern) for pattern in _WEIGHTS)
        ]
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in files.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            # Of two pushes at once the second one fails, and is not mixed with the first.
            parent_commit=there.sha,
        )


@contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    """What the client raises, an error of one of several HTTP libraries among it, as an `OSError` of one line."""
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 412:
            reason = "somebody else pushed to it meanwhile"
        else:
            reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
        raise OSError(
            f"The push to {repo_id!r} failed and has published nothing, and can be repeated: {reason}"
        ) from error
