# SPDX-License-Identifier: Apache-2.0
"""Long-context tasks in the manner of RULER, made from a seed, and the table of what methods score on them.

  tasks.py make --model MODEL.gguf --output FOLDER            tasks.jsonl and prose.jsonl, for `llama_run evaluate`
  tasks.py table results.jsonl                                scores, paired differences, divergences

A prompt has several questions, which are asked one by one of the same context: its answers are paired between methods, and
intervals are over contexts, whose answers go together.
"""

import argparse
import collections
import json
import math
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "captures"))
from prompts import verses  # noqa: E402

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n"
ASK = "\n{question}<|im_end|>\n<|im_start|>assistant\n{prefix}"
ADJECTIVES = "amber brisk calm dusty eager faint gentle hollow icy jolly keen lively mellow noble odd plain quiet rapid silver tidy urban vivid warm young".split()
NOUNS = "anchor basket candle desert engine forest garden hammer island jacket kettle lantern mirror needle orchard pillow quarry ribbon saddle tunnel umbrella violin window yacht".split()
NAMES = "Alice Boris Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karin Leon Maria Nils Olga Pavel Quentin Rosa Stefan Tanja".split()
CITIES = "Athens Berlin Cairo Dublin Essen Florence Geneva Hamburg Istanbul Lisbon Madrid Naples Oslo Prague Rome Seville Turin Vienna Warsaw Zurich".split()
# The books that haystacks are cut from, and the one of the prose whose continuation is scored.
BOOKS = ["1sam1:1-1sam31:13", "2sam1:1-2sam24:25", "1king1:1-1king22:53", "2king1:1-2king25:30", "jer1:1-jer52:34", "isa1:1-isa66:24"]
PROSE = ["gen1:1-gen50:26", "exod1:1-exod40:38", "matt1:1-matt28:20", "luke1:1-luke24:53"]
CONTINUED = 256  # tokens of prose that are scored


def digits(rng, count):
    return str(rng.randrange(10 ** (count - 1), 10**count))


def keys_of(rng, count):
    pairs = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
    return rng.sample(pairs, count)


