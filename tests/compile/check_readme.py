# SPDX-License-Identifier: Apache-2.0
# Checks that the C++ the README shows is examples/hello.cpp to the letter, and that of docs/layouts.md part of
# examples/layouts.cpp, so that what is read is what is tested.
import pathlib
import re
import sys

root = pathlib.Path(sys.argv[1])


def blocks_of(page):
    return re.findall(r"```cpp\n(.*?)```", (root / page).read_text(encoding="utf-8"), re.DOTALL)


hello = (root / "examples/hello.cpp").read_text(encoding="utf-8")
if hello not in blocks_of("README.md"):
    sys.exit("README.md: no C++ block equals examples/hello.cpp")
layouts = (root / "examples/layouts.cpp").read_text(encoding="utf-8")
shown = blocks_of("docs/layouts.md")
if not shown:
    sys.exit("docs/layouts.md: no C++ block")
for block in shown:
    if block not in layouts:
        sys.exit("docs/layouts.md: not in examples/layouts.cpp:\n" + block)
print(f"README.md shows examples/hello.cpp, docs/layouts.md {len(shown)} parts of examples/layouts.cpp")
