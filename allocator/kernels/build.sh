#!/usr/bin/env bash
# Makes NAME.ptx.inc, a C++ string literal, from each NAME.cu: for whoever changes a kernel. Users need no CUDA
# compiler, the result is committed and the driver translates it. Its header is lowered to the oldest ISA that knows
# the instructions used, so that drivers older than the compiler take it.
set -euo pipefail
cd "$(dirname "$0")"
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

for name in digest copy pack; do
  nvcc -std=c++17 -O3 -arch=compute_75 -ptx "$name.cu" -o "$made/$name.ptx"
  sed -i -e '/^[[:space:]]*\/\//d' -e 's/^\.version .*/.version 6.3/' -e 's/^\.target .*/.target sm_70/' \
    -e '/^[[:space:]]*$/d' "$made/$name.ptx"
  for arch in sm_75 sm_90 sm_120; do ptxas -arch="$arch" "$made/$name.ptx" -o /dev/null; done
  { printf 'R"ptx('; cat "$made/$name.ptx"; printf ')ptx"\n'; } > "$name.ptx.inc"
done
