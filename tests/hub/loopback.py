"""A small Hugging Face Hub on loopback: the part of its protocol that `huggingface_hub` needs for models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def _object_id(path: str, content: bytes) -> str:
    """What git calls a file: the SHA-256 of one in large-file storage, or the hash of a blob."""
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    Args:
        pattern: Regular expression for ``METHOD path``.
        status: Answer this instead; 0 to break the connection.
        after: Bytes of the body that pass before the connection breaks: of the answer, or of the request where
            `of_request`.
        done: Do what was asked before the connection breaks, so that only the answer is lost.
        reset: Break it with a reset; otherwise close it in good order, but without an answer.
        times: How many requests.
    """

    pattern: str
    status: int = 0
    after: int = 0
    of_request: bool = False
    done: bool = False
    reset: bool = True
    times: int = 1


@dataclass
class Repository:
    """Branch name to commits, newest last; a commit is (id, message, path to content)."""

    private: bool = False
    gated: bool = False
    branches: dict[str, list[tuple[str, str, dict[str, bytes]]]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        history = self.branches.setdefault(branch, [])
        content = {**(history[-1][2] if history else {}), **files}
        parts = [
            branch,
            message,
            str(len(history)),
            *(f"{p}{hashlib.sha1(d).hexdigest()}" for p, d in content.items()),
        ]
        history.append((hashlib.sha1("".join(parts).encode()).hexdigest(), message, content))
        return history[-1][0]

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for name, history in self.branches.items():
            for commit, _, content in reversed(history):
                if revision in (name, commit):
                    return commit, content
        return None


class LoopbackHub:
    """Server and state.

    `user` owns `token`; `requests` lists what was asked, as ``METHOD path``; `faults` says what goes wrong.
    `before_commit` is called with the repository's id when a commit arrives, before it is looked at.
    """

    def __init__(self, *, user: str = "me", token: str = "hf_secretsecretsecret") -> None:
        self.user = user
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.faults: list[Fault] = []
        self.before_commit: Callable[[str], None] = lambda repo_id: None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = f"http://localhost:{self._server.server_port}"  # another host, as the Hub's own storage is
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route(
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            (r"/api/models/([^/]+/[^/]+)", self._info),
            (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/storage/(\w+)", self._fetch),
        )

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._route(
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda: self._json(200, {"errors": [], "warnings": []})),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
        )

    def do_PUT(self) -> None:
        self._route((r"/storage/(\w+)", self._store))

    def _route(self, *routes: tuple[str, Callable[..., None]]) -> None:
        path = urlsplit(self.path).path
        request = f"{self.command} {unquote(path)}"
        self.hub.requests.append(request)
        self.fault = self._fault(request)
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault and self.fault.of_request:
            self.rfile.read(min(self.fault.after, length))
            return self._break_off()
        self.body = self.rfile.read(length)
        if self.fault and self.fault.status:
            return self._json(self.fault.status, {"error": "the Hub is having a bad day"})
        for pattern, handle in routes:
            if match := re.fullmatch(pattern, path):
                return handle(*map(unquote, match.groups()))
        return self._json(404, {"error": f"no route for {path}"})

    def _fault(self, request: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None

    def _break_off(self) -> None:
        """Close the connection without an answer, by default with a reset, whatever is still on its way."""
        self.close_connection = True
        if self.fault and not self.fault.reset:
            return
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    @property
    def _is_logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _repository(self, repo_id: str, *, write: bool = False) -> Repository | None:
        """The repository, or None after an answer that refuses it."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self._is_logged_in):
            self._error(404 if self._is_logged_in else 401, "RepoNotFound", "Repository not found")
            return None
        if repository.gated and not self._is_logged_in:
            self._error(403, "GatedRepo", "Access to this repository is gated")
            return None
        if write and not self._is_logged_in:
            self._error(403, "", "Forbidden: you have no write access")
            return None
        return repository

    def _create(self) -> None:
        if not self._is_logged_in:
            return self._error(401, "", "Invalid username or password.")
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        if not repo_id.startswith(f"{self.hub.user}/"):
            return self._error(403, "", f"You have no rights in the namespace {wanted['organization']}")
        exists = repo_id in self.hub.repositories
        if not exists:
            private = wanted.get("private") is True or wanted.get("visibility") == "private"
            self.hub.repositories[repo_id] = Repository(private=private)
            self.hub.repositories[repo_id].commit("main", "initial commit", {".gitattributes": b""})
        return self._json(409 if exists else 200, {"url": f"{self.hub.url}/{repo_id}"})

    def _branch(self, repo_id: str, branch: str) -> None:
        if repository := self._repository(repo_id, write=True):
            exists = branch in repository.branches
            if not exists:
                repository.branches[branch] = list(repository.branches["main"])
            self._json(409 if exists else 200, {})

    def _preupload(self, repo_id: str, revision: str) -> None:
        if repository := self._repository(repo_id, write=True):
            if repository.find(revision) is None:
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            present = repository.find(revision)[1]
            modes = [
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": _object_id(path, present[path]) if path in present else None,
                }
                for path in paths
            ]
            self._json(200, {"files": modes})
        return None

    def _batch(self, repo_id: str) -> None:
        if self._repository(repo_id, write=True):
            objects = [
                wanted | {"actions": {"upload": {"href": f"{self.hub.storage_url}/storage/{wanted['oid']}"}}}
                for wanted in json.loads(self.body)["objects"]
            ]
            self._json(200, {"transfer": "basic", "objects": objects})

    def _fetch(self, oid: str) -> None:
        if self.headers.get("Authorization"):  # signed addresses of a storage refuse a second credential
            return self._json(400, {"error": "only one authentication mechanism is allowed"})
        return self._send_range(self.hub.large_files[oid], {})

    def _store(self, oid: str) -> None:
        matches = hashlib.sha256(self.body).hexdigest() == oid
        if matches:
            self.hub.large_files[oid] = self.body
        self._json(200 if matches else 400, {})

    def _commit(self, repo_id: str, revision: str) -> None:
        if repository := self._repository(repo_id, write=True):
            lines = [json.loads(line) for line in self.body.splitlines()]
            self.hub.before_commit(repo_id)
            parent = lines[0]["value"].get("parentCommit")
            if parent not in (None, repository.branches[revision][-1][0]):
                return self._error(412, "", "The branch has moved on: parentCommit is not its last commit")
            files = {}
            for line in lines[1:]:
                value = line["value"]
                files[value["path"]] = (
                    self.hub.large_files[value["oid"]]
                    if line["key"] == "lfsFile"
                    else base64.b64decode(value["content"])
                )
            if "create_pr=1" in urlsplit(self.path).query:
                number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
                repository.branches[revision := f"refs/pr/{number}"] = list(repository.branches["main"])
            commit = repository.commit(revision, lines[0]["value"]["summary"], files)
            answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}"}
            if revision.startswith("refs/pr/"):
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{revision.rpartition('/')[2]}"
            self._json(200, answer)
        return None

    def _info(self, repo_id: str, revision: str = "main") -> None:
        if found := self._found(repo_id, revision):
            commit, content = found
            siblings = [{"rfilename": path} for path in content]
            private = self.hub.repositories[repo_id].private
            self._json(200, {"id": repo_id, "sha": commit, "private": private, "siblings": siblings})

    def _tree(self, repo_id: str, revision: str) -> None:
        if found := self._found(repo_id, revision):
            content = found[1].items()
            self._json(200, [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in content])

    def _found(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision, or None after an answer that refuses it."""
        repository = self._repository(repo_id)
        if repository is None:
            return None
        found = repository.find(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self._found(repo_id, revision)
        if found is None:
            return None
        commit, content = found
        headers = {"X-Repo-Commit": commit}
        if path not in content:
            return self._error(404, "EntryNotFound", "Entry not found", headers)
        digest = hashlib.sha256(content[path]).hexdigest()
        if digest not in self.hub.large_files:
            return self._send_range(content[path], headers | {"ETag": f'"{hashlib.sha1(content[path]).hexdigest()}"'})
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content[path]))}
        return self._send(302, b"", headers | {"Location": f"{self.hub.storage_url}/storage/{digest}"})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        codes = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._json(status, {"error": message}, codes | (headers or {}))

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send_range(self, body: bytes, headers: dict[str, str]) -> None:
        """Send a file, or what is left of it after the bytes that the client has."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None:
            return self._send(200, body, headers)
        self.hub.ranges.append(asked.group())
        start = int(asked[1])
        return self._send(206, body[start:], headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if self.fault and self.fault.done:
            return self._break_off()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.fault and not self.fault.status:
            self.wfile.write(body[: self.fault.after])
            self.close_connection = True
            return None
        self.wfile.write(body)
        return None

    def log_message(self, *_: object) -> None:
        """Say nothing."""
