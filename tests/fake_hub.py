"""A Hub on loopback: the HTTP interface that huggingface_hub uploads to and downloads from; it fails where a test asks.

Large files come by Git LFS, which the Hub keeps for clients without Xet (HF_HUB_DISABLE_XET=1), or by Xet into a
folder: the client's own ``local://`` store. What a file of that store holds, only the client can read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_aSecretThatNobodyMayEverSee"
USER = {
    "type": "user",
    "name": "ada",
    "orgs": [{"name": "engines", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}],
    "auth": {"type": "access_token", "accessToken": {"displayName": "laptop", "role": "write"}},
}


@dataclass
class Repository:
    """Branches lead to commits, commits hold files; a commit's id is a hash of its number."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class FakeHub(ThreadingHTTPServer):
    """A server and what it has.

    fails       "METHOD /path" expressions, and the status that they end in, or None to hang up
    store       the folder of Xet's files, which the client writes and reads; ``xet`` maps their SHA-256 to Xet's hash
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.user: dict[str, Any] = json.loads(json.dumps(USER))
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.store: Path | None = None
        self.xet: dict[str, str] = {}
        self.fails: dict[str, int | None] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def add(self, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repository:
        """A repository as the Hub makes it, with its .gitattributes, and ``files``."""
        repository = self.repositories[name] = Repository(private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repository.commit("main", {".gitattributes": attributes, **(files or {})})
        return repository


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        path = urlsplit(self.path).path  # still quoted: a branch may have a slash in its name
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        asked = f"{self.command} {path}"
        with self.server.lock:
            self.server.requests.append(asked)
            failing = [status for pattern, status in self.server.fails.items() if re.fullmatch(pattern, asked)]
            try:
                if failing and failing[0] is None:
                    self.close_connection = True
                    return
                if failing:
                    raise Refusal(failing[0], "as the test asked")
                self._answer(*self._route(asked, body))
            except Refusal as refusal:
                headers = {"X-Error-Message": refusal.message}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self._answer(refusal.status, {"error": refusal.message, **refusal.body}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _route(self, asked: str, body: bytes) -> tuple[Any, ...]:
        routes: list[tuple[str, Callable[..., Any]]] = [
            (r"GET /api/whoami-v2", self.whoami),
            (r"POST /api/repos/create", self.create),
            (r"POST /api/validate-yaml", self.validate),
            (r"GET /api/models/([^/]+/[^/]+)", self.info),
            (r"GET /api/models/([^/]+/[^/]+)/revision/(.+)", self.info),
            (r"GET /api/models/([^/]+/[^/]+)/auth-check/write", self.auth_check),
            (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
            (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"GET /api/models/([^/]+/[^/]+)/xet-(?:read|write)-token/(.+)", self.xet_token),
            (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"PUT /lfs/(\w+)", self.put),
            (r"POST /lfs/verify", self.verify),
            (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for pattern, method in routes:
            if match := re.fullmatch(pattern, asked):
                groups = [unquote(group) for group in match.groups()]
                found = method(*groups, **({"body": body} if asked.startswith(("POST", "PUT")) else {}))
                return found if isinstance(found, tuple) else (200, found)
        raise Refusal(404, f"no such page: {asked}")

    def _signed_in(self) -> None:
        if not self.known:
            raise Refusal(401, "Invalid credentials in Authorization header")

    def _repository(self, name: str, write: bool = False) -> Repository:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.known):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self._signed_in()
            if not self._writes(name):
                raise Refusal(403, "Forbidden: you must be in a role that writes")
        return repository

    def _writes(self, name: str) -> bool:
        user = self.server.user
        orgs = [org["name"] for org in user["orgs"] if org["roleInOrg"] == "write"]
        return name.split("/")[0] in (user["name"], *orgs) and user["auth"]["accessToken"]["role"] == "write"

    def whoami(self) -> Any:
        self._signed_in()
        return self.server.user

    def create(self, body: bytes) -> Any:
        self._signed_in()
        asked = json.loads(body)
        name = f"{asked['organization'] or self.server.user['name']}/{asked['name']}"
        if not self._writes(name):
            raise Refusal(403, "You don't have the rights to create a model under this namespace")
        url = f"{self.server.address}/{name}"
        if name in self.server.repositories:
            raise Refusal(409, "You already created this model repo", url=url)
        self.server.add(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": url, "name": name}

    def validate(self, body: bytes) -> Any:
        """Some of what the Hub wants of a model card's front matter."""
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = []
        try:
            stated = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            stated, errors = None, [str(error)]
        if isinstance(stated, dict):
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", stated.get("base_model", "a/b")):
                errors.append('"base_model" is not a valid model id')
            for index in stated.get("model-index", []):
                for result in index["results"]:
                    if not all(part.get("type") for part in (result["task"], result["dataset"], *result["metrics"])):
                        errors.append('"model-index" lacks a type')
        elif not errors:
            errors.append("no metadata")
        if errors:
            raise Refusal(400, "invalid", errors=[{"message": error} for error in errors], warnings=[])
        return {"errors": [], "warnings": []}

    def info(self, name: str, revision: str = "main") -> Any:
        repository = self._repository(name)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        return {"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings}

    def auth_check(self, name: str) -> Any:
        self._repository(name, write=True)
        return {}

    def tree(self, name: str, revision: str) -> Any:
        return [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
                **({"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 130}} if large(path) else {}),
                **({"xetHash": self.server.xet[sha256(content)]} if sha256(content) in self.server.xet else {}),
            }
            for path, content in self._repository(name).files(revision).items()
        ]

    def branch(self, name: str, branch: str, body: bytes) -> Any:
        repository = self._repository(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def preupload(self, name: str, revision: str, body: bytes) -> Any:
        there = self._repository(name, write=True).files(revision)
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if large(path) else "regular" for path in files}
        oids = {path: None if path not in there else oid(path, there[path]) for path in files}
        return {
            "files": [
                {"path": path, "uploadMode": modes[path], "shouldIgnore": False, "oid": oids[path]} for path in files
            ]
        }

    def xet_token(self, name: str, revision: str) -> Any:
        self._repository(name)
        found = {"casUrl": f"local://{self.server.store}", "exp": 2**40, "accessToken": "xet"}
        names = {"casUrl": "X-Xet-Cas-Url", "exp": "X-Xet-Token-Expiration", "accessToken": "X-Xet-Access-Token"}
        return 200, found, {names[key]: str(value) for key, value in found.items()}

    def batch(self, name: str, body: bytes) -> Any:
        self._repository(name, write=True)
        objects = []
        for each in json.loads(body)["objects"]:
            found = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.server.objects:
                upload = {"href": f"{self.server.address}/lfs/{each['oid']}"}
                found["actions"] = {"upload": upload, "verify": {"href": f"{self.server.address}/lfs/verify"}}
            objects.append(found)
        return {"transfer": "basic", "objects": objects}

    def put(self, oid: str, body: bytes) -> Any:
        if sha256(body) != oid:
            raise Refusal(400, "other bytes than announced")
        self.server.objects[oid] = body
        return b""

    def verify(self, body: bytes) -> Any:
        asked = json.loads(body)
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "no such object")
        return {}

    def commit(self, name: str, branch: str, body: bytes) -> Any:
        repository = self._repository(name, write=True)
        files = dict(repository.files(branch))
        for line in body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif step["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(branch, files)
        return {"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha}

    def resolve(self, name: str, revision: str, path: str) -> Any:
        repository = self._repository(name)
        files = repository.files(revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        commit = repository.branches.get(revision, revision)
        return 200, files[path], {"X-Repo-Commit": commit, "ETag": f'"{oid(path, files[path])}"'}


def large(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf"))


def oid(path: str, content: bytes) -> str:
    """What the client compares with: git's hash of a small file, SHA-256 of a large one."""
    return sha256(content) if large(path) else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
