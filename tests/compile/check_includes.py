# SPDX-License-Identifier: Apache-2.0
"""Checks which header may include which: the layers, and third-party headers in their component only."""
import pathlib
import re
import sys

# A folder sees itself and the layers before its own: cpu and cuda, for one, never include each other.
LAYERS = [{"version.hpp"}, {"core"}, {"hash", "estimate"}, {"index"}, {"sample"}, {"request.hpp"},
          {"cpu", "cuda"}, {"decode_layout.hpp"}, {"attention.hpp"}, {"plan"}, {"planner.hpp"}]
# Header prefix -> the third-party headers that it may include.
THIRD_PARTY = {"cpu/highway": ("hwy/",), "cpu/eigen": ("Eigen/",), "cpu/xsimd": ("xsimd/",),
               "cpu/openmp": ("omp.h",), "core/huge_pages": ("sys/mman.h", "unistd.h"),
               "cuda/": ("cuda", "cublas", "cub/")}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
# <vector>, <cstdint>: no folder and no suffix. Of the C headers, math.h: its functions are not inline.
STANDARD = re.compile(r"^([a-z_0-9]+|math\.h)$")


def place(header):
    """Folder below include/magicpig, or the file's own name at the top."""
    return header.split("/")[0]


def layer(header):
    return next((i for i, names in enumerate(LAYERS) if place(header) in names), None)


def own_include_error(header, target, existing):
    if target not in existing:
        return f"includes magicpig/{target}, which does not exist"
    if layer(target) is None or layer(target) > layer(header):
        return f"includes {target}, of a higher layer"
    if layer(target) == layer(header) and place(target) != place(header):
        return f"includes {target}, of another folder in its own layer"
    return None


def foreign_include_error(header, target):
    if header.endswith(".hpp") and target.startswith(("cuda", "cub")):
        return f"includes {target}: only a .cuh may include CUDA"
    if STANDARD.match(target):
        return None
    for prefix, allowed in THIRD_PARTY.items():
        if header.startswith(prefix) and target.startswith(allowed):
            return None
    return f"includes {target}, which is neither ours nor standard"


def find_cycle(graph):
    done, path = set(), []

    def visit(header):
        if header in path:
            return path[path.index(header):] + [header]
        if header in done:
            return None
        path.append(header)
        cycle = next(filter(None, map(visit, sorted(graph[header]))), None)
        path.pop()
        done.add(header)
        return cycle

    return next(filter(None, map(visit, sorted(graph))), None)


def check(root):
    headers = {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if p.is_file()}
    errors, graph = [], {name: set() for name in headers}
    for name, path in headers.items():
        if layer(name) is None:
            errors.append(f"{name}: its folder belongs to no layer")
            continue
        for quote, target in INCLUDE.findall(path.read_text()):
            own = target.startswith("magicpig/")
            if own:
                target = target.removeprefix("magicpig/")
                error = own_include_error(name, target, headers)
                # An -inl header that includes itself through Highway's foreach_target is no cycle.
                if error is None and target != name:
                    graph[name].add(target)
            elif quote == '"' and not target.startswith(("hwy/",)):
                error = f'includes "{target}": spell it "magicpig/..."'
            else:
                error = foreign_include_error(name, target)
            if error:
                errors.append(f"{name}: {error}")
    cycle = find_cycle(graph)
    if cycle:
        errors.append("cycle: " + " -> ".join(cycle))
    return len(headers), errors


def main():
    count, errors = check(pathlib.Path(sys.argv[1]) / "magicpig")
    print("\n".join(errors + [f"{count} headers, {len(errors)} errors"]))
    sys.exit(bool(errors) or count == 0)


if __name__ == "__main__":
    main()
