"""vLLM's OpenAI server from .venv-vllm as a process of its own, with the connector, and what tests ask of it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
import uuid

import pytest
from conftest import ROOT
from servers import pinned_to

PYTHON = ROOT / ".venv-vllm/bin/python"
MODEL = ROOT / "models/vllm/SmolLM2-135M-Instruct"
READY_SECONDS = 600


def require():
    """Skips the test where vLLM is not installed."""
    if not PYTHON.exists() or not MODEL.exists():
        pytest.skip("no .venv-vllm or models/vllm: run deploy/local/setup_vllm.sh")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class HttpError(Exception):
    def __init__(self, status, body):
        super().__init__(f"{status}: {body[:500]}")
        self.status = status


class Engine:
    """Running from construction until stop(). extra: kv_connector_extra_config; None starts it without connector.

    cores: those that its processes may use, "0" or "0,1"; None: all. nice: its processes spin while requests wait for
    KV, so on two cores the prefill server must come first.
    """

    def __init__(self, extra, *arguments, dtype="float32", policy="fail", max_model_len=8192, environment=None,
                 cores=None, nice=5):
        require()
        self.port = free_port()
        command = [*pinned_to(cores), "nice", "-n", str(nice), str(PYTHON), "-m", "vllm.entrypoints.openai.api_server",
                   "--model", str(MODEL), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(self.port),
                   "--dtype", dtype, "--max-model-len", str(max_model_len), "--enforce-eager",
                   "--enable-prompt-tokens-details", *arguments]
        if extra is not None:
            command += ["--kv-transfer-config", json.dumps({
                "kv_connector": "VSPrefillConnector", "kv_connector_module_path": "vsprefill.vllm_connector",
                "kv_role": "kv_consumer", "kv_load_failure_policy": policy, "kv_connector_extra_config": extra})]
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
                 "PYTHONPATH": str(ROOT / "client/python"),
                 # Three processes import vLLM and torch at each start: half a minute without compiled files.
                 "PYTHONDONTWRITEBYTECODE": "", **(environment or {})})
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def _await_ready(self):
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            assert self._process.poll() is None, f"vLLM ended with {self._process.returncode}:\n{self.errors()}"
            try:
                urllib.request.urlopen(self.url("/health"), timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"vLLM is not ready after {READY_SECONDS} s:\n{self.log()[-4000:]}")

    def url(self, path):
        return f"http://127.0.0.1:{self.port}{path}"

    def log(self):
        self._log.flush()
        with open(f"/proc/self/fd/{self._log.fileno()}") as log:
            return log.read()

    def errors(self):
        """The first errors of the log, or its end: later ones only say that an earlier one happened."""
        errors = [line for line in self.log().splitlines() if " ERROR " in line]
        return "\n".join(errors[:60]) or self.log()[-4000:]

    def alive(self):
        return self._process.poll() is None

    def stop(self):
        """SIGTERM, then what is left of its own process group; returns the log."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        log = self.log()
        self._log.close()
        return log

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def body(self, ids, *, vsprefill=None, salt=None, max_tokens=64, **more):
        """JSON of a greedy completion. salt None: one of its own, so that nothing is shared; "": none."""
        body = {"model": "m", "prompt": ids, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True,
                **more}
        if salt != "":
            body["cache_salt"] = salt or uuid.uuid4().hex
        if vsprefill is not None:
            body["kv_transfer_params"] = {"vsprefill": vsprefill}
        return body

    def complete(self, ids, *, timeout=240, **options):
        """The answer's JSON. Raises HttpError."""
        request = urllib.request.Request(self.url("/v1/completions"), json.dumps(self.body(ids, **options)).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise HttpError(error.code, error.read().decode()) from None

    def begin(self, ids, *, timeout=60, **options):
        """Sends a completion and returns the open connection: close() is a client that goes away."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request("POST", "/v1/completions", json.dumps(self.body(ids, **options)),
                           {"Content-Type": "application/json"})
        return connection

    def metric(self, name, **labels):
        """Sum of the series of a metric that have these labels."""
        text = urllib.request.urlopen(self.url("/metrics"), timeout=30).read().decode()
        total = 0.0
        for series, value in re.findall(rf"^{re.escape(name)}(\{{.*\}})? ([^ ]+)$", text, re.M):
            if all(f'{k}="{v}"' in series for k, v in labels.items()):
                total += float(value)
        return total

    def await_idle(self, seconds=20):
        """Waits until no request and no KV block is in use; fails if a block stays."""
        end = time.monotonic() + seconds
        while True:
            busy = {name: self.metric(f"vllm:{name}") for name in (
                "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")}
            if not any(busy.values()):
                return
            assert time.monotonic() < end, f"still in use after {seconds} s: {busy}"
            time.sleep(0.1)


def tokens(answer):
    return answer["choices"][0]["token_ids"]


def outcome(answer):
    return answer["kv_transfer_params"]["vsprefill"]


def cached_tokens(answer):
    return (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0
