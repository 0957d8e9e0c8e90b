# SPDX-License-Identifier: Apache-2.0
"""Runs magicpig_compare on a small synthetic capture: what its JSON holds, and how it refuses bad options."""
import argparse
import json
import math
import pathlib
import random
import struct
import subprocess
import tempfile

HEADS, KV_HEADS, ROWS, TOKENS, DIM = 4, 2, 8, 700, 16
SINK, LOCAL = 4, 64
MIDDLE = TOKENS - ROWS - LOCAL - SINK
NO_INDEX = ["exact", "topk", "top_p", "uniform", "oracle_multinomial", "oracle_ht"]
METHODS = [*NO_INDEX, "magicpig", "tables", "cross_polytope", "signatures", "trained_signatures", "signature_draws",
           "top_p_estimated", "pq", "quest", "socket", "vattention", "uniform_tail", "double_sparsity", "ivf"]
NO_SEED = ("exact", "topk", "top_p", "quest", "double_sparsity")
FIGURES = [
    "rows",
    "index_bytes_per_token",
    "bytes_read_per_token",
    "error_mean",
    "bias_mean",
    "error_median",
    "error_p95",
    "lse_error_mean",
    "us_per_kv_head",
]


def write_tensors(path, shapes, metadata):
    """A safetensors file of normal fp16 numbers."""
    generator = random.Random(1)
    header, data = {"__metadata__": metadata}, b""
    for name, shape in shapes.items():
        values = [generator.gauss(0, 1) for _ in range(math.prod(shape))]
        begin = len(data)
        data += struct.pack(f"<{len(values)}e", *values)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (begin, len(data))}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_capture(path):
    write_tensors(path, {"q": (HEADS, ROWS, DIM), "k": (KV_HEADS, TOKENS, DIM), "v": (KV_HEADS, TOKENS, DIM)}, {})


def write_weights(path, kv_heads):
    """Random planes as the only layer of a learned hash."""
    write_tensors(path, {"key.0.weight": (kv_heads, 40, DIM), "key.0.bias": (kv_heads, 40)}, {"key.0": ""})


