"""Paths and shared fixtures of the Python tests. They run from a set-up tree (deploy/local/setup.sh)."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client/python"), str(Path(__file__).resolve().parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes more than ten seconds; tests/run.sh --quick leaves it out")
    config.addinivalue_line("markers", "vllm: starts vLLM from .venv-vllm (deploy/local/setup_vllm.sh)")
    config.addinivalue_line("markers", "vllm_rest: of those what tests/run.sh --half-vllm, and so .ci/run, leaves out")


@pytest.fixture(scope="session")
def model_dir():
    return ROOT / "models/SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def fixtures_dir():
    return ROOT / "models/fixtures"


@pytest.fixture(scope="session")
def expected():
    """name -> {"ids", "tokens"}: ten prompts and what transformers answers (tests/golden/make_expected_tokens.py)."""
    values = json.loads((ROOT / "models/expected_tokens.json").read_text())["prompts"]
    assert len(values) == 10
    return {v["name"]: v for v in values}
