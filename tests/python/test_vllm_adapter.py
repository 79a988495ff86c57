"""Runs tests/vllm in vLLM's own environment: the adapter against the installed vLLM, without an engine."""

import os
import re
import subprocess

import pytest
import vllm_engine
from conftest import ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.long]


def test_adapter():
    vllm_engine.require()
    done = subprocess.run(
        [vllm_engine.PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests/vllm"],
        env={**os.environ, "VSP_MODEL": str(vllm_engine.MODEL), "PYTHONPATH": str(ROOT / "client/python")},
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 15
