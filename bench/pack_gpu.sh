#!/usr/bin/env bash
# Packs GPU programs for a machine without this source's build environment: stripped binaries and
# the libraries that are neither glibc, libstdc++ nor torch's (CUDA's come with torch).
#
#   bench/pack_gpu.sh [BUILD_DIR] [DEST]      default: build .carry
#
# On the GPU machine: bench/gpu_all.sh DEST
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build}
dest=${2:-.carry}
programs=(tests/cuda_kernels_test tests/base_cuda_test bin/kernel_bench bin/vsprefill-server bin/vsprefill-decode
  bin/vsprefill bin/vsprefill-distill bin/vsprefill-eval bin/prefill_bench)

rm -rf "${dest:?}/bin" "${dest:?}/lib"  # other files there stay: models, corpora
mkdir -p "$dest/bin" "$dest/lib"
for program in "${programs[@]}"; do
  if [[ ! -x $build/$program ]]; then
    echo "not built, left out: $program"
    continue
  fi
  strip -o "$dest/bin/$(basename "$program")" "$build/$program"
  while read -r library; do
    case $library in
      */site-packages/*) ;; # torch and CUDA
      */ld-linux* | */libc.so* | */libm.so* | */libdl.so* | */libpthread.so* | */librt.so* | \
        */libstdc++.so* | */libgcc_s.so*) ;;
      *) cp -Ln "$library" "$dest/lib/" ;;
    esac
  done < <(ldd "$build/$program" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }')
done
find "$dest/lib" -type f -exec strip --strip-unneeded {} +
du -sh "$dest"
