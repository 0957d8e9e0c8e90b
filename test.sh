#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# test.sh [PRESET...]: installs what is missing, builds with warnings as errors, runs all tests.
# Presets: release, asan (both by default; asan is compiled by clang++, without exceptions), dev, tsan, arm64 (in QEMU), cuda.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

presets=("$@")
((${#presets[@]})) || presets=(release asan)

groups=(build test)
[[ " ${presets[*]} " != *" arm64 "* ]] || groups+=(arm64)
scripts/install_dependencies.sh "${groups[@]}"
command -v ninja >/dev/null && export CMAKE_GENERATOR="${CMAKE_GENERATOR:-Ninja}"
CTEST_PARALLEL_LEVEL="${CTEST_PARALLEL_LEVEL:-$(nproc)}"
export CTEST_PARALLEL_LEVEL

reports=()
status=0
for preset in "${presets[@]}"; do
  echo "== $preset"
  start=$SECONDS
  cmake --preset "$preset" -DMAGICPIG_WARNINGS_AS_ERRORS=ON --log-level=NOTICE
  cmake --build --preset "$preset" -j "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
  echo "== $preset built in $((SECONDS - start)) s"
  start=$SECONDS
  rm -f "build/$preset/tests.xml"
  ctest --preset "$preset" || status=1
  echo "== $preset tested in $((SECONDS - start)) s"
  reports+=("build/$preset/tests.xml")
done
python3 scripts/count_tests.py "${reports[@]}" || status=1
exit "$status"
