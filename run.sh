#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# run.sh [OPTION...]: installs what is missing, builds, and compares the estimators on attention of a real language model.
# Options go to magicpig_compare, such as --methods tables,exact or --seeds 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

scripts/install_dependencies.sh build plot
command -v ninja >/dev/null && export CMAKE_GENERATOR="${CMAKE_GENERATOR:-Ninja}"
cmake --preset release --log-level=NOTICE
cmake --build --preset release -j "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" --target magicpig_compare

results=build/results
mkdir -p "$results"
build/release/bench/magicpig_compare examples/captures/*.safetensors --json "$results/compare.json" "$@"

# Debian's Python, where matplotlib was installed, may not be the first in PATH.
python=python3
"$python" -c 'import matplotlib' 2>/dev/null || python=/usr/bin/python3
"$python" bench/plot.py "$results/compare.json" --output "$results/compare"

cat <<END

Table     printed above
Results   $results/compare.json
Plot      $results/compare.svg and $results/compare.png
END