class Haystack:
    """Verses in order from some place, with sentences in between, to a length in tokens."""

    def __init__(self, count_tokens):
        self.count_tokens = count_tokens
        self.books = [verses(span) for span in BOOKS]

    def around(self, rng, sentences, tokens):
        book = rng.choice(self.books)
        begin = rng.randrange(len(book) // 2)
        left = tokens - sum(self.count_tokens(s) + 1 for s in sentences)
        lines = []
        while left > 0:
            line = book[(begin + len(lines)) % len(book)]
            left -= self.count_tokens(line) + 1
            lines.append(line)
        # Not among the newest tokens, which every method reads.
        places = sorted(rng.randrange(max(1, len(lines) - 6)) for _ in sentences)
        for place, sentence in sorted(zip(places, sentences), reverse=True):
            lines.insert(place, sentence)
        return "\n".join(lines)


INTRODUCTION = "Some special facts are hidden within the following text. Make sure to memorize them. I will quiz you about them afterwards.\n"


def item(question, prefix, answers, max_tokens):
    return {"question": ASK.format(question=question, prefix=prefix), "answers": answers, "max_tokens": max_tokens}


def magic_number(key, value):
    """A sentence, and the question that it answers."""
    sentence = f"One of the special magic numbers for {key} is: {value}."
    question = f"What is the special magic number for {key} mentioned in the provided text?"
    return sentence, item(question, f"The special magic number for {key} mentioned in the provided text is:", [value], 10)


def single_needle(rng, haystack, tokens):
    """Needles of four kinds, two of each."""
    names, cities = rng.sample(NAMES, 4), rng.sample(CITIES, 2)
    facts = [magic_number(key, digits(rng, 7)) for key in keys_of(rng, 2)]
    for name, keeper, city in zip(names[:2], names[2:], cities):
        word, platform, locker = rng.choice(NOUNS) + rng.choice(NOUNS), digits(rng, 4), digits(rng, 6)
        facts += [
            (f"The secret password of {name} is: {word}.", item(f"What is the secret password of {name} mentioned in the provided text?", f"The secret password of {name} is:", [word], 10)),
            (f"The train to {city} leaves from platform number: {platform}.", item(f"From which platform does the train to {city} leave, as mentioned in the provided text?", f"The train to {city} leaves from platform number:", [platform], 8)),
            (f"The locker of {keeper} opens with the code: {locker}.", item(f"With which code does the locker of {keeper} open, as mentioned in the provided text?", f"The locker of {keeper} opens with the code:", [locker], 10)),
        ]
    rng.shuffle(facts)
    return INTRODUCTION + haystack.around(rng, [fact for fact, _ in facts], tokens), [asked for _, asked in facts]


def multi_key_needle(rng, haystack, tokens):
    """Many needles of one kind, of which some are asked for."""
    facts = [magic_number(key, digits(rng, 7)) for key in keys_of(rng, max(8, tokens // 512))]
    asked = [question for _, question in rng.sample(facts, 8)]
    return INTRODUCTION + haystack.around(rng, [fact for fact, _ in facts], tokens), asked


def variable_tracking(rng, haystack, tokens):
    """A chain of five variables, each assigned to the next; all of them are asked for, in several ways."""
    names = set()
    while len(names) < 5:
        names.add("".join(rng.choice("ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(3)))
    names = sorted(names)
    rng.shuffle(names)
    value = digits(rng, 5)
    sentences = [f"VAR {names[0]} = {value}."] + [f"VAR {to} = VAR {of}." for of, to in zip(names, names[1:])]
    asked = [
        (f"Find all variables that are assigned the value {value} in the text above.", f"According to the chain of variable assignments in the text above, 5 variables are assigned the value {value}, they are: VAR"),
        (f"Which variables have the value {value}?", f"The variables that have the value {value} are: VAR"),
        ("List all variable assignments of the text.", "The variable assignments in the text are: VAR"),
        ("Which variables does the text name?", "The text names these variables: VAR"),
        ("Repeat the chain of variable assignments.", "The chain of variable assignments is: VAR"),
        ("Which variables are equal to each other?", "The variables that are equal to each other are: VAR"),
    ]
    introduction = "Memorize and track the chain of variable assignments hidden in the following text.\n"
    return introduction + haystack.around(rng, sentences, tokens), [item(question, prefix, names, 32) for question, prefix in asked]


def common_words(rng, haystack, tokens):
    """A list of which a half is two words, and the other half words that stand there once; the two are asked for."""
    common = rng.sample(haystack.words, 2)
    rare = [word for word in haystack.words if word not in common]
    rng.shuffle(rare)
    words, size = [], 0
    while size < tokens:
        words.append(rng.choice(common) if rng.random() < 0.5 else rare.pop())
        size += haystack.count_tokens(f" {words[-1]},")
    introduction = "Below is a list of words. Some words appear more often than others. Memorize the ones that appear most often.\n"
    asked = [
        ("What are the most common words in the above list?", "The most common words in the above list are:"),
        ("Which words stand most often in the list?", "The words that stand most often in the list are:"),
        ("Name the two most frequent words of the list.", "The two most frequent words of the list are:"),
        ("Which words stand again and again in the list?", "The words that stand again and again in the list are:"),
        ("Which words of the list are repeated most often?", "Words of the list that are repeated most often: 1."),
        ("Which word appears most often in the above list?", 'The word that appears most often in the above list is "'),
    ]
    return introduction + ", ".join(words), [item(question, prefix, common, 24) for question, prefix in asked]


def frequent_words(rng, haystack, tokens):
    """Facts of six kinds that are told with several words, whose frequencies fall as rank^-1.5; each fact's most frequent one is
    asked for."""
    names, cities, key = rng.sample(NAMES, 3), rng.sample(CITIES, 2), keys_of(rng, 1)[0]
    facts = [
        (f"The secret password of {names[0]} is", f"What is the secret password of {names[0]}"),
        (f"The train to {cities[0]} carries", f"What does the train to {cities[0]} carry"),
        (f"The locker of {names[1]} opens with the word", f"With which word does the locker of {names[1]} open"),
        (f"The special magic word for {key} is", f"What is the special magic word for {key}"),
        (f"On the flag of {cities[1]} there is", f"What is there on the flag of {cities[1]}"),
        (f"For breakfast {names[2]} has bought", f"What has {names[2]} bought for breakfast"),
    ]
    counts = [8, 3, 2, 1, 1]  # 8 rank^-1.5
    sentences, items = [], []
    for fact, question in facts:
        words = rng.sample(NOUNS, len(counts))
        sentences += [f"{fact}: {word}." for word, count in zip(words, counts) for _ in range(count)]
        items.append(item(f"{question}, as mentioned most often in the provided text?", f"{fact}:", [words[0]], 8))
    rng.shuffle(sentences)
    return INTRODUCTION + haystack.around(rng, sentences, tokens), items


TASKS = {
    "single needle": single_needle,
    "multi-key needle": multi_key_needle,
    "variable tracking": variable_tracking,
    "common words": common_words,
    "frequent words": frequent_words,
}


def make(arguments):
    import llama_cpp  # its tokenizer, for lengths

    model = llama_cpp.Llama(arguments.model, vocab_only=True, verbose=False)
    cache = {}

    def count_tokens(text):
        if text not in cache:
            cache[text] = len(model.tokenize(text.encode(), add_bos=False, special=False))
        return cache[text]

    haystack = Haystack(count_tokens)
    haystack.words = sorted(
        {word for book in haystack.books for verse in book for word in re.findall(r"\b[a-z]{4,8}\b", verse)}
    )
    prompts = []
    for name, build in TASKS.items():
        for length, count in arguments.contexts.items():
            for number in range(count):
                identity = f"{name} {length} {number}"
                rng = random.Random(f"{arguments.seed} {identity}")
                context, items = build(rng, haystack, length - 160)
                prompts.append({"id": identity, "task": name, "length": length, "context": SYSTEM + context, "items": items})
    # In an order that has something of everything early.
    random.Random(arguments.seed).shuffle(prompts)
    prose = []
    for length in arguments.contexts:
        for span in PROSE[: arguments.prose]:
            # The last token of the context is read again by each method, and what follows it is scored.
            tokens = model.tokenize("\n".join(verses(span)).encode(), add_bos=False, special=False)
            text = model.detokenize(tokens[: length - CONTINUED]).decode()
            rest = model.detokenize(tokens[length - CONTINUED : length]).decode()
            prose.append({"id": f"prose {length} {span}", "task": "prose", "length": length, "context": text, "continuation": rest})
    for name, lines in (("tasks", prompts), ("prose", prose)):
        path = Path(arguments.output) / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{path}: {len(lines)} contexts, {sum(len(line.get('items', [])) for line in lines)} questions")


def score(line):
    """The share of the answers that the output has in it, in percent."""
    output = line["output"].lower()
    return 100.0 * sum(answer.lower() in output for answer in line["answers"]) / len(line["answers"])


def interval(rng, groups):
    """Mean over all, and a 95 % interval of it by drawing groups anew."""
    values = [value for group in groups for value in group]
    mean = sum(values) / len(values)
    means = []
    for _ in range(2000):
        drawn = [group for group in rng.choices(groups, k=len(groups))]
        flat = [value for group in drawn for value in group]
        means.append(sum(flat) / len(flat))
    means.sort()
    return mean, means[50], means[1949]


def answered_by_all(lines, methods):
    """Those of the methods, on prompts that each of them has answered."""
    lines = [line for line in lines if line["method"] in methods]
    having = collections.defaultdict(set)
    for line in lines:
        having[line["prompt"]].add(line["method"])
    return [line for line in lines if len(having[line["prompt"]]) == len(methods)]


def table(arguments):
    lines = [json.loads(line) for path in arguments.results for line in open(path)]
    methods = arguments.methods or list(dict.fromkeys(line["method"] for line in lines))
    lines = answered_by_all(lines, methods)
    tasks = [task for task in TASKS if any(line["task"] == task for line in lines)]
    rng = random.Random(1)
    scores = collections.defaultdict(dict)  # task -> method -> prompt -> [scores]
    rows = collections.defaultdict(list)
    for line in lines:
        if "rows" in line:
            rows[line["method"]].append(line["rows"])
        if "output" in line:
            scores[line["task"]].setdefault(line["method"], collections.defaultdict(list))[line["prompt"]].append(score(line))
    measures = ["KL from exact", "KL from engine", "same top as exact", "perplexity"]
    print("| method | rows, % | " + " | ".join(tasks + measures) + " |")
    print("|---|--:|" + "--:|" * (len(tasks) + len(measures)))
    for method in methods:
        cells = []
        for task in tasks:
            own, exact = scores[task].get(method, {}), scores[task].get(arguments.reference, {})
            prompts = [prompt for prompt in own if prompt in exact and len(own[prompt]) == len(exact[prompt])]
            if not prompts:
                cells.append("")
                continue
            mean = interval(rng, [own[prompt] for prompt in prompts])[0]
            pairs = [[a - b for a, b in zip(own[prompt], exact[prompt])] for prompt in prompts]
            difference, low, high = interval(rng, pairs)
            cells.append(f"{mean:.1f}" if method == arguments.reference else f"{mean:.1f} ({difference:+.1f}: {low:+.1f} to {high:+.1f})")
        prose = [line for line in lines if line["method"] == method and "nll" in line]

        def mean_of(field):
            there = [line for line in prose if field in line]
            return sum(line[field] * line["tokens"] for line in there) / sum(line["tokens"] for line in there) if there else None

        for field, text in (("kl_from_exact", "{:.5f}"), ("kl_from_engine", "{:.5f}"), ("same_top_as_exact", "{:.3f}")):
            value = mean_of(field)
            cells.append("" if value is None else text.format(value))
        cells.append(f"{math.exp(mean_of('nll')):.3f}" if prose else "")
        read = f"{100 * sum(rows[method]) / len(rows[method]):.2f}" if rows[method] else ""
        print(f"| {method} | {read} | " + " | ".join(cells) + " |")
    counts = {task: sum(len(v) for v in scores[task].get(arguments.reference, {}).values()) for task in tasks}
    if counts:
        contexts = len({line["prompt"] for line in lines})
        print(f"\n{contexts} contexts, {sum(counts.values())} answers per method: {counts}; differences from {arguments.reference}, paired, 95 % intervals over contexts")


def lengths_of(text):
    pairs = (pair.split(":") for pair in text.split(","))
    return {int(length): int(count) for length, count in pairs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    maker = commands.add_parser("make")
    maker.add_argument("--model", required=True)
    maker.add_argument("--output", required=True, help="folder")
    maker.add_argument("--contexts", type=lengths_of, default="4096:14,8192:4", help="LENGTH:COUNT of each task, in tokens; more with commas")
    maker.add_argument("--prose", type=int, default=4, help="books whose continuation is scored, of each length")
    maker.add_argument("--seed", type=int, default=1)
    maker.set_defaults(run=make)
    tabulator = commands.add_parser("table")
    tabulator.add_argument("results", nargs="+")
    tabulator.add_argument("--methods", nargs="+", help="of all that were evaluated; prompts count that each of them has answered")
    tabulator.add_argument("--reference", default="exact")
    tabulator.set_defaults(run=table)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
