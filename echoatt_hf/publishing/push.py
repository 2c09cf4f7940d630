"""Publishing a student on the Hub: what is sent, the checks before it, and one commit."""

import glob
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import transformers
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
)
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.utils import logging

from ..configuration_echoatt import EchoAttConfig
from ..modeling_echoatt import EchoAttPreTrainedModel
from ..models.checks import relative_error
from ..models.loading import explain_hub_error
from ..outputs.files import hash_file, write_whole
from .callbacks import CODE_FILES, copy_code
from .card import USES, find_gaps, has_own_text, make_card, read_card
from .metadata import find_metadata_faults
from .mlx import MLX_FILE, add_mlx_file


__all__ = ["Publication", "push_model", "push_student", "stage_student"]

logger = logging.get_logger(__name__)

# Everything else of a folder is sent, as a licence may demand a file of any name.
_LEFT_OUT = [
    *(".*", "*/.*", "__pycache__/", "*/__pycache__/"),
    # Unfinished work, the state of a training, and logs.
    *(
        "checkpoint-*/",
        "global_step*/",
        "*.partial/",
        "optimizer.*",
        "scheduler.*",
        "rng_state*",
        "trainer_state.json",
    ),
    *("runs/", "logs/", "wandb/", "mlruns/", "*.log", "*tfevents*"),
    # Pickles, which run code when they are loaded, and weights for other libraries.
    *(
        "*.bin",
        "*.bin.index.json",
        "*.pt",
        "*.pth",
        "*.ckpt",
        "*.pkl",
        "*.pickle",
        "*.joblib",
        "*.distcp",
        "*.npy",
        "*.npz",
    ),
    *("*.h5", "*.msgpack"),
    # Data, which has repositories of its own.
    *("*.jsonl*", "*.parquet", "*.arrow", "*.csv", "*.tsv"),
    # Keys and tokens.
    *("*.pem", "*.key", "id_rsa*", "id_ed25519*", "credentials*", "token", "*.token", "stored_tokens"),
]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]
_BINARIES = ("*.model", "*.model.v*", "*.spm", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.pdf")

# Where they begin and end, as words may hold the same letters.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_-])(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{20,}"
    r"|sk-(?:(?:proj|svcacct|admin|ant|or)-[\w-]{20,}|[A-Za-z0-9]{32,}))(?![A-Za-z0-9_])"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


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
    mlx: bool = False,
    allow: Sequence[str] = (),
    dry_run: bool = False,
    token: str | None = None,
) -> Publication:
    """
    Publish the folder of a student in one commit, after checks of exactly what is sent.

    The student has to load in a process without `echoatt_hf` by the code that is sent, and to give the same logits there as
    here. The card must leave nothing open, and the Hub must take its metadata. No text may hold a path of this machine (the
    home folder, the cache of the Hub, the working folder, the student's folder) or a token. Weights have to be safetensors.
    The licence has to be known.

    All files are sent but pickles, checkpoints, logs, states of a training, data, keys and hidden files; the result names
    what is left out. The folder itself is not changed. A push that was interrupted has published nothing, and can be
    repeated: what had arrived is not sent again.

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
        mlx (`bool`, *optional*, defaults to `False`):
            Send the model file of mlx_lm too, see [`export`]. A folder that has one is sent with that of this version.
        allow (sequence of `str`, *optional*):
            What to send all the same of what the checks of the texts find: patterns for `file:text`, as the message shows
            them, where `*` stands for anything.
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
        left_out = stage_student(folder, staged)
        if mlx:
            add_mlx_file(staged)
        _write_card(staged, api, repo_id, revision, license)
        _check_files(staged, folder, allow, token)
        if dry_run:
            _ask_hub(staged)
        _check_remote_load(staged)
        files = {name: (path.stat().st_size, hash_file(path)) for name, path in _files_of(staged).items()}
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
    allow: Sequence[str] = (),
) -> CommitInfo:
    """
    What `student.push_to_hub` does: the model, the code that loads it and its card, in one commit.

    See [`~transformers.PreTrainedModel.push_to_hub`]; a tokenizer is pushed by its own `push_to_hub`. For a folder with all
    of it, and checks before, see [`push_student`], where `allow` is described too.
    """
    api = HfApi(token=token)
    tags = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging)
        model.save_pretrained(staged, max_shard_size=max_shard_size)
        with _one_line_errors(repo_id, token=token):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        old = _remote_card(api, repo_id, revision)
        write_whole(staged / "README.md", make_card(staged, old, repo_id=repo_id, tags=tags))
        _check_files(staged, staged, allow, token)
        message = commit_message or "Upload model"
        return _send(staged, api, repo_id, private, revision, create_pr, message, commit_description)


# What is sent


def stage_student(folder: Path, staged: Path) -> list[str]:
    """
    Link what is published of a student's folder into another, with the code of this version.

    Args:
        folder (`Path`): the folder of the student.
        staged (`Path`): an empty folder.

    Returns:
        `list[str]`: names of the files that are left out.

    Raises:
        `FileNotFoundError`: the folder holds no model.
        `ValueError`: it is no student, or its weights are not safetensors.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"The folder {str(folder)!r} holds no model: it has no config.json.")
    files = _files_of(folder)
    own_code = (*CODE_FILES, MLX_FILE)
    sent = [name for name in filter_repo_objects(files, ignore_patterns=_LEFT_OUT) if name not in own_code]
    for name in sent:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).symlink_to(files[name].resolve())
    _check_student(folder, staged)
    copy_code(staged)
    if MLX_FILE in files:
        add_mlx_file(staged)
    return _summarize(sorted(files.keys() - {*sent, *own_code}), sent)


