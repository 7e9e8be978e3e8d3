"""A Hugging Face Hub for tests: an HTTP server on 127.0.0.1 that the real client talks to. Everything is in memory.

    with LoopbackHub() as hub:
        subprocess.run([sys.executable, "publish.py"], env=hub.environment(tmp_path), check=True)
        assert "config.json" in hub.files("org/model")

It speaks what `huggingface_hub` and transformers use to publish and load models:

    GET  /api/whoami-v2                                         POST /api/repos/create, /api/validate-yaml
    GET  /api/models/ORG/NAME[/revision/REV]                    POST /api/models/ORG/NAME/preupload/BRANCH
    GET  /api/models/ORG/NAME/tree/REV[/FOLDER]                 POST /ORG/NAME.git/info/lfs/objects/batch
    GET  /api/models/ORG/NAME/refs                              PUT  /lfs/UPLOAD, one file of that batch
    GET, HEAD /ORG/NAME/resolve/REV/PATH, also ranges           POST /api/models/ORG/NAME/commit/BRANCH
                                                                POST /api/models/ORG/NAME/branch/BRANCH, .../tag/REV

Anything else is refused: pull requests, datasets, spaces, deleting a repository. A new repository holds
`.gitattributes`, as on the Hub. Large files travel by LFS' "basic" transfer. Where hf-xet is installed the client uses
that under HF_HUB_DISABLE_XET=1 alone, which `environment` sets; else it insists on Xet, whatever a server offers.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_PATTERNS = ("*.safetensors", "*.bin", "*.npy", "*.npz", "*.pt", "*.pth", "*.png", "*tfevents*")
LFS_BYTES = 10_000_000  # larger files are LFS files whatever their name
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


class Refusal(Exception):
    """Becomes an answer of `status` with the Hub's error headers; the client chooses its exception by `code`."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.status, self.headers = status, {name: value for name, value in headers.items() if value}


class File:
    """A file of a commit: its bytes, and the names that Git and LFS know them by."""

    def __init__(self, content: bytes, lfs: bool = False):
        self.content, self.lfs = content, lfs
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
        blob = self.pointer.encode() if lfs else content
        self.blob_id = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        self.etag = self.sha256 if lfs else self.blob_id

    def description(self) -> dict:
        """Its part of a listing."""
        size = len(self.content)
        lfs = {"lfs": {"oid": self.sha256, "size": size, "pointerSize": len(self.pointer)}} if self.lfs else {}
        return {"oid": self.blob_id, "size": size, **lfs}


class Commit(NamedTuple):
    oid: str
    parent: str | None
    title: str
    files: dict[str, File]


