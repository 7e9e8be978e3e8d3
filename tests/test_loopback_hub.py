"""The real client of the Hugging Face Hub against the Hub that other tests use."""

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from loopback_hub import GITATTRIBUTES, LoopbackHub


PREAMBLE = """
import json, sys
from pathlib import Path
from huggingface_hub import *
from huggingface_hub.errors import *

api = HfApi()
home = Path(sys.argv[1])

def error(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return type(error).__name__

def show(value):
    print("shown", json.dumps(value))
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Runs code with the real client in a process of its own and returns what the code shows."""

    def run(code, token=True):
        command = [sys.executable, "-c", PREAMBLE + code, str(tmp_path)]
        environment = hub.environment(tmp_path / ("home" if token else "stranger"), token)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return [json.loads(line.removeprefix("shown ")) for line in done.stdout.splitlines() if line[:6] == "shown "]

    return run


@pytest.fixture
def folder(tmp_path):
    """A model card, and files that travel by LFS: one for its name, one for its size."""
    folder = tmp_path / "model"
    (folder / "samples").mkdir(parents=True)
    (folder / "README.md").write_text("---\npipeline_tag: image-feature-extraction\ntags: [grün]\n---\n# A model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "samples" / "many.dat").write_bytes(b"0123456789" * 1_200_000)
    return folder


@pytest.fixture
def published(client, hub, folder):
    """`folder`'s files, which main of "org/x" holds."""
    client('api.create_repo("org/x"); api.upload_folder(repo_id="org/x", folder_path=home / "model")')
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def test_pushed_files_are_there_and_load_at_every_revision(client, hub, published):
    assert hub.files("org/x") == {".gitattributes": GITATTRIBUTES, **published}
    assert {path for path, file in hub.repositories["org/x"].resolve("main").files.items() if file.lfs} == {
        "model.safetensors",
        "samples/many.dat",
    }
    first = hub.commits("org/x")[0]
    shown = client(f"""
api.create_tag("org/x", tag="v1")
api.create_branch("org/x", branch="try/this", revision="v1")
(home / "model" / "config.json").write_text("{{}}")
(home / "model" / "model.safetensors").write_bytes(b"other")
api.upload_folder(repo_id="org/x", folder_path=home / "model", delete_patterns="samples/*", ignore_patterns="samples/*")
for revision in ("main", "v1", "try/this", "{first}"):
    snapshot = Path(snapshot_download("org/x", revision=revision))
    show({{str(path.relative_to(snapshot)): path.stat().st_size for path in snapshot.rglob("*.*")}})
    show(len(Path(hf_hub_download("org/x", "model.safetensors", revision=revision)).read_bytes()))
show([file.path for file in api.list_repo_tree("org/x")])
show([file.path for file in api.list_repo_tree("org/x", "samples", revision="v1")])
refs = api.list_repo_refs("org/x")
show([[ref.name for ref in refs.branches], [ref.name for ref in refs.tags]])
info = api.model_info("org/x")
show([info.sha, info.pipeline_tag, info.library_name, info.tags, info.private])
show([api.whoami()["name"], api.file_exists("org/x", "config.json"), api.file_exists("org/x", "no.json")])
""")
    old = {path: len(content) for path, content in hub.files("org/x", "v1").items()}
    new = {path: len(content) for path, content in hub.files("org/x").items()}
    assert new.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert shown[:8] == [new, 5, old, 25_600, old, 25_600, old, 25_600]
    assert shown[8:] == [
        sorted(new, key=list(new).index),
        ["samples/many.dat"],
        [["main", "try/this"], ["v1"]],
        [hub.commits("org/x")[0], "image-feature-extraction", "transformers", ["grün"], False],
        ["loopback", True, False],
    ]
    assert hub.commits("org/x")[1:] == hub.commits("org/x", "v1") == hub.commits("org/x", "try/this")


def test_what_has_not_changed_is_not_sent_again(client, hub, published):
    head, sent = hub.commits("org/x"), len(hub.requests)
    client('api.upload_folder(repo_id="org/x", folder_path=home / "model")')
    assert hub.commits("org/x") == head
    assert not [request for request in hub.requests[sent:] if request.startswith("PUT") or "/commit/" in request]


def test_who_may_read_and_write(client, hub, published):
    hub.repositories["org/x"].private = True
    reading = 'show([error(api.model_info, "org/x"), error(hf_hub_download, "org/x", "README.md")])'
    assert client(reading) == [[None, None]]
    assert client(reading, token=False) == [["RepositoryNotFoundError"] * 2]
    hub.repositories["org/x"].private = False
    writing = """
show(error(api.upload_file, repo_id="org/x", path_or_fileobj=b"1", path_in_repo="a.txt"))
show(error(api.create_repo, "org/y"))
show(error(api.model_info, "org/x", token="hf_another"))
"""
    assert client(reading + writing, token=False) == [
        [None, None],
        "RepositoryNotFoundError",
        "HfHubHTTPError",
        "HfHubHTTPError",
    ]
    assert list(hub.repositories) == ["org/x"] and "a.txt" not in hub.files("org/x")


def test_what_is_missing_or_wrong_is_named(client, hub, published):
    head = hub.commits("org/x")
    shown = client("""
add = CommitOperationAdd("a.txt", b"1")
show([
    error(hf_hub_download, "org/x", "no.json"),
    error(hf_hub_download, "org/x", "README.md", revision="no"),
    error(hf_hub_download, "org/no", "README.md"),
    error(api.create_commit, "org/x", [add, CommitOperationDelete("no.txt")], commit_message="m"),
    error(api.create_commit, "org/x", [add], commit_message="m", parent_commit="0" * 40),
    error(api.create_commit, "org/x", [add], commit_message="m", create_pr=True),
    error(api.upload_file, repo_id="org/x", path_in_repo="README.md", path_or_fileobj=b"---\\na: [\\n---\\n"),
    error(api.create_repo, "org/x"),
    error(api.create_repo, "org/x", exist_ok=True),
])
""")
    assert shown == [
        [
            "RemoteEntryNotFoundError",
            "RevisionNotFoundError",
            "RepositoryNotFoundError",
            "RemoteEntryNotFoundError",
            "HfHubHTTPError",
            "BadRequestError",
            "ValueError",
            "HfHubHTTPError",
            None,
        ]
    ]
    assert hub.commits("org/x") == head


@pytest.mark.parametrize("kind", ["lfs", "commit"])
def test_an_upload_that_dies_halfway_changes_nothing(client, hub, published, kind):
    head = hub.commits("org/x")
    hub.fail = kind
    push = """
(home / "model" / "config.json").write_text("{}")
(home / "model" / "model.safetensors").write_bytes(b"other" * 100_000)
show(error(api.upload_folder, repo_id="org/x", folder_path=home / "model", delete_patterns="*.dat"))
"""
    assert client(push) != [None]
    assert any(request.endswith(" cut") for request in hub.requests)
    assert hub.commits("org/x") == head
    assert hub.files("org/x") == {".gitattributes": GITATTRIBUTES, **published}
    hub.fail = None
    assert client(push) == [None]
    assert hub.commits("org/x")[1:] == head
    assert hub.files("org/x")["model.safetensors"] == b"other" * 100_000


def test_the_client_sends_a_file_again_that_was_lost_once(client, hub):
    hub.fail_next = "lfs"
    client("""
api.create_repo("org/x")
api.upload_file(repo_id="org/x", path_or_fileobj=b"weights" * 100_000, path_in_repo="model.safetensors")
""")
    assert hub.files("org/x")["model.safetensors"] == b"weights" * 100_000


def test_parts_of_files(hub, published):
    def read(span):
        request = urllib.request.Request(
            f"{hub.endpoint}/org/x/resolve/main/model.safetensors", headers={"Range": span}
        )
        with urllib.request.urlopen(request) as response:
            return response.status, response.headers["Content-Range"], response.read()

    assert read("bytes=25590-") == (206, "bytes 25590-25599/25600", bytes(range(246, 256)))
    assert read("bytes=1-3") == (206, "bytes 1-3/25600", b"\1\2\3")
    with pytest.raises(urllib.error.HTTPError, match="416"):
        read("bytes=25600-")


def test_a_commit_needs_its_large_files_whole(hub, published):
    head = hub.commits("org/x")
    content = b"weights"
    oid = hashlib.sha256(content).hexdigest()

    def send(method, address, body):
        headers = {"Authorization": f"Bearer {hub.token}"}
        request = urllib.request.Request(address, body, headers, method=method)
        with urllib.request.urlopen(request) as response:
            return response.read()

    large = {"key": "lfsFile", "value": {"path": "large.bin", "algo": "sha256", "oid": oid, "size": len(content)}}
    lines = [{"key": "header", "value": {"summary": "title", "description": ""}}, large]
    commit = ("POST", f"{hub.endpoint}/api/models/org/x/commit/main", "\n".join(map(json.dumps, lines)).encode())
    batch = json.dumps({"objects": [{"oid": oid, "size": len(content)}]}).encode()
    answer = json.loads(send("POST", f"{hub.endpoint}/org/x.git/info/lfs/objects/batch", batch))
    link = answer["objects"][0]["actions"]["upload"]["href"]
    for other in (b"", b"weight", b"weighty", b"weights!"):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            send("PUT", link, other)
        with pytest.raises(urllib.error.HTTPError, match="400"):
            send(*commit)
    assert hub.commits("org/x") == head
    send("PUT", link, content)
    send(*commit)
    assert hub.files("org/x")["large.bin"] == content
