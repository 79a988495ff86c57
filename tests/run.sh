#!/usr/bin/env bash
# Set-up if missing, build, all tests (CTest and pytest), one closing line `N passed, N failed, N skipped`.
#
#   tests/run.sh [--filter REGEX] [--quick] [--half-vllm] [--no-build] [--jobs N]
#
#   --filter REGEX  only CTest programs whose name matches, and pytest tests whose name contains it
#   --quick         without the long tests (CTest label "long", pytest mark "long")
#   --half-vllm     of the tests that start vLLM only the faster half (without pytest mark "vllm_rest")
#   --no-build      take build/ and .venv as they are
#   --jobs N        CTest programs at once (default 1: most of them use all cores themselves)
#
# A CTest program counts by its GoogleTest cases. Exit status 0 only if something passed and nothing failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

filter=
quick=0
half_vllm=0
build=1
jobs=1
while [ $# -gt 0 ]; do
  case $1 in
    --filter) filter=${2:?--filter needs a value}; shift ;;
    --jobs) jobs=${2:?--jobs needs a value}; shift ;;
    --quick) quick=1 ;;
    --half-vllm) half_vllm=1 ;;
    --no-build) build=0 ;;
    -h | --help) sed -n '2,12p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;;
    *) echo "run: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done

results=$PWD/build/test-results
# Whatever happens after this point, the last line is the count.
passed=0 failed=0 skipped=0
finish() {
  trap - EXIT
  echo "$passed passed, $failed failed, $skipped skipped"
  [ "$failed" = 0 ] && [ "$passed" -gt 0 ]
  exit $?
}
trap 'failed=$((failed + 1)); finish' EXIT

if [ $build = 1 ]; then
  deploy/local/setup.sh --fixtures
  deploy/local/build.sh
fi
rm -rf "$results"
mkdir -p "$results"

# The programs under test and their models; tests that need one fail rather than skip when it is missing.
export VSP_MODEL=$PWD/models/SmolLM2-135M-Instruct VSP_FIXTURES=$PWD/models/fixtures
export VSP_BIN=$PWD/build/bin VSP_REQUIRE_BINARIES=1 HF_HUB_OFFLINE=1
export GTEST_OUTPUT=xml:$results/ctest/

ctest_arguments=(--test-dir build -j "$jobs" --output-on-failure --output-junit "$results/ctest.xml" --no-tests=ignore)
pytest_arguments=(-q -p no:cacheprovider --junitxml "$results/pytest.xml" tests/python)
if [ -n "$filter" ]; then
  ctest_arguments+=(-R "$filter")
  pytest_arguments+=(-k "$filter")
fi
marks=
if [ $quick = 1 ]; then
  ctest_arguments+=(-LE long)
  marks="not long"
fi
if [ $half_vllm = 1 ]; then marks="${marks:+$marks and }not vllm_rest"; fi
if [ -n "$marks" ]; then pytest_arguments+=(-m "$marks"); fi

ctest_rc=0
ctest "${ctest_arguments[@]}" || ctest_rc=$?
unset GTEST_OUTPUT
pytest_rc=0
.venv/bin/python -m pytest "${pytest_arguments[@]}" || pytest_rc=$?
# 5: no test matched the filter.
if [ $pytest_rc = 5 ]; then pytest_rc=0; fi

counts=$(.venv/bin/python tests/count_results.py "$results" "$ctest_rc" "$pytest_rc")
read -r passed failed skipped <<<"$counts"
finish
