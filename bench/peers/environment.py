# SPDX-License-Identifier: Apache-2.0
"""What peers.py runs in, made in the repository's build folder: a virtual environment, and our library."""
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
INCLUDE = HERE.parents[1] / "include"
BUILD = HERE.parents[1] / "build" / "peers"
VENV = BUILD / "venv"
PYTHON = VENV / "bin" / "python"
SOURCE = HERE / "ours.cpp"
LIBRARY = BUILD / "libours.so"
# For the CPU of this machine, and without the parts of llama.cpp that read images.
CMAKE_ARGS = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
# As CMake's preset for releases, for this CPU too. Highway asks for the definition where that has AVX-512.
CXX_FLAGS = "-std=c++20 -O3 -DNDEBUG -march=native -DHWY_WANT_AVX3_DL -pthread -shared -fPIC".split()


def is_active():
    return Path(sys.prefix).resolve() == VENV.resolve()


def install():
    """Makes the environment, unless it is there and was made from the same requirements."""
    stamp = VENV / "installed-from.txt"
    wanted = f"{REQUIREMENTS.read_text()}{CMAKE_ARGS}\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Installing into {VENV}: some gigabytes, and minutes for llama.cpp", file=sys.stderr)
    run([sys.executable, "-m", "venv", "--clear", VENV])
    # No cache: a wheel in it may have been compiled with other options or for another CPU.
    pip = [PYTHON, "-m", "pip", "install", "--no-cache-dir", "--requirement", REQUIREMENTS]
    run(pip, env={**os.environ, "CMAKE_ARGS": CMAKE_ARGS})
    stamp.write_text(wanted)


def compile_ours():
    """Makes the library, unless it is newer than all that it is made from."""
    sources = [SOURCE, Path(__file__), *INCLUDE.rglob("*.hpp")]
    newest = max(source.stat().st_mtime for source in sources)
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > newest:
        return
    run([os.environ.get("CXX", "g++"), *CXX_FLAGS, "-I", INCLUDE, SOURCE, "-o", LIBRARY])


def run(command, env=None):
    """Ends the program unless the command succeeds."""
    words = " ".join(map(str, command))
    try:
        subprocess.run(command, check=True, env=env)
    except subprocess.CalledProcessError:
        sys.exit(f"error: {words} failed; the lines above say why")
    except OSError as error:
        sys.exit(f"error: {words}: {error.strerror}")


def run_inside(arguments, huge_pages):
    """Replaces this process by one of the environment's Python; does not return."""
    # NumPy reads it as it is loaded, and owns all memory that the peers read.
    variables = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "1" if huge_pages else "0"}
    os.execve(PYTHON, [str(PYTHON), *arguments], variables)
