"""
A local server that speaks the part of the Hub's HTTP API that a push needs, with LFS for large files (no Xet).

It keeps what arrives. What it cannot know, such as the Hub's own rules for a card's metadata, it does not check: it
records each request to validate a card and refuses only what is not YAML.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from urllib.parse import unquote

import yaml

from tests.support.servers import LoopbackServer, QuietHandler, serving

_LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png")
USER = "somebody"


class FakeHub:
    """Repositories by id, each a list of commits: (message, all files by path). Uploads by their digest."""

    def __init__(self):
        self.endpoint = ""
        self.repositories = {}
        self.uploads = {}
        self.validated = []
        self.unknown = []  # requests that it does not speak
        self._lock = threading.Lock()

    def files(self, repository):
        commits = self.repositories[repository]
        return commits[-1][1] if commits else {}

    def create(self, request):
        name = f"{request['organization'] or USER}/{request['name']}"
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, [])
        return status, {"url": f"{self.endpoint}/{name}", "name": name}

    def validate(self, request):
        self.validated.append(request["content"])
        try:
            metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", request["content"], flags=re.DOTALL)[1])
            assert isinstance(metadata, dict)
        except (yaml.YAMLError, TypeError, AssertionError) as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def preupload(self, repository, request):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in request["files"]
        ]
        return 200, {"files": files}

    def lfs_batch(self, request):
        objects = [
            {
                **{key: file[key] for key in ("oid", "size")},
                **(
                    {}
                    if file["oid"] in self.uploads
                    else {"actions": {"upload": {"href": f"{self.endpoint}/upload/{file['oid']}"}}}
                ),
            }
            for file in request["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, repository, body):
        with self._lock:
            files, message = dict(self.files(repository)), ""
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    message = value["summary"]
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.uploads[value["oid"]]
                else:
                    raise ValueError(entry["key"])
            self.repositories[repository].append((message, files))
            oid = f"{len(self.repositories[repository]):040x}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repository}/commit/{oid}"}

    def info(self, repository):
        if repository not in self.repositories:
            return 404, {"error": "Repository not found"}
        siblings = [{"rfilename": path} for path in self.files(repository)]
        sha = f"{len(self.repositories[repository]):040x}"
        return 200, {"id": repository, "modelId": repository, "sha": sha, "siblings": siblings, "tags": []}


class _Handler(QuietHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def _answer(self, status, content, headers=None):
        self.send(content, status, (headers or {}).items())

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        hub, path, body = self.hub, unquote(self.path.split("?")[0]), self._body()
        if path == "/api/repos/create":
            self._answer(*hub.create(json.loads(body)))
        elif path == "/api/validate-yaml":
            self._answer(*hub.validate(json.loads(body)))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self._answer(*hub.preupload(match[1], json.loads(body)))
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self._answer(*hub.lfs_batch(json.loads(body)))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._answer(*hub.commit(match[1], body))
        else:
            self._unknown()

    def do_PUT(self):
        body, oid = self._body(), self.path.removeprefix("/upload/")
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "another digest"})
            return
        self.hub.uploads[oid] = body
        self._answer(200, {})

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        if path == "/api/whoami-v2":
            self._answer(200, {"name": USER, "type": "user", "orgs": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/revision/main)?", path):
            self._answer(*self.hub.info(match[1]))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.hub.files(match[1]).get(match[2]) if match[1] in self.hub.repositories else None
            if content is None:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            commit = f"{len(self.hub.repositories[match[1]]):040x}"
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._answer(200, content, {"ETag": etag, "X-Repo-Commit": commit})
        else:
            self._unknown()

    do_HEAD = do_GET

    def _unknown(self):
        self.hub.unknown.append(f"{self.command} {self.path}")
        self._answer(404, {"error": "not spoken here"})


@contextmanager
def fake_hub():
    """A running [`FakeHub`]."""
    hub = FakeHub()
    with serving(LoopbackServer(type("Handler", (_Handler,), {"hub": hub}))) as server:
        hub.endpoint = server.url
        yield hub
