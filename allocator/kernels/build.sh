#!/usr/bin/env bash
# Makes digest.ptx.inc, a C++ string literal, from digest.cu: for whoever changes the kernel. Users need no CUDA
# compiler, the result is committed and the driver translates it. Its header is lowered to the oldest ISA that knows
# the instructions used, so that drivers older than the compiler take it.
set -euo pipefail
cd "$(dirname "$0")"
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

nvcc -std=c++17 -O3 -arch=compute_75 -ptx digest.cu -o "$made/digest.ptx"
sed -i -e '/^[[:space:]]*\/\//d' -e 's/^\.version .*/.version 6.3/' -e 's/^\.target .*/.target sm_70/' \
  -e '/^[[:space:]]*$/d' "$made/digest.ptx"
for arch in sm_75 sm_90 sm_120; do ptxas -arch="$arch" "$made/digest.ptx" -o /dev/null; done
{ printf 'R"ptx('; cat "$made/digest.ptx"; printf ')ptx"\n'; } > digest.ptx.inc
