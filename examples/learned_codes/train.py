# SPDX-License-Identifier: Apache-2.0
"""Trains learned codes on captures: two tokens' order by their bits is to be that by their logits."""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from evaluate import SINK, load_capture
from safetensors.numpy import save_file

LOCAL = 64
# One step: ROWS query rows from SPAN that follow each other, and KEYS tokens that all of them see, the
# TOP of which are to come before OTHERS.
ROWS, SPAN, KEYS, TOP, OTHERS = 8, 256, 2048, 0.02, 256
# The sign while training: softsign(g x) = g x / (1 + g |x|), with g growing from the first to the last step.
SLOPES = 1.0, 64.0

SHAPES = {
    # One function for queries and keys, two residual layers of head_dim, as the released code has it.
    "spotlight": {"shared": True, "residual": True, "layers": 2},
    # W2 silu(W1 x + b1), as the paper has it; any number of bits.
    "spotlight-mlp": {"shared": True, "residual": False, "layers": 2},
    # Functions of their own for the keys and for each query head, three layers, 32 bits or more.
    "hashattention": {"shared": False, "residual": False, "layers": 3},
}


@dataclass
class Codes:
    """Networks of one kind: `weights` [networks, out, in] and `biases` [networks, out] by layer."""

    weights: list
    biases: list
    residual: bool

    def __call__(self, x):
        """[networks, n, head_dim] to [networks, n, bits]."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            y = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
            if i + 1 < len(self.weights):
                y = torch.nn.functional.silu(y)
            x = x + y if self.residual else y
        return x

    def parameters(self):
        return [*self.weights, *self.biases]

    def tensors(self, name):
        """For the file, with one word per property of each layer."""
        tensors, words = {}, {}
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            tensors[f"{name}.{i}.weight"] = weight.detach().numpy().astype(np.float16)
            tensors[f"{name}.{i}.bias"] = bias.detach().numpy().astype(np.float16)
            silu = ["silu"] if i + 1 < len(self.weights) else []
            words[f"{name}.{i}"] = " ".join(silu + (["residual"] if self.residual else []))
        return tensors, words


def make_codes(networks, widths, residual, generator):
    weights, biases = [], []
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
        last = i + 2 == len(widths)
        scale = fan_in**-0.5 * (1.0 if last or not residual else 0.1)
        weight = torch.randn(networks, fan_out, fan_in, generator=generator) * scale
        weights.append(weight.requires_grad_())
        biases.append(torch.zeros(networks, fan_out, requires_grad=True))
    return Codes(weights, biases, residual)


def softsign(x, slope):
    return slope * x / (1 + slope * x.abs())


def sample_step(capture, generator):
    """Query rows near each other, and keys that all of them see: [heads, rows, d], [kv_heads, KEYS, d]."""
    q, k = capture["q"], capture["k"]
    rows, tokens = q.shape[1], k.shape[1]
    first = int(torch.randint(max(rows - SPAN, 0) + 1, (1,), generator=generator))
    chosen = first + torch.randperm(min(SPAN, rows), generator=generator)[:ROWS]
    end = tokens - rows + first - LOCAL
    keys = SINK + torch.randperm(end - SINK, generator=generator)[:KEYS]
    return q[:, chosen], k[:, keys]


def ranking_loss(agreements, logits, beta, alpha, generator):
    """Bradley-Terry: every token of the top against others; both [kv_heads, n, KEYS].

    Others are drawn uniformly in the logarithm of their rank: those next to the top decide what is
    selected, and would be lost among thousands that are told apart easily.
    """
    order = logits.argsort(dim=-1, descending=True)
    count = logits.shape[-1]
    top = round(TOP * count)
    others = (top * (count / top) ** torch.rand(OTHERS, generator=generator)).long().clamp(top, count - 1)
    best = agreements.gather(-1, order[..., :top])
    rest = agreements.gather(-1, order[..., others])
    gaps = best[..., :, None] - rest[..., None, :]
    return -torch.nn.functional.logsigmoid(beta * gaps - alpha).mean()


def to_torch(capture, kv_head):
    group = len(capture["q"]) // len(capture["k"])
    heads = slice(None) if kv_head is None else slice(kv_head * group, (kv_head + 1) * group)
    kv_heads = slice(None) if kv_head is None else slice(kv_head, kv_head + 1)
    return {"q": torch.from_numpy(capture["q"][heads]), "k": torch.from_numpy(capture["k"][kv_heads])}


def train(captures, arguments):
    generator = torch.Generator().manual_seed(arguments.seed)
    kv_heads, _, dim = captures[0]["k"].shape
    heads = len(captures[0]["q"])
    shape = SHAPES[arguments.shape]
    bits = dim if shape["residual"] else arguments.bits
    widths = [dim] + [dim if shape["residual"] else arguments.hidden] * (shape["layers"] - 1) + [bits]
    keys = make_codes(kv_heads, widths, shape["residual"], generator)
    queries = keys if shape["shared"] else make_codes(heads, widths, shape["residual"], generator)
    parameters = keys.parameters() + ([] if shape["shared"] else queries.parameters())
    optimiser = torch.optim.AdamW(
        parameters, lr=arguments.rate, betas=(0.9, 0.98), weight_decay=arguments.decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, arguments.rate, total_steps=arguments.steps, pct_start=0.05
    )
    beta = arguments.beta / bits**0.5
    start, losses = time.monotonic(), []
    for step in range(arguments.steps):
        capture = captures[step % len(captures)]
        q, k = sample_step(capture, generator)
        slope = SLOPES[0] * (SLOPES[1] / SLOPES[0]) ** (step / arguments.steps)
        grouped = q.reshape(kv_heads, -1, dim)
        hashed = queries(grouped if shape["shared"] else q).reshape(kv_heads, -1, bits)
        agreements = softsign(hashed, slope) @ softsign(keys(k), slope).transpose(1, 2)
        loss = ranking_loss(agreements, grouped @ k.transpose(1, 2), beta, arguments.alpha, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 200 == 0:
            seconds = time.monotonic() - start
            print(f"step {step + 1}: loss {np.mean(losses[-200:]):.4f}, {seconds:.0f} s", flush=True)
    return keys, None if shape["shared"] else queries


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("captures", nargs="+", help="safetensors files of one layer, of many query rows")
    parser.add_argument("--out", required=True, help="file of weights to write")
    parser.add_argument("--kv-head", type=int, help="only this KV head of the captures")
    parser.add_argument("--shape", choices=SHAPES, default="spotlight")
    parser.add_argument("--bits", type=int, default=128, help="but for spotlight, which has head_dim")
    parser.add_argument("--hidden", type=int, default=128, help="width of hidden layers, likewise")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--beta", type=float, default=8.0, help="slope of the loss, per sqrt(bits)")
    parser.add_argument("--alpha", type=float, default=0.0, help="margin of the loss")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the steps are small
    captures = [to_torch(load_capture(path), arguments.kv_head) for path in arguments.captures]
    keys, queries = train(captures, arguments)
    tensors, metadata = keys.tensors("key")
    if queries is not None:
        more, words = queries.tensors("query")
        tensors, metadata = {**tensors, **more}, {**metadata, **words}
    metadata["shape"] = arguments.shape
    metadata["training"] = (
        f"{arguments.steps} steps, rate {arguments.rate:g}, decay {arguments.decay:g}, "
        f"beta {arguments.beta:g}, alpha {arguments.alpha:g}, seed {arguments.seed}"
    )
    metadata["captures"] = " ".join(Path(path).name for path in arguments.captures)
    save_file(tensors, arguments.out, metadata)


if __name__ == "__main__":
    main()
