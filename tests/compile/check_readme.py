# SPDX-License-Identifier: Apache-2.0
# Checks that the C++ the README shows is examples/hello.cpp to the letter, and that of other pages part of
# theirs, so that what is read is what is tested.
import pathlib
import re
import sys

root = pathlib.Path(sys.argv[1])


def blocks_of(page):
    return re.findall(r"```cpp\n(.*?)```", (root / page).read_text(encoding="utf-8"), re.DOTALL)


hello = (root / "examples/hello.cpp").read_text(encoding="utf-8")
if hello not in blocks_of("README.md"):
    sys.exit("README.md: no C++ block equals examples/hello.cpp")
counts = []
for page, source in (
    ("docs/layouts.md", "examples/layouts.cpp"),
    ("docs/embedding.md", "examples/llama_cpp/layer_attention.cpp"),
    ("docs/cuda.md", "examples/device/decode.cu"),
):
    text = (root / source).read_text(encoding="utf-8")
    shown = blocks_of(page)
    if not shown:
        sys.exit(f"{page}: no C++ block")
    for block in shown:
        if block not in text:
            sys.exit(f"{page}: not in {source}:\n{block}")
    counts.append(f"{page} {len(shown)} parts of {source}")
print("README.md shows examples/hello.cpp, " + ", ".join(counts))