class Contract:
    def __init__(self, program, folder):
        self.program = program
        self.folder = pathlib.Path(folder)
        self.capture = self.folder / "small.one.safetensors"
        write_capture(self.capture)

    def run(self, *options):
        command = [self.program, *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def results(self, *options):
        output = self.folder / "out.json"
        done = self.run(self.capture, "--queries", 3, *options, "--json", output)
        assert done.returncode == 0, done.stderr
        return json.loads(output.read_text())["results"], done.stdout

    def check_all_methods(self):
        results, table = self.results("--seeds", 2)
        assert list(dict.fromkeys(r["method"] for r in results)) == METHODS
        for result in results:
            assert set(result) == {"capture", "method", "setting", "error_by_seed", "error_by_kv_head", *FIGURES}
            by_seed = result["error_by_seed"]
            assert len(by_seed) == (1 if result["method"] in NO_SEED else 2), result
            assert abs(sum(by_seed) / len(by_seed) - result["error_mean"]) < 1e-12
            by_head = result["error_by_kv_head"]
            assert len(by_head) == KV_HEADS and abs(sum(by_head) / KV_HEADS - result["error_mean"]) < 1e-12
            assert result["capture"] == "small.one"
            assert all(math.isfinite(result[figure]) and result[figure] >= 0 for figure in FIGURES)
            assert result["error_median"] <= result["error_p95"]
            assert (result["index_bytes_per_token"] > 0) == (result["method"] not in NO_INDEX)
            assert result["us_per_kv_head"] > 0
            assert result["method"] in table and result["setting"] in table
        keys = [(r["method"], r["setting"]) for r in results]
        assert len(set(keys)) == len(keys)

    def check_learned(self):
        """The weights of a file, and of the capture's name in a folder; without either, words about it."""
        done = self.run(self.capture, "--methods", "exact", "--learned", self.folder)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        done = self.run(self.capture, "--queries", 1, "--seeds", 1, "--rows", 0.5)
        assert "without --learned, learned is NOT measured" in done.stderr, done.stderr
        folder = self.folder / "weights"
        folder.mkdir()
        weights = folder / self.capture.name
        write_weights(weights, KV_HEADS)
        runs = [
            self.results("--methods", "learned,topk", "--rows", "0.02,0.1", "--learned", path)[0]
            for path in (weights, folder)
        ]
        settings = [(r["method"], r["setting"]) for r in runs[0]]
        labels = ["rows=0.02", "rows=0.1", "group rows=0.02", "group rows=0.1"]
        assert settings == [("topk", label) for label in labels[:2]] + [("learned", label) for label in labels]
        for one, other in zip(*runs):
            assert one["error_by_seed"] == other["error_by_seed"]
        for learned, rows in zip(runs[0][2:], (0.02, 0.1) * 2):
            assert abs(learned["rows"] - math.ceil(rows * MIDDLE) / MIDDLE) < 1e-9, learned
            # 40 bits are two words of four bytes, for whole blocks of 256 tokens.
            assert 8 <= learned["index_bytes_per_token"] <= 8 * (MIDDLE + 256) / MIDDLE, learned
        write_weights(folder / "one_head", 1)

    def check_budgets(self):
        results, _ = self.results("--methods", "topk,exact,oracle_ht", "--rows", "0.02,0.1")
        assert [r["method"] for r in results] == ["exact", *["topk"] * 2, *["oracle_ht"] * 2]
        exact, *rest = results
        # Float sums of 700 terms against double; 1e-5 is 100 roundings.
        row_bytes = 2 * 2 * DIM
        assert exact["bytes_read_per_token"] == row_bytes
        assert exact["rows"] == 1 and exact["error_p95"] < 1e-5 and exact["lse_error_mean"] < 1e-5
        for result, fraction in zip(rest[:2], (0.02, 0.1)):
            assert abs(result["rows"] - math.ceil(fraction * MIDDLE) / MIDDLE) < 1e-9, result
            # Every key is looked at before rows are chosen.
            assert abs(result["bytes_read_per_token"] - row_bytes / 2 - row_bytes * result["rows"]) < 1e-9, result
        assert rest[0]["error_mean"] > rest[1]["error_mean"] > 0

    def check_bytes_read(self):
        results, _ = self.results("--methods", "uniform,signatures,quest,socket,tables", "--rows", "0.05", "--seeds", 1)
        for result in results:
            rows = 4 * DIM * result["rows"]
            index = result["bytes_read_per_token"] - rows
            setting = dict(part.split("=") for part in result["setting"].split() if "=" in part)
            if result["method"] == "tables":
                # Some of the 2 L bytes of ids, offsets, and 4 bytes for the norm of each row.
                most = int(setting["L"]) * 2 + 4 * result["rows"]
                offsets = HEADS // KV_HEADS * 4 * int(setting["L"]) * (1 + 14) / MIDDLE
                assert 0 < index < most + offsets, result
                continue
            expected = {
                "uniform": lambda: 0,
                "signatures": lambda: int(setting["bits"]) * DIM / 8 + 4,
                "quest": lambda: 4 * DIM * math.ceil(MIDDLE / int(setting["page"])) / MIDDLE,
                "socket": lambda: 2 * int(setting["L"]) + 4,
            }[result["method"]]()
            assert abs(index - expected) < 1e-9, result

    def check_context(self):
        """A shorter context has fewer tokens between sink and window, and its own exact attention."""
        options = ("--methods", "exact,topk", "--rows", 0.1, "--context")
        for context in (TOKENS - 300, TOKENS, 10 * TOKENS):
            (exact, top_k), _ = self.results(*options, context)
            middle = MIDDLE - max(0, TOKENS - context)
            assert exact["error_p95"] < 1e-5
            assert abs(top_k["rows"] - math.ceil(0.1 * middle) / middle) < 1e-9, top_k
        done = self.run(self.capture, *options, 10)
        assert done.returncode == 2 and "no token lies between" in done.stderr, done.stderr

    def check_biases(self):
        """The mean over seeds is off by the whole error where nothing is drawn, and by less where something is."""
        (top_k, uniform), _ = self.results("--methods", "topk,uniform", "--rows", 0.2, "--seeds", 30)
        assert abs(top_k["bias_mean"] - top_k["error_mean"]) < 1e-9
        assert uniform["bias_mean"] < uniform["error_mean"] / 3

    def check_reproducible(self):
        options = ("--methods", "topk,uniform,oracle_multinomial,magicpig", "--rows", 0.05)
        runs = [self.results(*options, "--threads", n, "--seeds", 2)[0] for n in (1, 3)]
        fewer = self.results(*options, "--seeds", 1)[0]
        for one, other, first in zip(*runs, fewer):
            same = {k for k in one if k != "us_per_kv_head"}
            assert all(one[k] == other[k] for k in same), (one, other)
            # A second seed changes what is drawn, but not TopK.
            assert (one["error_mean"] == first["error_mean"]) == (one["method"] == "topk")

    def check_refusals(self):
        other = self.folder / "other"
        other.mkdir()
        twin = other / self.capture.name
        twin.write_bytes(self.capture.read_bytes())
        spoilt = self.folder / "spoilt.safetensors"
        spoilt.write_bytes(self.capture.read_bytes()[:-1])
        for options, words in (
            ((), ["FILE"]),
            ((self.capture, "--methods", "topk,nonesuch"), ["nonesuch", *METHODS]),
            ((self.folder / "absent.safetensors",), ["absent.safetensors"]),
            ((spoilt,), ["spoilt.safetensors", "v.data_offsets"]),
            ((self.capture, twin), ["small.one"]),
            ((self.capture, "--rows", "0"), ["--rows"]),
            ((self.capture, "--rows", "1.5"), ["--rows"]),
            ((self.capture, "--rows", "x"), ["--rows"]),
            ((self.capture, "--seeds", "0"), ["--seeds"]),
            ((self.capture, "--queries", "-1"), ["--queries"]),
            ((self.capture, "--threads", "0"), ["--threads"]),
            ((self.capture, "--local", "-1"), ["--local"]),
            ((self.capture, "--sink", str(TOKENS)), ["--sink", "--local"]),
            ((self.capture, "--methods", "exact", "--json", self.folder), [str(self.folder)]),
            ((self.capture, "--nonesuch"), ["--nonesuch"]),
            ((self.capture, "--methods", "learned"), ["learned", "--learned"]),
            ((self.capture, "--methods", "learned", "--learned", other), [str(twin), "key.0.weight"]),
            ((self.capture, "--methods", "learned", "--learned", "absent"), ["absent: cannot be opened"]),
            (
                (self.capture, "--methods", "learned", "--learned", self.folder / "weights" / "one_head"),
                ["one_head", "2 KV heads", "the index 1"],
            ),
        ):
            done = self.run(*options)
            assert done.returncode == 2, (options, done.returncode)
            assert all(word in done.stderr for word in words), (options, done.stderr)
        assert self.run("--help").returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", help="magicpig_compare")
    program = parser.parse_args().program
    with tempfile.TemporaryDirectory() as folder:
        contract = Contract(program, folder)
        contract.check_all_methods()
        contract.check_learned()
        contract.check_budgets()
        contract.check_bytes_read()
        contract.check_context()
        contract.check_biases()
        contract.check_reproducible()
        contract.check_refusals()
    print("the contract holds")


if __name__ == "__main__":
    main()
