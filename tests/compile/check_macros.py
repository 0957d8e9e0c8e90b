# SPDX-License-Identifier: Apache-2.0
"""Checks that the headers define no macro but MAGICPIG_*, and compile where min and max are macros."""
import argparse
import pathlib
import re
import subprocess
import sys

INCLUDE = re.compile(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", re.MULTILINE)
# What windows.h does to its users.
MIN_MAX = """
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))
"""


def compile_source(arguments, source, flags):
    command = [arguments.compiler, "-std=c++20", "-x", "c++", *arguments.flags, *flags, "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True)


def macros(arguments, source):
    result = compile_source(arguments, source, ["-dM", "-E"])
    if result.returncode:
        sys.exit(result.stderr)
    return {re.match(r"#define (\w+)", line).group(1) for line in result.stdout.splitlines()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--include-dir", type=pathlib.Path, required=True)
    parser.add_argument("headers", nargs="+")
    arguments, arguments.flags = parser.parse_known_args()

    texts = [(arguments.include_dir / header).read_text() for header in arguments.headers]
    foreign = {h for text in texts for h in INCLUDE.findall(text) if not h.startswith("magicpig/")}
    theirs = "".join(f"#include <{h}>\n" for h in sorted(foreign))
    ours = "".join(f"#include <{h}>\n" for h in arguments.headers)

    leaked = sorted(m for m in macros(arguments, theirs + ours) - macros(arguments, theirs)
                    if not m.startswith("MAGICPIG_"))
    for macro in leaked:
        print(f"the headers leak the macro {macro}")
    hostile = compile_source(arguments, theirs + MIN_MAX + ours, ["-fsyntax-only"])
    if hostile.returncode:
        print(f"with min and max as macros the headers do not compile:\n{hostile.stderr}")
    print(f"{len(arguments.headers)} headers, {len(leaked)} macros leaked")
    sys.exit(bool(leaked) or hostile.returncode != 0)


if __name__ == "__main__":
    main()
