# SPDX-License-Identifier: Apache-2.0
"""Runs magicpig_tune on a small synthetic capture and magicpig_compare on its profile, and both on bad ones."""
import argparse
import json
import pathlib
import subprocess
import tempfile

from compare_contract import DIM, KV_HEADS, write_capture

QUICK = ("--queries", 2, "--seeds", 1)


class Contract:
    def __init__(self, programs, folder):
        self.tune, self.compare = programs
        self.folder = pathlib.Path(folder)
        self.capture = self.folder / "small.safetensors"
        write_capture(self.capture)

    def run(self, program, *options):
        return subprocess.run([program, *map(str, options)], capture_output=True, text=True, check=False)

    def tuned(self, *options):
        """The profile, as text."""
        output = self.folder / "profile.json"
        done = self.run(self.tune, self.capture, *QUICK, *options, "--profile", output)
        assert done.returncode == 0, done.stderr
        return output.read_text()

    def judged(self, profile, *options):
        """The results of a profile."""
        path, output = self.folder / "judged.json", self.folder / "out.json"
        path.write_text(profile)
        done = self.run(self.compare, self.capture, "--profile", path, "--queries", 4, "--seeds", 2, *options,
                        "--json", output)
        assert done.returncode == 0, done.stderr
        return json.loads(output.read_text())["results"]

    def check_profile(self):
        text = self.tuned("--error", 0.9, "--threads", 1)
        assert text == self.tuned("--error", 0.9, "--threads", 3)
        layer, = json.loads(text)["layers"]
        assert layer["name"] == "small" and len(layer["kv_heads"]) == KV_HEADS
        result, = self.judged(text, "--row-set", "odd")
        assert result["method"] == "profile" and len(result["error_by_seed"]) == 2
        # Tuned on 2 queries and one seed of random keys: no more than twice what was asked for.
        assert 0 < result["error_mean"] < 1.8, result
        assert 0 < result["bytes_read_per_token"] < 4 * DIM

    def check_exact(self):
        text = self.tuned("--error", 0)
        layer, = json.loads(text)["layers"]
        assert layer["kv_heads"] == [{"kind": "exact"}] * KV_HEADS
        result, *others = self.judged(text, "--methods", "exact,uniform")[::-1]
        assert result["method"] == "profile" and [r["method"] for r in others] == ["uniform"] * 4 + ["exact"]
        # Float sums of 700 terms against double; 1e-5 is 100 roundings.
        assert result["error_mean"] < 1e-5 and result["bytes_read_per_token"] == 4 * DIM
        assert result["index_bytes_per_token"] == 0

    def check_bytes(self):
        for budget, scanned in ((0.5, (2 * DIM / 8 + 4) / 2), (1, 0)):
            heads = [{"kind": "signatures", "bits": 2, "budget": budget}, {"kind": "exact"}]
            profile = {"profile": 1, "layers": [{"name": "small", "kv_heads": heads}]}
            result, = self.judged(json.dumps(profile))
            assert (result["rows"] < 0.9) == (budget < 1), result
            # Rows of both heads, and 2 bits with norms of one of them, unless all rows are drawn from it.
            assert abs(result["bytes_read_per_token"] - 4 * DIM * result["rows"] - scanned) < 1e-9, result

    def check_kinds(self):
        # At an error that any draw meets all kinds but the asked-for are left out.
        for kinds, found in (("tables", "tables"), ("uniform", "uniform"), ("signatures", "trained_signatures")):
            layer, = json.loads(self.tuned("--error", 1, "--margin", 0, "--kinds", kinds))["layers"]
            assert {head["kind"] for head in layer["kv_heads"]} <= {found, "exact"}, layer
        layer, = json.loads(self.tuned("--error", 0.9, "--kinds", "uniform,tables"))["layers"]
        assert {head["kind"] for head in layer["kv_heads"]} <= {"uniform", "tables", "exact"}, layer

    def check_tables(self):
        for rho in (0, 0.005):
            head = {"kind": "tables", "functions": 10, "tables": 75, "uniform_part": rho}
            profile = {"profile": 1, "layers": [{"name": "small", "kv_heads": [head] * KV_HEADS}]}
            *plain, own = self.judged(json.dumps(profile), "--methods", "tables")
            label = "K=10 L=75 t=2" + (f" rho={rho}" if rho else "")
            same, = (result for result in plain if result["setting"] == label)
            # The very draws of tables that all heads share, through tables of each head alone.
            for name in ("error_by_seed", "rows", "bytes_read_per_token", "index_bytes_per_token"):
                assert own[name] == same[name], (label, name, own[name], same[name])

    def check_refusals(self):
        def profile(heads, name="small"):
            path = self.folder / "bad.json"
            path.write_text(json.dumps({"profile": 1, "layers": [{"name": name, "kv_heads": heads}]}))
            return path

        spoilt = self.folder / "spoilt.json"
        spoilt.write_text("{")
        exact = [{"kind": "exact"}] * KV_HEADS
        for make, words in (
            (lambda: self.folder / "absent.json", ["absent.json", "read"]),
            (lambda: spoilt, ["spoilt.json", "JSON"]),
            (lambda: profile(exact, "other"), ["no layer", "small"]),
            (lambda: profile(exact + exact), ["small", f"profile of {2 * KV_HEADS} KV heads", str(KV_HEADS)]),
            (lambda: profile([{"kind": "uniform", "budget": 2}] * 2), ["bad.json", "KV head 0", "budget 2"]),
            (lambda: profile([{"kind": "tables", "functions": 16, "tables": 1}] * 2), ["bad.json", "functions", "1 to 15"]),
        ):
            done = self.run(self.compare, self.capture, "--profile", make())
            assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
        for options, words in (
            ((), ["FILE"]),
            ((self.folder / "absent.safetensors",), ["absent.safetensors"]),
            ((self.capture, self.capture), ["small"]),
            ((self.capture, "--error", "-1"), ["--error"]),
            ((self.capture, "--margin", "1"), ["--margin"]),
            ((self.capture, "--kinds", "magic"), ["--kinds", "magic"]),
            ((self.capture, *QUICK, "--profile", self.folder), [str(self.folder)]),
        ):
            done = self.run(self.tune, *options)
            assert done.returncode == 2 and all(word in done.stderr for word in words), (options, done.stderr)
        assert self.run(self.tune, "--help").returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs=2, help="magicpig_tune and magicpig_compare")
    programs = parser.parse_args().programs
    with tempfile.TemporaryDirectory() as folder:
        contract = Contract(programs, folder)
        contract.check_profile()
        contract.check_exact()
        contract.check_bytes()
        contract.check_kinds()
        contract.check_tables()
        contract.check_refusals()
    print("the contract holds")


if __name__ == "__main__":
    main()
