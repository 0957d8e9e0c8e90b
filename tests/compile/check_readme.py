# SPDX-License-Identifier: Apache-2.0
# Checks that the C++ the README shows is examples/hello.cpp to the letter, so that what is read is what is tested.
import pathlib
import re
import sys

root = pathlib.Path(sys.argv[1])
readme = (root / "README.md").read_text(encoding="utf-8")
hello = (root / "examples/hello.cpp").read_text(encoding="utf-8")
blocks = re.findall(r"```cpp\n(.*?)```", readme, re.DOTALL)
if hello not in blocks:
    sys.exit("README.md: no C++ block equals examples/hello.cpp")
print("README.md shows examples/hello.cpp")
