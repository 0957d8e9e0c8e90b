#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# install_dependencies.sh GROUP...: installs the Debian packages of the groups that are missing; see below for groups.
# MAGICPIG_SKIP_INSTALL=1 skips it; CMake then finds what is there and fetches pinned archives of the rest.
set -euo pipefail

packages_of() {
  case "$1" in
    build) echo g++ cmake ninja-build libhwy-dev libxsimd-dev libeigen3-dev nlohmann-json3-dev libcli11-dev libbenchmark-dev doctest-dev ;;
    plot) echo python3 python3-matplotlib ;;
    test) echo pkg-config python3 python3-numpy clang libclang-rt-14-dev libomp-dev ;;
    ci) echo clang-format ;;
    llama_cpp) echo python3 python3-venv bible-kjv bible-kjv-text ;;
    arm64) echo g++-aarch64-linux-gnu qemu-user ;;
    *) echo "install_dependencies.sh: unknown group $1 (build, plot, test, ci, llama_cpp, arm64)" >&2; return 1 ;;
  esac
}

is_installed() {
  [[ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" == installed ]]
}

[[ "${MAGICPIG_SKIP_INSTALL:-0}" == 0 ]] || exit 0
if ! command -v apt-get >/dev/null; then
  echo "install_dependencies.sh: no apt-get here, so nothing is installed; CMake will say what it lacks" >&2
  exit 0
fi

missing=()
for group in "$@"; do
  for package in $(packages_of "$group"); do
    is_installed "$package" || missing+=("$package")
  done
done
((${#missing[@]})) || exit 0

as_root=()
if ((EUID != 0)); then
  if ! command -v sudo >/dev/null; then
    echo "install_dependencies.sh: missing packages, and neither root nor sudo to install them. Run as root:" >&2
    echo "  apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" </dev/null; }
install_missing() { apt install -y --no-install-recommends "${missing[@]}"; }

echo "Installing from Debian: ${missing[*]}"
# A new machine has no package lists and an old one stale lists; otherwise the update is not needed.
for package in "${missing[@]}"; do
  apt-cache show "$package" >/dev/null 2>&1 || { apt update; break; }
done
install_missing >/dev/null || { apt update && install_missing >/dev/null; }
