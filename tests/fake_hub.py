"""A hub on this machine: the few routes that huggingface_hub asks for a dataset, with faults on demand."""

import hashlib
import json
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import numpy as np

from golf.data.shards import shard_header

FAULTS = ("drop", "429", "500", "head 429", "head 500", "truncate", "empty", "wrong file", "flip", "slow")
LISTING = "the list of files"
"""Faults of this name hit questions about the repository."""


def shard_bytes(tokens) -> bytes:
    return shard_header(len(tokens)) + np.asarray(tokens, dtype="<u2").tobytes()


def random_shard(seed: int, tokens: int = 6000, vocab_size: int = 300) -> bytes:
    return shard_bytes(np.random.default_rng(seed).integers(4, vocab_size, tokens))


def flipped(data: bytes) -> bytes:
    place = len(data) // 2 & ~1  # the low byte of a token, which stays in the vocabulary, and not at an end of the file
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


class FakeHubServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients that leave are what the tests are about
            super().handle_error(request, client_address)


class FakeHub:
    """Serves `files` (bytes by path) as dataset `repo_id` at `url`; `hashes` False: the list of files has none."""

    def __init__(self, repo_id: str, files: dict[str, bytes], hashes: bool = True):
        self.repo_id, self.files, self.hashes = repo_id, files, hashes
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str]] = []
        self.history: dict[str, dict[str, bytes]] = {}
        self.pace = threading.Event()
        """Set, it lets slow answers go at once."""
        self.pause = 0.05
        self.server = FakeHubServer(("127.0.0.1", 0), FakeHubHandler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def commit(self) -> str:
        """Of the files as they are now, which can be had under it from now on."""
        digest = hashlib.sha1()
        for path, data in sorted(self.files.items()):
            digest.update(path.encode() + data)
        self.history[digest.hexdigest()] = dict(self.files)
        return digest.hexdigest()

    def resolve(self, revision: str) -> str:
        """The commit that a revision names; empty for none."""
        commit = self.commit
        return commit if revision == "main" else revision if revision in self.history else ""

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.pace.set()
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> list[str]:
        """Files that were asked for whole or in part."""
        return [path for method, path in self.requests if method == "GET" and path in self.files]

    def next_fault(self, path: str, head: bool = False) -> str:
        """The next of the faults that were set for `path`, those of the right method only."""
        waiting = self.faults[path]
        if waiting and waiting[0].startswith("head ") == head:
            return waiting.pop(0).removeprefix("head ")
        return ""

    def entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data) if self.hashes else ""}
        if self.hashes and is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith((".bin", ".model"))


class FakeHubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SimpleNamespace

    def log_message(self, *arguments) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, parts = self.server.hub, unquote(urlsplit(self.path).path).strip("/").split("/")
        head = self.command == "HEAD"
        if parts[:1] == ["api"]:
            hub.requests.append((self.command, LISTING))
            self.answer_question("/".join(parts[2:4]), parts[4:])
        elif parts[:1] == ["datasets"] and parts[3:4] == ["resolve"]:
            commit, path = hub.resolve(parts[4]), "/".join(parts[5:])
            hub.requests.append((self.command, path))
            if "/".join(parts[1:3]) != hub.repo_id or path not in hub.history.get(commit, {}):
                self.send_data(404, b"", {"X-Error-Code": "EntryNotFound"})
            else:
                self.send_file(commit, path, hub.next_fault(path, head))
        else:
            self.send_data(404, b"")

    def answer_question(self, repo_id: str, rest: list[str]) -> None:
        hub, fault = self.server.hub, self.server.hub.next_fault(LISTING)
        if fault:
            self.send_data(int(fault), b"")
        elif repo_id != hub.repo_id:
            self.send_data(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif not (commit := hub.resolve(rest[1])):
            self.send_data(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif rest[0] == "revision":
            self.send_data(200, json.dumps({"id": repo_id, "sha": commit}).encode())
        else:
            self.send_data(200, json.dumps([hub.entry(*item) for item in hub.history[commit].items()]).encode())

    def send_file(self, commit: str, path: str, fault: str) -> None:
        files = self.server.hub.history[commit]
        data = files[path]
        etag = hashlib.sha256(data).hexdigest() if is_large(path) else git_sha1(data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if is_large(path):
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if fault.isdigit():
            self.send_data(int(fault), b"", {"Retry-After": "0"} if fault == "429" else {})
            return
        if fault == "wrong file":
            others = [other for name, other in files.items() if len(other) == len(data) and name != path]
            data = others[0]
        data = {"truncate": data[: len(data) // 2], "empty": b"", "flip": flipped(data)}.get(fault, data)
        start, wanted = 0, self.headers.get("Range")
        if wanted and self.command == "GET":
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_data(206 if start else 200, data[start:], headers, fault)

    def send_data(self, status: int, data: bytes, headers: dict[str, str] | None = None, fault: str = "") -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "drop":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "slow":
            for start in range(0, len(data), 512):
                self.wfile.write(data[start : start + 512])
                self.wfile.flush()
                self.server.hub.pace.wait(self.server.hub.pause)
        else:
            self.wfile.write(data)
