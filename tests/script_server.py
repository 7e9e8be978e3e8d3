"""Many scripts, as fast as one: Python that has imported the package forks a process for each script.

    with Scripts(environment, folder) as scripts:
        said = scripts.run("scripts/run_publish.py", "--model", "outputs/pretrain")

Nothing but the imports is shared: arguments, output, exit status and what a script leaves in memory are its own. What
`environment` sets before Python starts holds for all of them.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path


class Scripts:
    """Runs scripts with `environment` in the folder `cwd`."""

    def __init__(self, environment, cwd):
        self.environment, self.cwd = dict(environment), cwd

    def __enter__(self):
        self.errors = tempfile.TemporaryFile("w+")
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        return self

    def __exit__(self, *_):
        self.server.kill()
        self.server.communicate()
        self.errors.close()

    def run(self, *words, fails=False) -> str:
        """What `python words` prints; AssertionError if it fails, or with `fails` if it does not."""
        with tempfile.NamedTemporaryFile("r") as output:
            self.server.stdin.write(json.dumps([[str(word) for word in words], output.name]) + "\n")
            self.server.stdin.flush()
            status = self.server.stdout.readline()
            said = output.read()
        if not status:
            self.errors.seek(0)
            said = self.errors.read()
        assert status and (status != "0\n") == fails, f"{status}{said}"
        return said


def serve():
    # What the scripts would spend most of their time on.
    from hf_igpt.commands import clusters, convert, finetune, plan, pretrain, probe, publish, report, sample, score  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        words, output = json.loads(line)
        child = os.fork()
        if not child:
            answers.close()
            for descriptor, place, mode in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY)):
                os.dup2(os.open(place, mode), descriptor)
            os.dup2(1, 2)
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            return runpy.run_path(words[0], run_name="__main__")
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    serve()