class Repository:
    """Commits by oid; branches and tags, from names to oids; LFS contents by SHA-256, committed or not."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str | None] = {"main": None}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.commit("main", "initial commit", {".gitattributes": File(GITATTRIBUTES)})

    def commit(self, branch: str, title: str, files: dict[str, File]) -> str:
        """Puts a commit of `files` on top of `branch`; returns its oid, which is random."""
        oid = secrets.token_hex(20)
        self.commits[oid] = Commit(oid, self.branches[branch], title, files)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag or an oid."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        return self.commits[oid]


class LoopbackHub(ThreadingHTTPServer):
    """The server, running inside `with`.

    `repositories` maps "org/name" to `Repository`, `requests` lists "METHOD path status". Two switches, None at first,
    take "lfs" (the upload of an LFS file) or "commit", and close the connection halfway through such a request's body:

    `fail_next` does so once. The client sends an LFS file anew after a second; a commit it sends once.
    `fail` does so until it is None again, and answers 403 to the next try of the same request, as to an expired link:
    the client then gives up. Against closed connections alone it would try for 23 seconds, and nothing shortens that.
    """

    token = "hf_loopback_0123456789"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, tuple[Repository, str, int]] = {}  # expected LFS files: repository, SHA-256, size
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.fail = self.fail_next = None

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repositories[repo_id].resolve(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """Their oids, newest first."""
        repository, oids = self.repositories[repo_id], []
        oid = repository.resolve(revision).oid
        while oid:
            oids.append(oid)
            oid = repository.commits[oid].parent
        return oids

    def environment(self, home, token: bool = True) -> dict[str, str]:
        """`os.environ` for a process that uses this Hub, with or without its token, and caches in the folder `home`."""
        elsewhere = ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
        return {
            **{name: value for name, value in os.environ.items() if name not in elsewhere},
            **({"HF_TOKEN": self.token} if token else {}),
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers would send `.bin` repositories to a Space to convert
            "no_proxy": "127.0.0.1",
        }


ROUTES = []


def route(method: str, pattern: str):
    """Lets a method of `Handler` answer requests like `pattern`, whose names in braces are its arguments."""
    parts = {"repo": "[^/]+/[^/]+", "path": ".+"}
    expression = re.sub(r"\{(\w+)\}", lambda name: f"(?P<{name[1]}>{parts.get(name[1], '[^/]+')})", pattern)

    def register(function):
        ROUTES.append((method, re.compile(expression), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def dispatch(self):
        """Reads a request to its end, then finds the method that answers it."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        method = "GET" if self.command == "HEAD" else self.command
        matches = ((answer, pattern.fullmatch(url.path)) for known, pattern, answer in ROUTES if known == method)
        answer, match = next((pair for pair in matches if pair[1]), (Handler.unknown, re.match("", "")))
        try:
            self.read_body(answer.__name__)
            answer(self, **{name: unquote(value) for name, value in match.groupdict().items()})
        except ConnectionError:
            self.close_connection = True
        except Refusal as refusal:
            self.reply({"error": str(refusal)}, refusal.status, refusal.headers)
        except (KeyError, ValueError, yaml.YAMLError) as error:
            self.reply({"errors": [{"message": f"{type(error).__name__}: {error}"}]}, 400)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def read_body(self, kind: str):
        length = int(self.headers.get("Content-Length", 0))
        trace = f"{self.command} {self.path} cut"
        again = kind == self.server.fail and trace in self.server.requests
        cut = kind in (self.server.fail, self.server.fail_next) and not again
        self.body = self.rfile.read(length // 2 if cut else length)
        if cut:
            self.server.requests.append(trace)
        if kind == self.server.fail_next:
            self.server.fail_next = None
        if len(self.body) < length:
            raise ConnectionAbortedError
        if again:
            raise Refusal(403, "Request has expired")

    def reply(self, value, status: int = 200, headers: dict | None = None):
        """Answers with bytes or JSON."""
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, field in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(field))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_request(self, code="-", size="-"):
        self.server.requests.append(f"{self.command} {self.path} {int(code)}")

    def authorize(self, needed: bool = True, code: str | None = None):
        """Refuses a wrong token, even where none is needed, as the Hub does, and a missing one where it is."""
        header = self.headers.get("Authorization")
        if header not in (None, f"Bearer {self.server.token}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        if needed and header is None:
            raise Refusal(401, "Invalid username or password.", code)

    def repository(self, name: str, write: bool = False) -> Repository:
        """The repository, if the request may see it: without the token, private and missing ones look the same."""
        repository = self.server.repositories.get(name)
        self.authorize(write or repository is None or repository.private, "RepoNotFound")
        if repository is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def unknown(self):
        raise Refusal(404, "LoopbackHub does not speak this endpoint")

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        self.authorize()
        access = {"displayName": "loopback", "role": "write"}
        self.reply({"type": "user", "name": "loopback", "orgs": [], "auth": {"accessToken": access}})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        data = card_data(json.loads(self.body)["content"].encode())
        self.reply({"warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]})

    @route("POST", "/api/repos/create")
    def create_repository(self):
        self.authorize()
        asked = json.loads(self.body)
        if asked.get("type", "model") != "model":
            raise Refusal(400, "LoopbackHub has models alone")
        name = f"{asked.get('organization') or 'loopback'}/{asked['name']}"
        url = f"{self.server.endpoint}/{name}"
        with self.server.lock:
            if name in self.server.repositories:
                return self.reply({"error": "You already created this model repo", "url": url}, 409)
            self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        self.reply({"url": url, "name": name})

    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{revision}")
    def information(self, repo, revision="main"):
        repository = self.repository(repo)
        commit = repository.resolve(revision)
        card = card_data(commit.files["README.md"].content) if "README.md" in commit.files else {}
        library = "transformers" if "config.json" in commit.files else None
        self.reply(
            {
                "id": repo,
                "sha": commit.oid,
                "private": repository.private,
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name", library),
                "tags": card.get("tags", []),
                "cardData": card,
                "siblings": [{"rfilename": path} for path in commit.files],
            }
        )

    @route("GET", "/api/models/{repo}/tree/{revision}")
    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    def tree(self, repo, revision, path=""):
        commit = self.repository(repo).resolve(revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        start, entries = len(path) + bool(path), {}
        for name, file in commit.files.items():
            if name.startswith(f"{path}/" if path else ""):
                ends = [start + slash.start() for slash in re.finditer("/", name[start:])]
                for folder in [name[:end] for end in ends][: None if recursive else 1]:
                    oid = hashlib.sha1(folder.encode()).hexdigest()
                    entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
                if recursive or not ends:
                    entries[name] = {"type": "file", "path": name, **file.description()}
        if path and not entries:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.oid)
        self.reply(list(entries.values()))

    @route("GET", "/api/models/{repo}/refs")
    def references(self, repo):
        repository = self.repository(repo)
        branches, tags = (
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]
            for kind, names in (("heads", repository.branches), ("tags", repository.tags))
        )
        self.reply({"branches": branches, "tags": tags, "converts": []})

    @route("POST", "/api/models/{repo}/branch/{branch}")
    def create_branch(self, repo, branch):
        names = self.repository(repo, write=True).branches
        self.create_reference(repo, names, branch, json.loads(self.body).get("startingPoint", "main"))

    @route("POST", "/api/models/{repo}/tag/{revision}")
    def create_tag(self, repo, revision):
        names = self.repository(repo, write=True).tags
        self.create_reference(repo, names, json.loads(self.body)["tag"], revision)

    def create_reference(self, repo: str, names: dict[str, str], name: str, revision: str):
        with self.server.lock:
            if name in names:
                raise Refusal(409, "Reference already exists")
            names[name] = self.repository(repo).resolve(revision).oid
        self.reply({})

    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def resolve(self, repo, revision, path):
        commit = self.repository(repo).resolve(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.oid)
        file = commit.files[path]
        size = stop = len(file.content)
        start, status = 0, 200
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": size}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop, status = int(found[1]), min(size, int(found[2] or size) + 1), 206
            if start >= stop:
                raise Refusal(416, "Range not satisfiable")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.reply(file.content[start:stop], status, headers)

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, repo, revision):
        files = self.repository(repo, write=True).resolve(revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            lfs = asked["size"] > LFS_BYTES or any(fnmatch(path, pattern) for pattern in LFS_PATTERNS)
            oid = files[path].etag if path in files else None  # the client leaves out what has not changed
            mode = "lfs" if lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": answers})

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        repository = self.repository(repo, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            objects.append({"oid": asked["oid"], "size": asked["size"]})
            if asked["oid"] not in repository.objects:
                upload = secrets.token_hex(16)
                self.server.uploads[upload] = (repository, asked["oid"], asked["size"])
                objects[-1]["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{upload}"}}
        self.reply({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/{upload}")
    def lfs(self, upload):
        if upload not in self.server.uploads:
            raise Refusal(403, "Request has expired")
        repository, oid, size = self.server.uploads[upload]
        if len(self.body) != size or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The file is not the announced one")
        repository.objects[oid] = self.body
        self.reply(b"")

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def commit(self, repo, revision):
        """All operations or, where one is refused, none."""
        repository = self.repository(repo, write=True)
        header, *operations = map(json.loads, self.body.splitlines())
        if "create_pr" in self.query:
            raise Refusal(400, "LoopbackHub has no pull requests")
        with self.server.lock:
            parent = repository.resolve(revision)
            if revision not in repository.branches:
                raise Refusal(400, "Commits go to branches")
            if header["value"].get("parentCommit", parent.oid) != parent.oid:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for operation in operations:
                apply(operation["key"], operation["value"], files, repository.objects)
            oid = repository.commit(revision, header["value"]["summary"], files)
        self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}"})


def apply(key: str, value: dict, files: dict[str, File], objects: dict[str, bytes]):
    """Changes `files` by one operation of a commit."""
    path = value["path"]
    if key == "file":
        files[path] = File(base64.b64decode(value["content"], validate=True))
    elif key == "lfsFile":
        if value["oid"] not in objects or value.get("size", len(objects[value["oid"]])) != len(objects[value["oid"]]):
            raise Refusal(400, "LFS file has not been uploaded")
        files[path] = File(objects[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        folder = key == "deletedFolder"
        gone = [name for name in files if (name.startswith(path.rstrip("/") + "/") if folder else name == path)]
        if not gone:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise Refusal(400, "LoopbackHub does not know this operation")


def card_data(readme: bytes) -> dict:
    """The YAML at the top of a model card."""
    found = re.match(r"---\r?\n(.*?)^---\s*$", readme.decode(), re.DOTALL | re.MULTILINE)
    return (yaml.safe_load(found[1]) or {}) if found else {}
