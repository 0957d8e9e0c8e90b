# SPDX-License-Identifier: Apache-2.0
"""Fails if an object that dispatches at run time uses an instruction set outside the functions of its target.

Functions of a target have its namespace in their names, their own or that of a template argument. AVX-512 is for
those of AVX3 only, AVX and BMI for those of AVX2 and AVX3 only.
"""
import argparse
import collections
import re
import subprocess
import sys

FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
TARGET = re.compile(r"N_(AVX3_DL|AVX3|AVX2|SSE4|SSSE3|EMU128|SCALAR)")
# User code knows no older instructions that begin with v. (tzcnt is left out: older processors take it for bsf.)
VEX = re.compile(r"^(v|(andn|bextr|blsi|blsmsk|blsr|bzhi|lzcnt|mulx|pdep|pext|rorx|sarx|shlx|shrx)[lq]?\b)")
EVEX = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2[0-9]|3[01])\b")
WITH_AVX512 = {"AVX3_DL", "AVX3"}
WITH_AVX = WITH_AVX512 | {"AVX2"}


def functions(objdump, path):
    """(name, instructions as text) of each function."""
    text = subprocess.run([objdump, "-d", "--no-show-raw-insn", path], check=True,
                          capture_output=True, text=True).stdout
    name, lines = None, []
    for line in text.splitlines():
        start = FUNCTION.match(line)
        if start:
            if name:
                yield name, lines
            name, lines = start.group(1), []
        elif "\t" in line:
            lines.append(line.split("\t", 1)[1].strip())
    if name:
        yield name, lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objdump", required=True)
    parser.add_argument("objects", nargs="+")
    arguments = parser.parse_args()
    found = collections.defaultdict(lambda: [0, 0, 0])
    failed = False
    for path in arguments.objects:
        for name, lines in functions(arguments.objdump, path):
            targets = set(TARGET.findall(name)) or {"no target"}
            avx = any(VEX.match(line) for line in lines)
            avx512 = any(EVEX.search(line) for line in lines)
            if avx and not targets <= WITH_AVX or avx512 and not targets <= WITH_AVX512:
                print(f"{name} of {', '.join(sorted(targets))} uses {'AVX-512' if avx512 else 'AVX'}")
                failed = True
            for target in targets:
                found[target] = [n + k for n, k in zip(found[target], (1, avx, avx512))]
    for target, (count, avx, avx512) in sorted(found.items()):
        print(f"{target}: {count} functions, {avx} with AVX, {avx512} with AVX-512")
    # Otherwise the check looked at nothing, or does not know AVX when it sees it.
    seen = found["AVX3"][2] and found["AVX2"][1] and found["no target"][0]
    if not seen:
        print("no AVX-512 in AVX3, no AVX in AVX2, or no function outside: nothing was checked")
    sys.exit(failed or not seen)


if __name__ == "__main__":
    main()
