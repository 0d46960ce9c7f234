"""A small Hub on loopback: what huggingface_hub asks of the real one when it creates, pushes and loads model repos.

Repos, commits and large files are kept in memory. Large files go through the LFS protocol (batch, PUT, verify); a
commit is applied whole or refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml  # type: ignore[import-untyped]

LFS_SUFFIXES = (".safetensors", ".gguf", ".png")


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, str]
    """Path to the key of its content."""
    lfs: set[str]


@dataclass
class Repo:
    name: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    """Users who were granted access to a gated repo."""
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def commit(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def add(self, branch: str, message: str, files: dict[str, str], lfs: set[str]) -> Commit:
        parent = self.branches.get(branch, "")
        seed = f"{self.name}{parent}{message}{sorted(files.items())}{len(self.commits)}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), message, files, lfs)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit


class Hub:
    """The server and what it holds.

    Attributes:
        users: `{token: user name}`; a token that is not in it is refused.
        requests: `(method, path)` of every request, in order.
        uploads: key of every large file that was received whole, in order.
        drop_uploads: of so many large uploads to come the connection is closed when half of the bytes are in.
    """

    def __init__(self) -> None:
        self.users = {"token-of-me": "me", "token-of-you": "you"}
        self.repos: dict[str, Repo] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.drop_uploads = 0
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def start(self) -> Hub:
        self.thread.start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def create(self, name: str, private: bool = False, gated: bool = False) -> Repo:
        repo = Repo(name, private, gated)
        key = self.keep(b"*.safetensors filter=lfs\n")
        repo.add("main", "initial commit", {".gitattributes": key}, set())
        self.repos[name] = repo
        return repo

    def keep(self, content: bytes) -> str:
        key = hashlib.sha256(content).hexdigest()
        self.contents[key] = content
        return key

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repos[name].commit(revision)
        assert commit is not None
        return {path: self.contents[key] for path, key in commit.files.items()}

    def messages(self, name: str) -> list[str]:
        return [commit.message for commit in self.repos[name].commits.values()]


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        try:
            for method, pattern, handle in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    handle(self, *match.groups())
                    return
            raise _Refused(404, f"no such endpoint: {self.command} {path}")
        except _Refused as refused:
            self.body_read()
            self.reply({"error": str(refused)}, refused.status, refused.code, str(refused))

    # What the handlers need

    def body_read(self) -> bytes:
        body = self.__dict__.pop("body", None)
        if body is None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                body = b"".join(parts)
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "Content-Length" in self.headers:
            self.headers.replace_header("Content-Length", "0")  # read once
        return body

    def json(self) -> Any:
        return json.loads(self.body_read() or b"{}")

    def reply(self, data: Any, status: int = 200, code: str = "", message: str = "") -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def user(self, required: bool = False) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise _Refused(401, "Invalid credentials in Authorization header")
        if required and not token:
            raise _Refused(401, "Invalid username or password.")
        return self.hub.users.get(token)

    def repo(self, name: str, content: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(name)
        if repo is None or (repo.private and repo.owner != user):
            raise _Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if content and repo.gated and user != repo.owner and user not in repo.readers:
            raise _Refused(
                401 if user is None else 403, f"Access to model {name} is restricted.", "GatedRepo"
            )
        return repo

    def writable(self, name: str) -> Repo:
        user = self.user(required=True)
        repo = self.repo(name)
        if user != repo.owner:
            raise _Refused(403, f"you do not have write access to {name}")
        return repo

    def revision(self, repo: Repo, revision: str) -> Commit:
        commit = repo.commit(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def git_oid(self, commit: Commit, path: str) -> str:
        content = self.hub.contents[commit.files[path]]
        if path in commit.lfs:
            return commit.files[path]
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    # The endpoints

    def whoami(self) -> None:
        name = self.user(required=True)
        self.reply({"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        wanted = self.json()
        user = self.user(required=True)
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        if owner != user:
            raise _Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        with self.hub.lock:
            if name in self.hub.repos:
                self.reply(
                    {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409
                )
                return
            self.hub.create(name, private=wanted.get("visibility") == "private")
        self.reply({"url": f"{self.hub.url}/{name}", "name": name})

    def validate_yaml(self) -> None:
        asked = self.json()
        head = re.match(r"---\r?\n(.*?)\r?\n---", asked["content"], flags=re.S)
        errors = []
        data = yaml.safe_load(head[1]) if head else {}
        for index in data.get("model-index") or []:
            for result in index.get("results") or []:
                if not result.get("task", {}).get("type"):
                    errors.append({"message": '"model-index[0].results[0].task.type" is required'})
                for metric in result.get("metrics") or [{}]:
                    if not isinstance(metric.get("value"), (int, float)) or "type" not in metric:
                        errors.append({"message": f"a metric needs a type and a value: {metric}"})
        if data.get("base_model_relation") not in (None, "quantized", "finetune", "adapter", "merge"):
            errors.append(
                {"message": '"base_model_relation" must be one of quantized, finetune, adapter, merge'}
            )
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, name: str, revision: str = "main") -> None:
        repo = self.repo(name)
        commit = self.revision(repo, revision)
        card = self.hub.contents.get(commit.files.get("README.md", ""), b"").decode()
        head = re.match(r"---\r?\n(.*?)\r?\n---", card, flags=re.S)
        data = yaml.safe_load(head[1]) if head else {}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.reply(
            {
                "_id": name,
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "tags": data.get("tags") or [],
                "cardData": data,
                "siblings": siblings,
            }
        )

    def tree(self, name: str, revision: str) -> None:
        commit = self.revision(self.repo(name, content=True), revision)
        entries = []
        for path, key in sorted(commit.files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.hub.contents[key])}
            entry["oid"] = self.git_oid(commit, path)
            if path in commit.lfs:
                entry["lfs"] = {"oid": key, "size": entry["size"], "pointerSize": 134}
            entries.append(entry)
        self.reply(entries)

    def refs(self, name: str) -> None:
        repo = self.repo(name)
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid}
            for branch, oid in repo.branches.items()
        ]
        self.reply({"branches": branches, "tags": [], "converts": []})

    def branch(self, name: str, branch: str) -> None:
        repo = self.writable(name)
        start = self.json().get("startingPoint", "main")
        if branch in repo.branches:
            raise _Refused(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = self.revision(repo, start).oid
        self.reply({})

    def preupload(self, name: str, revision: str) -> None:
        commit = self.revision(self.writable(name), revision)
        files = []
        for file in self.json()["files"]:
            path = file["path"]
            large = path.endswith(LFS_SUFFIXES)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in commit.files:
                answer["oid"] = self.git_oid(commit, path)
            files.append(answer)
        self.reply({"files": files})

    def lfs_batch(self, name: str) -> None:
        self.writable(name)
        objects: list[dict[str, Any]] = []
        for wanted in self.json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.hub.contents:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/{wanted['oid']}/verify"},
                }
            objects.append(answer)
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        with self.hub.lock:
            drop = self.hub.drop_uploads > 0
            self.hub.drop_uploads -= drop
        if drop:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            self.connection.close()
            return
        content = self.body_read()
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(400, "the content does not have the hash that was announced")
        with self.hub.lock:
            self.hub.keep(content)
            self.hub.uploads.append(oid)
        self.reply({})

    def lfs_verify(self, oid: str) -> None:
        self.user(required=True)
        size = self.json()["size"]
        if len(self.hub.contents.get(oid, b"")) != size:
            raise _Refused(404, "the object is not here in full")
        self.reply({})

    def commit(self, name: str, branch: str) -> None:
        repo = self.writable(name)
        lines = [json.loads(line) for line in self.body_read().splitlines() if line]
        with self.hub.lock:
            parent = self.revision(repo, branch)
            files, lfs, message = dict(parent.files), set(parent.lfs), ""
            for line in lines:
                value = line["value"]
                match line["key"]:
                    case "header":
                        message = value["summary"]
                        if value.get("parentCommit") not in (None, parent.oid):
                            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
                    case "file":
                        files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
                        lfs.discard(value["path"])
                    case "lfsFile":
                        if value["oid"] not in self.hub.contents:
                            raise _Refused(
                                400, f"LFS object {value['oid']} of {value['path']} was not uploaded"
                            )
                        files[value["path"]] = value["oid"]
                        lfs.add(value["path"])
                    case "deletedFile":
                        if value["path"] not in files:
                            raise _Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                        del files[value["path"]]
                        lfs.discard(value["path"])
                    case other:
                        raise _Refused(400, f"unknown operation {other}")
            made = repo.add(branch, message, files, lfs)
        self.reply(
            {"success": True, "commitOid": made.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}"}
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.revision(self.repo(name, content=True), revision)
        if path not in commit.files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        content = self.hub.contents[commit.files[path]]
        start, end = 0, len(content)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), min(end, int(wanted[2] or end) + 1)
        part = content[start:end]
        self.send_response(206 if len(part) < len(content) else 200)
        self.send_header("ETag", f'"{self.git_oid(commit, path)}"')
        self.send_header("X-Repo-Commit", commit.oid)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if len(part) < len(content):
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{NAME}", _Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)/?", _Handler.tree),
    ("GET", rf"/api/models/{NAME}/refs", _Handler.refs),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", _Handler.lfs_put),
    ("POST", r"/lfs/(\w+)/verify", _Handler.lfs_verify),
    ("HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