def _files_of(folder: Path) -> dict[str, Path]:
    """All files of a folder and below it, by the names that they have in a repository."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _summarize(left_out: list[str], sent: list[str]) -> list[str]:
    """Names of files, and of folders of which nothing is sent."""
    folders = {name.partition("/")[0] for name in sent if "/" in name}
    names = [name if "/" not in name or name.partition("/")[0] in folders else f"{name.partition('/')[0]}/" for name in left_out]  # fmt: skip
    return list(dict.fromkeys(names))


def _check_student(folder: Path, staged: Path) -> None:
    config = AutoConfig.from_pretrained(staged)
    if not isinstance(config, EchoAttConfig):
        raise ValueError(f"{str(folder)!r} holds a {config.model_type!r} model, not an EchoAtt student.")
    if len(config.architectures or []) != 1 or config.architectures[0] not in USES:
        raise ValueError(
            f"{str(folder / 'config.json')!r} names the architectures {config.architectures}, where one of "
            f"{', '.join(USES)} should be: save it anew with model.save_pretrained."
        )
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


def _write_card(staged: Path, api: HfApi, repo_id: str, revision: str | None, license: str | None) -> None:
    """Bring the card up to date, with the licence and the language of the base model where its own are not known."""
    file, local = staged / "README.md", read_card(staged)
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
    with _one_line_errors(repo_id, revision, api.token):
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


@dataclass(frozen=True)
class _Finding:
    """What everybody would see: where it is, what it is, and as much of it as may be shown."""

    file: str
    line: int | None
    what: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.text}"

    def __str__(self) -> str:
        return f"{self.file}{f', line {self.line},' if self.line else ''} holds {self.what}, {self.text!r}"


def _check_files(staged: Path, folder: Path, allow: Sequence[str], token: str | None) -> None:
    """Check the files themselves: the card leaves nothing open, weights are safetensors, nothing private is in them."""
    files, private = _files_of(staged), _private_places(folder)
    found = [*_check_card((staged / "README.md").read_text(encoding="utf-8"))]
    for name, path in files.items():
        found += _check_file(name, path, private, token or get_token())
    found = [finding for finding in found if not any(fnmatchcase(finding.name, pattern) for pattern in allow)]
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"{'; '.join(map(str, found[:5]))}{more}. Change that, or send it all the same with --allow "
            f"{shlex.quote(glob.escape(found[0].name))}."
        )


def _check_card(card: str) -> Iterator[_Finding]:
    for line, text in find_gaps(card):
        yield _Finding("README.md", line, "something that is left open", text)
    for text, what in find_metadata_faults(ModelCard(card).data.to_dict()):
        line = next((number for number, row in enumerate(card.splitlines(), 1) if text in row), None)
        yield _Finding("README.md", line, what, text)


def _check_file(name: str, path: Path, private: dict[str, str], token: str | None) -> Iterator[_Finding]:
    is_binary = path.suffix == ".safetensors" or any(fnmatchcase(name, pattern) for pattern in _BINARIES)
    if path.suffix == ".safetensors":
        text = _read_metadata(path, name)
    else:
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            if not is_binary or content.startswith(b"\x80"):  # as a pickle does
                yield _Finding(name, None, "what is neither text, weights nor a picture", content[:4].hex())
                return
            text = content.decode("latin-1")

    def find(pattern: str | re.Pattern, what: str, shown: slice) -> Iterator[_Finding]:
        for match in re.finditer(pattern, text):
            line = None if is_binary else text.count("\n", 0, match.start()) + 1
            yield _Finding(name, line, what, match.group()[shown] + "…" * (shown.stop is not None))

    for place, what in private.items():
        yield from find(rf"(?:(?<![\w.-])|(?<=\\[nrt])){re.escape(place)}(?![\w-])[^\s\"'`<>()]*", what, slice(None))
    if token and token in text:
        yield from find(re.escape(token), "the token of the Hub", slice(8))
    else:
        yield from find(_TOKEN, "what looks like a token", slice(8))


def _read_metadata(path: Path, name: str) -> str:
    try:
        with safe_open(path, "pt") as file:
            return json.dumps(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{name} is not safetensors ({error}): save the model anew.") from None


def _private_places(folder: Path) -> dict[str, str]:
    """Paths of this machine that must not be in any file, as text and as JSON write them, and what they are."""
    places = {
        os.path.expanduser("~"): "the path of the home folder",
        constants.HF_HOME: "the path of the cache",
        constants.HF_HUB_CACHE: "the path of the cache",
        str(folder): "its own path",
        os.getcwd(): "the path of the working folder",
    }
    found = {}
    for place, what in places.items():
        for path in (Path(place).absolute(), Path(place).resolve()):
            if len(path.parts) > 2:  # one part, such as /root or /app, is the same on many machines
                for text in (str(path), path.as_posix(), json.dumps(str(path))[1:-1]):
                    found.setdefault(text, what)
    # The longest first: each is named once, by what says most of it.
    return {text: found[text] for text in sorted(found, key=len, reverse=True)}


def _ask_hub(staged: Path) -> None:
    """Ask the Hub whether it takes the metadata of the card, as it is asked with every commit. Nothing where it cannot be reached."""
    try:
        ModelCard((staged / "README.md").read_text(encoding="utf-8")).validate()
    except ValueError as error:
        raise ValueError(f"The Hub does not take the metadata of README.md: {error}") from error
    except Exception as error:  # of one of several HTTP libraries
        logger.info("The Hub was not asked about the metadata: %s", error)


def _check_remote_load(staged: Path) -> None:
    """Check that a process without `echoatt_hf` can load the model and the tokenizer, and gets the logits of this one."""
    config = AutoConfig.from_pretrained(staged)
    auto_class = USES[config.architectures[0]][1]
    input_ids = torch.randint(config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    try:
        model = getattr(transformers, auto_class).from_pretrained(staged, dtype="auto").eval()
    except Exception as error:  # of the many ways in which a folder can be damaged
        raise ValueError(
            f"The folder does not load ({type(error).__name__}: {' '.join(str(error).split())})."
        ) from error
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
    error = relative_error(found, expected)
    if not error <= 1e-3:  # NaN is refused too
        raise ValueError(
            f"Loaded where echoatt_hf is not installed the model gives other outputs, by {error:.1%}: save it anew "
            "with this version, and report it if that does not help."
        )


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
    with _one_line_errors(repo_id, revision, api.token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main") and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.model_info(repo_id, revision=revision)
        if private and not there.private:
            raise ValueError("it is there already, and public: make it private on the Hub, or push to another")
        files = _files_of(staged)
        weights = filter_repo_objects(api.list_repo_files(repo_id, revision=there.sha), allow_patterns=_WEIGHTS)
        # Not `upload_folder`, which divides what takes longer than some minutes into several commits: a half-sent model.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in files.items()),
                *(CommitOperationDelete(name) for name in weights if name not in files),
            ],
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            # Of two pushes at once the second one fails, and is not mixed with the first.
            parent_commit=there.sha,
        )


@contextmanager
def _one_line_errors(repo_id: str, revision: str | None = None, token: str | None = None) -> Iterator[None]:
    """What the client raises, an error of one of several HTTP libraries among it, as an `OSError` of one line."""
    try:
        yield
    except Exception as error:
        reason = explain_hub_error(error, repo_id, revision, token)
        reason = reason or " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
        raise OSError(
            f"The push to {repo_id!r} failed and has published nothing, and can be repeated: {reason}"
        ) from error
