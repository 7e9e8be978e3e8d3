"""Real scripts in children that are killed or starved, and what their folders then hold.

    with Trials(folder) as trials:
        trial = trials.run(folder / "1", "run_pretrain.py", "--output_dir", "run", fault={"kill": 12, "tear": True})

Python that has imported the package forks a child for each script, so that a trial costs a second. In the child an audit hook
counts the file events under its folder's `run/` and `cache/`: a file opened for writing, a rename, a removal, a new folder; what
is written by native code (weights, optimiser states) is announced by its Python caller. Event n has not happened yet when a
fault strikes at it. A fault is one of

    {"kill": n}                  SIGKILL at event n
    {"kill": n, "tear": True}    and the file that was opened last is cut to its half, as if it was being written
    {"after": seconds}           SIGKILL after that time
    {"full": n}                  from event n on, the disk is full
"""

import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "scripts"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Trial:
    """What became of one command."""

    status: int  # negative: the signal that ended it
    said: str
    events: list[str]  # of files, in their order

    @property
    def error(self) -> str | None:
        """The one sentence with which the script refused, if it did and said nothing worse."""
        _, mark, sentence = self.said.rpartition(": error: ")
        refused = self.status == 2 and mark and "Traceback (most recent call last)" not in self.said
        return " ".join(sentence.split()) if refused else None

    @property
    def last_line(self) -> str:
        return self.said.rstrip().rsplit("\n", 1)[-1][:400]


def environment(folder: Path) -> dict[str, str]:
    """That of processes which run scripts: offline, on one thread, with all caches in `folder`."""
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    return os.environ | {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "MPLBACKEND": "agg",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


class Trials:
    """The process that forks trials. `folder` is where its own files, and all caches of Hugging Face, are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Trials":
        self.errors = tempfile.TemporaryFile("w+")
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(self.folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.server.kill()
        self.server.communicate()
        self.errors.close()

    def run(
        self, folder: Path, script: str, *words: object, fault: dict | None = None, limits: dict | None = None
    ) -> Trial:
        """Run a script in `folder`. script: a name in scripts/, or a path. limits: soft limits by name ("RLIMIT_AS")."""
        folder.mkdir(parents=True, exist_ok=True)
        words = [str(SCRIPTS / script), *map(str, words)]  # an absolute path stays what it is
        job = {"words": words, "folder": str(folder), "fault": fault or {}, "limits": limits or {}}
        with tempfile.NamedTemporaryFile("r", errors="replace") as said, tempfile.NamedTemporaryFile("r") as events:
            self.server.stdin.write(json.dumps(job | {"said": said.name, "events": events.name}) + "\n")
            self.server.stdin.flush()
            status = self.server.stdout.readline()
            if not status:
                self.errors.seek(0)
                raise RuntimeError(f"The process that forks trials has died: {self.errors.read()[-4000:]}")
            return Trial(int(status), said.read(), events.read().splitlines())


# -- in the child ------------------------------------------------------------------------------------------------------


class Events:
    """Counts file events under `roots`, writes them to the descriptor `log`, and strikes with `fault`."""

    def __init__(self, roots: list[str], fault: dict, log: int) -> None:
        self.roots, self.fault, self.log = roots, fault, log
        self.count, self.last, self.process, self.busy = 0, None, os.getpid(), False

    def watch(self) -> None:
        """From now on, in this process."""
        import safetensors.torch
        import torch

        serialize, save = safetensors.torch.serialize_file, torch.save

        def serialize_file(tensors, filename, *args, **kwargs):
            self.happens("write", str(filename))
            return serialize(tensors, filename, *args, **kwargs)

        def torch_save(obj, f, *args, **kwargs):
            if isinstance(f, (str, os.PathLike)):
                self.happens("write", os.fspath(f))
            return save(obj, f, *args, **kwargs)

        safetensors.torch.serialize_file, torch.save = serialize_file, torch_save
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            if isinstance(path, (str, bytes)) and (set(mode or "") & set("wax+") or (flags or 0) & WRITES):
                self.happens("write", os.fsdecode(path))
        elif event == "os.rename":
            self.happens("rename", os.fsdecode(args[0]), os.fsdecode(args[1]))
        elif event in ("os.remove", "os.rmdir", "os.mkdir"):
            path, where = os.fsdecode(args[0]), args[-1]
            if isinstance(where, int) and where >= 0 and not os.path.isabs(path):
                path = os.path.join(os.readlink(f"/proc/self/fd/{where}"), path)
            self.happens(event[3:], path)

    def happens(self, what: str, *paths: str) -> None:
        path = os.path.abspath(paths[-1])
        if self.busy or os.getpid() != self.process or not path.startswith(tuple(self.roots)):
            return
        if (what == "mkdir") == os.path.exists(path) and what != "write" and what != "rename":
            return  # nothing will change
        self.busy = True
        try:
            self.count += 1
            os.write(self.log, f"{what} {os.path.relpath(path)}\n".encode())
            if self.count == self.fault.get("kill"):
                if self.fault.get("tear") and self.last and os.path.isfile(self.last):
                    os.truncate(self.last, os.path.getsize(self.last) // 2)
                os.kill(self.process, signal.SIGKILL)
            if self.count >= self.fault.get("full", float("inf")) and what in ("write", "mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            if what == "write":
                self.last = path
        finally:
            self.busy = False


def child(job: dict) -> None:
    """Become the script that `job` names."""
    import resource

    os.chdir(job["folder"])
    for descriptor, place, mode in ((0, os.devnull, os.O_RDONLY), (1, job["said"], os.O_WRONLY)):
        os.dup2(os.open(place, mode), descriptor)
    os.dup2(1, 2)
    log = os.open(job["events"], os.O_WRONLY)
    for name, value in job["limits"].items():
        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    roots = [f"{job['folder']}/{name}" for name in ("run", "cache")]
    Events(roots, job["fault"], log).watch()
    sys.argv, sys.path[0] = job["words"], str(Path(job["words"][0]).parent)
    runpy.run_path(job["words"][0], run_name="__main__")


def serve() -> None:
    """Fork a child for each line of standard input and answer with its status."""
    # What the scripts would spend most of their time on, done once. Nothing of torch is run, and no thread is started.
    import gc

    import matplotlib.pyplot as plt
    import sklearn.cluster  # noqa: F401
    import torch

    from hf_igpt.commands import clusters, finetune, pretrain, sample  # noqa: F401
    from hf_igpt.data import sources

    torch.set_num_threads(1)
    digits = sources.digits()
    sources.digits = lambda: digits
    figure = plt.figure()
    figure.text(0, 0, "fonts")
    figure.canvas.draw()
    plt.close(figure)
    gc.collect()
    gc.freeze()

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if not process:
            answers.close()
            return child(job)
        deadline = time.monotonic() + job["fault"].get("after", 3600)
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.002)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    serve()
