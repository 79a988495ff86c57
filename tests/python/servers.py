"""Starts the project's programs for a test and stops them, each by its own process."""

import os
import subprocess
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("VSP_BIN", ROOT / "build/bin"))


def binary(name):
    """Path of a program; without it the test is skipped, or fails where tests/run.sh has built it."""
    path = BIN / name
    if not path.exists():
        if os.environ.get("VSP_REQUIRE_BINARIES"):
            pytest.fail(f"{path} is missing")
        pytest.skip(f"{path} is not built")
    return str(path)


class Program:
    """A running program. `line(prefix)` waits for a line of its output and returns the rest of it."""

    def __init__(self, *command):
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def line(self, prefix, timeout=120):
        def found():
            return next((text for text in self.lines if text.startswith(prefix)), None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._ended, timeout)
            text = found()
        assert text is not None, f"no line {prefix!r} within {timeout} s:\n" + "\n".join(self.lines[-20:])
        return text[len(prefix):]

    @property
    def pid(self):
        return self._process.pid

    def stop(self):
        """SIGTERM; returns the exit status."""
        self._process.terminate()
        try:
            status = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        return status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def pinned_to(cores):
    """What stands before a command to keep it on these cores ("0" or "0,1"); None: anywhere."""
    return [] if cores is None else ["taskset", "--cpu-list", cores]


def start_server(model_dir, *arguments, program="vsprefill-server", cores=None):
    """A vsprefill-server on loopback; `address` and `metrics` are where it listens."""
    listen = () if "--listen" in arguments else ("--listen", "127.0.0.1:0")
    server = Program(*pinned_to(cores), binary(program), "--model", str(model_dir), *listen,
                     "--metrics_listen", "127.0.0.1:0", "--device", "cpu", *arguments)
    try:
        server.address = server.line("listening on ")
        server.metrics = server.line("metrics on ")
    except BaseException:
        server.stop()
        raise
    return server
