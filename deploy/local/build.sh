#!/usr/bin/env bash
# Configures and builds vsprefill in build/ (Release). Set-up must have run.
#
#   deploy/local/build.sh [TARGET...]     default: everything
#
# Environment: VSP_JOBS (parallel jobs; default: one per core and 2 GiB of memory), CCACHE_DIR, VSP_CMAKE_ARGS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case ${1:-} in -h | --help) sed -n '2,6p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;; esac

# Hits in any clone of the repository, wherever it lies.
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
export CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
export CCACHE_MAXSIZE=${CCACHE_MAXSIZE:-5G}
export NINJA_STATUS='build: [%f/%t, %e s] '

memory_jobs=$(awk '/^MemAvailable/ {print int($2 / 2097152)}' /proc/meminfo)
jobs=$(nproc)
if [ "$memory_jobs" -lt "$jobs" ]; then jobs=$((memory_jobs > 0 ? memory_jobs : 1)); fi

# Configures only when there is something to configure; ninja itself runs CMake again when a list changed.
if [ ! -f build/build.ninja ] || [ -n "${VSP_CMAKE_ARGS:-}" ]; then
  echo "build: configuring"
  # shellcheck disable=SC2086  # several arguments on purpose
  cmake -G Ninja -S . -B build -DCMAKE_BUILD_TYPE=Release ${VSP_CMAKE_ARGS:-}
fi
ninja -C build -j "${VSP_JOBS:-$jobs}" "$@"
