# SPDX-License-Identifier: Apache-2.0
"""The virtual environment that the peers run in: made once, in the repository's build folder."""
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
VENV = HERE.parents[1] / "build" / "peers" / "venv"
PYTHON = VENV / "bin" / "python"
# For the CPU of this machine, and without the parts of llama.cpp that read images.
CMAKE_ARGS = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"


def is_active():
    return Path(sys.prefix).resolve() == VENV.resolve()


def install():
    """Makes the environment, unless it is there and was made from the same requirements."""
    stamp = VENV / "installed-from.txt"
    wanted = f"{REQUIREMENTS.read_text()}{CMAKE_ARGS}\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Installing into {VENV}: some gigabytes, and minutes for llama.cpp", file=sys.stderr)
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        # No cache: a wheel in it may have been compiled with other options or for another CPU.
        pip = [PYTHON, "-m", "pip", "install", "--no-cache-dir", "--requirement", REQUIREMENTS]
        subprocess.run(pip, check=True, env={**os.environ, "CMAKE_ARGS": CMAKE_ARGS})
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(map(str, error.cmd))} failed; the lines above say why")
    stamp.write_text(wanted)


def run_inside(arguments, huge_pages):
    """Replaces this process by one of the environment's Python; does not return."""
    # NumPy reads it as it is loaded, and owns all memory that the peers read.
    variables = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "1" if huge_pages else "0"}
    os.execve(PYTHON, [str(PYTHON), *arguments], variables)
