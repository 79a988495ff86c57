#!/usr/bin/env bash
# Installs everything that vsprefill needs on Debian 12: Debian packages, a Python environment in .venv
# with LibTorch and the CUDA compiler, generated Python code, and the default model's directory.
# Each step is skipped where its result is there and its inputs have not changed.
#
#   deploy/local/setup.sh [--fixtures] [--ci]
#
#   --fixtures   also make the tiny test models and the expected tokens (some minutes once)
#   --ci         also install the formatter and the linters that .ci/run uses
#
# Environment: VSP_PYTHON (default python3, 3.11 or newer) makes .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fixtures=0
ci=0
for argument in "$@"; do
  case $argument in
    --fixtures) fixtures=1 ;;
    --ci) ci=1 ;;
    -h | --help) sed -n '2,11p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;;
    *) echo "setup: unknown option $argument (see --help)" >&2; exit 2 ;;
  esac
done

step_name="start"
failed() {
  local rc=$?
  if [ $rc != 0 ]; then echo "setup: step \"$step_name\" failed with status $rc; the lines above say why" >&2; fi
}
trap failed EXIT
step() {
  step_name=$1
  echo "setup: [$(date +%H:%M:%S)] $1"
}

# stamp NAME INPUT...: true if the step NAME was done with the same inputs (contents of files, or words).
stamps=.venv/.stamps
content() {
  local input
  for input in "$@"; do
    if [ -f "$input" ]; then cat "$input"; else echo "$input"; fi
  done | sha256sum
}
done_before() { [ "$(cat "$stamps/$1" 2>/dev/null || true)" = "$(content "${@:2}")" ]; }
mark_done() {
  mkdir -p "$stamps"
  content "${@:2}" >"$stamps/$1"
}

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    echo "setup: not root and no sudo; run as root: $*" >&2
    return 1
  fi
}

# One clear line instead of a stack of apt messages; the full output is shown only on failure.
quietly() {
  local log
  log=$(mktemp)
  if ! "$@" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    rm -f "$log"
    return 1
  fi
  rm -f "$log"
}

debian_packages() {
  local wanted missing=() package
  mapfile -t wanted < <(grep -hv '^#' "$@")
  for package in "${wanted[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  step "Debian packages: installing ${#missing[@]} (${missing[*]})"
  quietly as_root apt-get update
  quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
}

command -v dpkg-query >/dev/null || { echo "setup: this is not Debian; see deploy/local/apt-packages.txt for what is needed" >&2; exit 1; }
step "Debian packages"
debian_packages deploy/local/apt-packages.txt
if [ $ci = 1 ]; then debian_packages deploy/local/apt-packages-ci.txt; fi

step "Python environment .venv"
python=${VSP_PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python {sys.version.split()[0]}, 3.11 or newer is needed (VSP_PYTHON)")'
  rm -rf .venv
  "$python" -m venv .venv
fi
version=$(.venv/bin/python -V)
if ! done_before pip deploy/local/requirements.txt "$version"; then
  step "Python packages (about 2.5 GB with LibTorch and CUDA libraries; some minutes)"
  .venv/bin/python -m pip install --no-deps --disable-pip-version-check --no-input --progress-bar off \
    --quiet --no-compile --root-user-action ignore -r deploy/local/requirements.txt
  mark_done pip deploy/local/requirements.txt "$version"
fi
if [ $ci = 1 ] && ! done_before pip-ci deploy/local/requirements-ci.txt "$version"; then
  step "Python linters"
  .venv/bin/python -m pip install --no-deps --disable-pip-version-check --no-input --progress-bar off \
    --quiet --root-user-action ignore -r deploy/local/requirements-ci.txt
  mark_done pip-ci deploy/local/requirements-ci.txt "$version"
fi

step "Python client: generated code"
.venv/bin/python client/python/generate_proto.py

step "model SmolLM2-135M-Instruct"
if ! grep -qs . models/SmolLM2-135M-Instruct/conversion.json || ! done_before model deploy/local/make_model.py; then
  .venv/bin/python deploy/local/make_model.py
  mark_done model deploy/local/make_model.py
fi

# What vsprefill-distill trained for this model; the server looks for it in the model's directory.
for part in indexer.safetensors seer_gate.safetensors; do
  if [ -f deploy/local/$part ] && ! cmp -s deploy/local/$part models/SmolLM2-135M-Instruct/$part; then
    cp deploy/local/$part models/SmolLM2-135M-Instruct/.$part.tmp
    mv models/SmolLM2-135M-Instruct/.$part.tmp models/SmolLM2-135M-Instruct/$part
  fi
done

if [ $fixtures = 1 ]; then
  step "test models"
  fixture_inputs=(tests/golden/make_fixtures.py tests/golden/make_expected_tokens.py deploy/local/make_model.py
    deploy/local/prompts/document.txt deploy/local/prompts/question.txt)
  if ! done_before fixtures "${fixture_inputs[@]}"; then
    .venv/bin/python tests/golden/make_fixtures.py
    .venv/bin/python tests/golden/make_expected_tokens.py
    mark_done fixtures "${fixture_inputs[@]}"
  fi
fi
step_name="end"
echo "setup: [$(date +%H:%M:%S)] done"
