# SPDX-License-Identifier: Apache-2.0
"""Fails if objects compiled for different instruction sets share an inline function of the library.

What third-party headers define is counted and not judged: Eigen names its functions alike for all flags, xsimd some of
its own, as cpu/eigen.hpp and cpu/xsimd.hpp say, and no namespace of ours can change that.
"""
import argparse
import itertools
import re
import subprocess
import sys


def weak_symbols(nm, path):
    """The mangled names that the linker would merge across objects."""
    text = subprocess.run([nm, "--defined-only", path], check=True, capture_output=True,
                          text=True).stdout
    fields = (line.split() for line in text.splitlines())
    return {f[-1] for f in fields if len(f) == 3 and f[1] in "WVu"}


# Outer namespaces in mangled names: _ZN5Eigen..., _ZNK5xsimd..., _ZN3hwy...
THIRD_PARTY = re.compile(r"^_ZN?[A-Z]*?(?:5(Eigen|xsimd)|3(hwy))")


def third_party_counts(symbols):
    counts = {}
    for match in filter(None, map(THIRD_PARTY.match, symbols)):
        name = match.group(1) or match.group(2)
        counts[name] = counts.get(name, 0) + 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nm", required=True)
    parser.add_argument("objects", nargs="+")
    arguments = parser.parse_args()
    symbols = {path: weak_symbols(arguments.nm, path) for path in arguments.objects}
    failed = False
    shared_by_any = set()
    for a, b in itertools.combinations(arguments.objects, 2):
        shared = sorted(s for s in symbols[a] & symbols[b] if "magicpig" in s)
        for symbol in shared:
            print(f"{a} and {b} share {symbol}")
        failed = failed or bool(shared)
        shared_by_any |= symbols[a] & symbols[b]
    own = sum("magicpig" in s for path in symbols for s in symbols[path])
    print(f"{own} inline functions of the library in {len(symbols)} objects")
    for name, count in sorted(third_party_counts(shared_by_any).items()):
        print(f"NOT checked: {count} inline functions of {name} are shared")
    if own == 0:
        print("the check looked at nothing")
    sys.exit(failed or own == 0)


if __name__ == "__main__":
    main()
