"""A small stand-in for the Hugging Face Hub on the loopback interface: repositories, commits, large files, downloads.

It speaks as much of the Hub's HTTP protocol as `huggingface_hub` needs to create repositories, push, list and pull.
`Hub.interrupted` names repositories of which the next push loses its connection after the first large file.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


LARGE_FILES = (".safetensors", ".bin", ".pt", ".model", ".gguf")
NAME = r"([^/]+/[^/]+?)"


@dataclass
class Repository:
    """Files by path: (content, sha256 of a large file or None)."""

    name: str
    files: dict[str, tuple[bytes, str | None]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()

    def text(self, path: str) -> str:
        return self.files[path][0].decode()

    def commit(self, lines: list[dict], large_files: dict[str, bytes]) -> None:
        summary = ""
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                summary = value["summary"]
            elif kind == "file":
                self.files[value["path"]] = (base64.b64decode(value["content"]), None)
            elif kind == "lfsFile":
                self.files[value["path"]] = (large_files[value["oid"]], value["oid"])
            elif kind == "deletedFile":
                self.files.pop(value["path"], None)
            else:
                raise ValueError(f"a commit of kind {kind!r}")
        self.commits.append(summary)


def describe(path: str, content: bytes, oid: str | None) -> dict:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
    return entry | ({"lfs": {"oid": oid, "size": len(content), "pointerSize": 134}} if oid else {})


class Hub:
    """The server and what it holds. `url` is what HF_ENDPOINT wants; `log` lists the requests."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.interrupted: set[str] = set()
        self.log: list[str] = []
        self.lock = threading.Lock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments):
        self.hub.log.append(f"{self.command} {self.path}")

    def send(self, code: int, body: bytes | dict | list = b"", content_type: str = "application/json", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, name: str, **headers):
        self.send(404, {"error": name}, X_Error_Code=name, X_Error_Message=name, **headers)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        body = self.read_body()
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                return method(self, body, *match.groups())
        return self.refuse("RepoNotFound")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer

    def who_am_i(self, body):
        if not self.headers.get("Authorization"):
            return self.send(401, {"error": "Invalid username or password."})
        role = {"type": "access_token", "accessToken": {"role": "write"}}
        return self.send(200, {"name": "tester", "type": "user", "orgs": [], "auth": role})

    def validate_card(self, body):
        self.send(200, {"errors": [], "warnings": []})

    def create(self, body):
        if not self.headers.get("Authorization"):
            return self.send(401, {"error": "Unauthorized"})
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            return self.send(409, {"error": "You already created this model repo", "url": url})
        self.hub.repositories[name] = Repository(name)
        return self.send(200, {"url": url, "name": name, "id": name})

    def plan_large_files(self, body, name):
        """Where to put each file; of a push that is to be interrupted, the second one on lead nowhere."""
        objects, interrupted = [], name in self.hub.interrupted
        for entry in json.loads(body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.large_files:
                folder = "gone" if interrupted and objects else "large"
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/{folder}/{entry['oid']}", "header": {}}}
            objects.append(answer)
        self.hub.interrupted.discard(name)
        content = {"transfer": "basic", "objects": objects, "hash_algo": "sha256"}
        self.send(200, content, content_type="application/vnd.git-lfs+json")

    def put_large_file(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.send(400, {"error": "bad sha"})
        self.hub.large_files[oid] = body
        return self.send(200, ETag=f'"{oid}"')

    def lose_large_file(self, body, oid):
        self.send(403, {"error": "the connection was lost"})

    def api(self, body, name, rest):
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.refuse("RepoNotFound")
        action, _, rest = (rest or "").partition("/")
        if action == "preupload":
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return self.send(200, {"files": [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(LARGE_FILES)], "shouldIgnore": False}
                for f in files
            ]})  # fmt: skip
        if action == "commit":
            with self.hub.lock:
                repository.commit([json.loads(line) for line in body.splitlines()], self.hub.large_files)
            url = f"{self.hub.url}/{name}/commit/{repository.sha}"
            return self.send(200, {"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})
        if action == "tree":
            return self.send(200, [describe(path, *file) for path, file in repository.files.items()])
        if action == "paths-info":
            wanted = json.loads(body) if body[:1] == b"{" else urllib.parse.parse_qs(body.decode())
            known = [path for path in wanted.get("paths", []) if path in repository.files]
            return self.send(200, [describe(path, *repository.files[path]) for path in known])
        if action in ("", "revision") and (rest or "main") in ("main", repository.sha):
            return self.send(200, {
                "_id": "0", "id": name, "modelId": name, "sha": repository.sha, "private": False, "disabled": False,
                "gated": False, "downloads": 0, "likes": 0, "tags": [],
                "siblings": [{"rfilename": path} for path in repository.files],
            })  # fmt: skip
        return self.refuse("RevisionNotFound")

    def resolve(self, body, name, revision, path):
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.refuse("RepoNotFound")
        if revision not in ("main", repository.sha):
            return self.refuse("RevisionNotFound")
        if path not in repository.files:
            return self.refuse("EntryNotFound", X_Repo_Commit=repository.sha)
        content, oid = repository.files[path]
        headers = {"X_Repo_Commit": repository.sha, "ETag": f'"{oid or describe(path, content, oid)["oid"]}"'}
        if oid:
            headers |= {"X_Linked_ETag": f'"{oid}"', "X_Linked_Size": str(len(content))}
        return self.send(200, content, "application/octet-stream", **headers)


ROUTES = [
    ("/api/whoami-v2", Handler.who_am_i),
    ("/api/validate-yaml", Handler.validate_card),
    ("/api/repos/create", Handler.create),
    (f"/{NAME}\\.git/info/lfs/objects/batch", Handler.plan_large_files),
    ("/large/([0-9a-f]{64})", Handler.put_large_file),
    ("/gone/([0-9a-f]{64})", Handler.lose_large_file),
    (f"/api/models/{NAME}(?:/(.*))?", Handler.api),
    (f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
