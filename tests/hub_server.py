"""
A server that speaks as much of the Hub's protocol as publishing and loading a model needs, on the loopback.

What it answers follows the requests that the huggingface_hub client makes and the headers it reads. Large files go by the
basic LFS transfer; the chunk store of Xet is left out, so clients run with `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "alice"
TOKEN = "hf_" + "t" * 34
RELATIONS = ("adapter", "merge", "quantized", "finetune")
LFS_SUFFIXES = (".safetensors", ".png", ".bin")


@dataclass(frozen=True)
class File:
    """A file of a commit. `sha256` is that of its content if it is a large one."""

    content: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's name of the file, of the pointer to it if it is a large one."""
        content = self.content
        if self.is_large:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n".encode()
            )
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def describe(self, path: str) -> dict:
        large = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}} if self.is_large else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id, **large}


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    """Commits, and the branches and pull requests that point to them."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        attributes = "\n".join(f"*{suffix} filter=lfs" for suffix in LFS_SUFFIXES).encode()
        self.commit("main", "initial commit", {".gitattributes": File(attributes, False)})

    def commit(self, ref: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.refs.get(ref)
        facts = [parent, title, sorted((path, file.blob_id) for path, file in files.items()), len(self.commits)]
        oid = hashlib.sha1(json.dumps(facts).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files)
        self.refs[ref] = oid
        return self.commits[oid]

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def history(self, revision: str = "main") -> list[str]:
        """Titles of the commits of a revision, the first one first."""
        titles, commit = [], self.find(revision)
        while commit is not None:
            titles.append(commit.title)
            commit = self.commits.get(commit.parent)
        return titles[::-1]


class HubError(Exception):
    """What the client reads of an answer that is no success: status, `X-Error-Code` and `X-Error-Message`."""

    def __init__(self, status: int, code: str = "", message: str = "", **body):
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


class HubServer:
    """
    The server, running in threads of its own within `with`.

    Attributes:
        repositories (`dict[str, Repository]`): by name, such as `"alice/student"`.
        large_files (`dict[str, bytes]`): content by sha256, also of what was uploaded and never committed.
        requests (`list[str]`): method and path of every request so far.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._uploads, self._interrupted, self._then = 0, None, lambda: None

    def __enter__(self) -> "HubServer":
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn_url = f"http://localhost:{self._server.server_port}"  # to the client another host
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def interrupt_upload(self, number: int, then: Callable[[], None] = lambda: None) -> None:
        """Read half of the `number`-th upload of a large file from now on, call `then`, and drop the connection."""
        self._uploads, self._interrupted, self._then = 0, number, then

    def is_interrupted(self) -> bool:
        with self.lock:
            self._uploads += 1
            return self._uploads == self._interrupted

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a client process with a cache of its own that takes this server for the Hub."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        mine |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }
        return mine if token is None else mine | {"HF_TOKEN": token}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        split = urlsplit(self.path)
        self.hub, self.query = self.server_hub, parse_qs(split.query)
        path = split.path
        self.hub.requests.append(f"{self.command} {unquote(path)}")
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, name in _ROUTES:
                found = re.fullmatch(pattern, path)
                if verb == method and found:
                    getattr(self, name)(*(unquote(part or "") for part in found.groups()))
                    return
            raise HubError(404, message=f"no such route: {self.command} {path}")
        except HubError as error:
            self._body_read_to_its_end()
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self._send(error.status, {"error": error.message, **error.body}, {k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    # Reading and writing.

    def _body_read_to_its_end(self) -> bytes:
        if not hasattr(self, "_read"):
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                self._read = b"".join(parts)
            else:
                self._read = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self._read

    def handle_one_request(self) -> None:
        self.__dict__.pop("_read", None)  # one handler serves all requests of a connection
        super().handle_one_request()

    def _json(self):
        return json.loads(self._body_read_to_its_end() or b"{}")

    def _send(self, status: int, body: dict | list | bytes = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who asks for what.

    def _is_user(self) -> bool:
        given = self.headers.get("Authorization")
        if given is None:
            return False
        if given != f"Bearer {TOKEN}":
            raise HubError(401, message="Invalid credentials in Authorization header")
        return True

    def _require_user(self) -> None:
        if not self._is_user():
            raise HubError(401, message="Invalid username or password.")

    def _repository(self, name: str, to_write: bool = False) -> Repository:
        is_user, repository = self._is_user(), self.hub.repositories.get(name)
        if repository is None or (repository.private and not is_user):
            raise HubError(404 if is_user else 401, "RepoNotFound", "Repository not found")
        if to_write:
            self._require_user()
            if not name.startswith(f"{USER}/") and not self.query.get("create_pr"):
                raise HubError(403, message="Forbidden: you must use a write token to upload to a repository.")
        return repository

    def _commit_of(self, name: str, revision: str) -> Commit:
        commit = self._repository(name).find(revision)
        if commit is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Accounts and repositories.

    def whoami(self) -> None:
        self._require_user()
        token = {"displayName": "test", "role": "write"}
        self._send(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": token}})

    def create_repository(self) -> None:
        self._require_user()
        asked = self._json()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not name.startswith(f"{USER}/"):
            raise HubError(403, message=f"You don't have the rights to create a model under {name.split('/')[0]!r}")
        with self.hub.lock:
            if name in self.hub.repositories:
                raise HubError(409, message="You already created this model repo", url=f"{self.hub.url}/{name}")
            is_private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories[name] = Repository(is_private)
        self._send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def validate_yaml(self) -> None:
        content = self._json()["content"]
        found, errors, warnings = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL), [], []
        try:
            data = (yaml.safe_load(found.group(1)) or {}) if found else {}
        except yaml.YAMLError as error:
            data, errors = {}, [f"YAML is invalid: {error}"]
        if not found:
            warnings.append("empty or missing yaml metadata in repo card")
        bases = data.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                errors.append(f'"base_model" with value {base!r} is not valid. Use a model id from the Hub.')
        if data.get("base_model_relation", "finetune") not in RELATIONS:
            errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
        if not isinstance(data.get("license", ""), str):
            errors.append('"license" must be a string')
        for model in data.get("model-index") or []:
            for result in model["results"]:
                if {"task", "dataset", "metrics"} - set(result) or "type" not in result["dataset"]:
                    errors.append('"model-index" is not valid')
        answer = {name: [{"message": text} for text in texts] for name, texts in (("errors", errors), ("warnings", warnings))}  # fmt: skip
        self._send(400 if errors else 200, answer)

    def model_info(self, name: str, revision: str) -> None:
        commit, repository = self._commit_of(name, revision or "main"), self._repository(name)
        readme = commit.files.get("README.md", File(b"", False)).content.decode()
        found = re.match(r"---\n(.*?)\n---\n", readme, re.DOTALL)
        card = yaml.safe_load(found.group(1)) if found else {}
        info = {
            "_id": "0" * 24,
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": commit.oid,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "pipeline_tag": card.get("pipeline_tag"),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            "createdAt": "2026-01-01T00:00:00.000Z",
            "lastModified": "2026-01-01T00:00:00.000Z",
        }
        self._send(200, info)

    def refs(self, name: str) -> None:
        repository = self._repository(name)
        kinds = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for ref, oid in repository.refs.items():
            is_request = ref.startswith("refs/pr/")
            full = ref if is_request else f"refs/heads/{ref}"
            kinds["pullRequests" if is_request else "branches"].append({"name": ref, "ref": full, "targetCommit": oid})
        self._send(200, kinds)

    def create_branch(self, name: str, branch: str) -> None:
        repository = self._repository(name, to_write=True)
        with self.hub.lock:
            if branch in repository.refs:
                raise HubError(409, message=f"Reference already exists: refs/heads/{branch}")
            repository.refs[branch] = self._commit_of(name, self._json().get("startingPoint", "main")).oid
        self._send(200, {})

    # Upload.

    def preupload(self, name: str, revision: str) -> None:
        self._repository(name, to_write=True)
        commit = self._commit_of(name, revision)
        files = []
        for asked in self._json()["files"]:
            path, there = asked["path"], commit.files.get(asked["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or asked["size"] > 10_000_000 else "regular"
            entry = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            files.append(entry | ({"oid": there.sha256 if there.is_large else there.blob_id} if there else {}))
        self._send(200, {"files": files})

    def lfs_batch(self, name: str) -> None:
        self._repository(name)
        self._require_user()
        asked, objects = self._json(), []
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        for item in asked["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs/{item['oid']}/verify"},
            }
            objects.append(item if item["oid"] in self.hub.large_files else item | {"actions": actions})
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if self.hub.is_interrupted():
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.hub._then()
            self.close_connection = True
            self.connection.close()
            return
        content = self._body_read_to_its_end()
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, message="the content does not have the sha256 that was announced")
        self.hub.large_files[oid] = content
        self._send(200)

    def verify(self, oid: str) -> None:
        if len(self.hub.large_files.get(oid, b"")) != self._json()["size"]:
            raise HubError(404, message="the object was not uploaded")
        self._send(200, {})

    def commit(self, name: str, revision: str) -> None:
        repository = self._repository(name, to_write=True)
        lines = [json.loads(line) for line in self._body_read_to_its_end().splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            commit = self._commit_of(name, revision)
            if header.get("parentCommit", commit.oid) != commit.oid:
                raise HubError(412, message="A commit has happened since. Please refresh and try again.")
            files = dict(commit.files)
            for line in lines:
                self._apply(files, line["key"], line["value"])
            answer = {}
            if self.query.get("create_pr"):
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
                revision = f"refs/pr/{number}"
                repository.refs[revision] = commit.oid
                answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
            made = repository.commit(revision, header["summary"], files)
        self._send(200, {"success": True, "commitOid": made.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}", **answer})  # fmt: skip

    def _apply(self, files: dict[str, File], key: str, value: dict) -> None:
        if key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large_files:
                raise HubError(400, message=f"LFS pointer of {value['path']} points to a file that does not exist")
            files[value["path"]] = File(self.hub.large_files[value["oid"]], True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
        elif key != "header":
            raise HubError(400, message=f"unknown operation {key!r}")

    # Reading.

    def tree(self, name: str, revision: str, folder: str) -> None:
        commit, prefix = self._commit_of(name, revision), f"{folder}/" if folder else ""
        inside = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        is_recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for path, file in sorted(inside.items()):
            first, _, rest = path[len(prefix) :].partition("/")
            if rest and not is_recursive:
                path = prefix + first
                entries[path] = {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
            else:
                entries[path] = file.describe(path)
        self._send(200, [*entries.values()])

    def paths_info(self, name: str, revision: str) -> None:
        commit = self._commit_of(name, revision)
        body = self._body_read_to_its_end().decode()
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body)["paths"]
        self._send(200, [commit.files[path].describe(path) for path in paths if path in commit.files])

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit_of(name, revision)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if file.is_large:  # which are on another host: the client must not follow while it asks for the facts
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            self._send(302, b"", headers | {"Location": f"{self.hub.cdn_url}/cdn/{file.sha256}"})
        else:
            self._send(200, file.content, headers | {"ETag": f'"{file.blob_id}"'})

    def cdn(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise HubError(400, message="the token of the Hub was sent to another host")
        content = self.hub.large_files[oid]
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found:
            start, stop = int(found.group(1)), int(found.group(2) or len(content) - 1) + 1
            bounds = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            self._send(206, content[start:stop], bounds)
        else:
            self._send(200, content, {"ETag": f'"{oid}"'})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repository"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{_NAME}(?:/revision/([^/]+))?", "model_info"),
    ("GET", rf"/api/models/{_NAME}/refs", "refs"),
    ("POST", rf"/api/models/{_NAME}/branch/([^/]+)", "create_branch"),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", "commit"),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)(?:/(.+))?", "tree"),
    ("POST", rf"/api/models/{_NAME}/paths-info/([^/]+)", "paths_info"),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(\w+)", "upload"),
    ("POST", r"/lfs/(\w+)/verify", "verify"),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
    ("GET", r"/cdn/(\w+)", "cdn"),
]
