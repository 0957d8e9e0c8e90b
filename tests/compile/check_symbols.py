# SPDX-License-Identifier: Apache-2.0
"""Fails if objects compiled for different instruction sets share an inline function of the library."""
import argparse
import itertools
import subprocess
import sys


def weak_symbols(nm, path):
    """The mangled names that the linker would merge across objects."""
    text = subprocess.run([nm, "--defined-only", path], check=True, capture_output=True,
                          text=True).stdout
    fields = (line.split() for line in text.splitlines())
    return {f[-1] for f in fields if len(f) == 3 and f[1] in "WVu"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nm", required=True)
    parser.add_argument("objects", nargs="+")
    arguments = parser.parse_args()
    symbols = {path: weak_symbols(arguments.nm, path) for path in arguments.objects}
    failed = False
    for a, b in itertools.combinations(arguments.objects, 2):
        shared = sorted(s for s in symbols[a] & symbols[b] if "magicpig" in s)
        for symbol in shared:
            print(f"{a} and {b} share {symbol}")
        failed = failed or bool(shared)
    own = sum("magicpig" in s for path in symbols for s in symbols[path])
    print(f"{own} inline functions of the library in {len(symbols)} objects")
    if own == 0:
        print("the check looked at nothing")
    sys.exit(failed or own == 0)


if __name__ == "__main__":
    main()
