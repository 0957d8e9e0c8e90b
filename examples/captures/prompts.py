# SPDX-License-Identifier: Apache-2.0
"""Prints one of the prompts behind the shipped captures: prose, needle or common-words."""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from collections import Counter

NEEDLE = "One of the special magic numbers for amber-lantern is: 4873192."
NEEDLE_DEPTH = 0.4
COMMON_WORDS, COMMON_REPEATS = 10, 30
RARE_WORDS, RARE_REPEATS = 310, 3


def verses(span):
    """The verses of a span such as "gen1:1-gen9:29", without their references."""
    if shutil.which("bible") is None:
        sys.exit(
            "prompts.py: the command 'bible' is missing: apt-get install bible-kjv bible-kjv-text"
        )
    printed = subprocess.run(
        ["bible", "-f", span], capture_output=True, text=True, check=True
    ).stdout
    return [line.split(" ", 1)[1] for line in printed.splitlines() if " " in line]


def shuffled(items):
    """A fixed order that does not depend on the version of Python's random module."""
    return sorted(items, key=lambda item: hashlib.sha256(repr(item).encode()).digest())


def prose():
    """The King James Bible from Genesis 1:1, one verse a line; capture.py cuts it with --tokens."""
    return "\n".join(verses("gen1:1-gen12:20")) + "\n"


def needle():
    """A magic number in the middle of the book of Ruth and 1 Samuel, asked for at the end."""
    haystack = verses("ruth1:1-1sam5:12")
    haystack.insert(int(NEEDLE_DEPTH * len(haystack)), NEEDLE)
    return (
        "Some special magic numbers are hidden within the following text. "
        "Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
        + "\n".join(haystack)
        + "\nWhat is the special magic number for amber-lantern mentioned in the provided text?\n"
    )


def common_words():
    """A numbered list in which ten words stand 30 times and all others 3 times, as in RULER."""
    counts = Counter(
        word for verse in verses("ps1:1-ps150:6") for word in re.findall(r"\b[a-z]{4,8}\b", verse)
    )
    words = shuffled(word for word, count in counts.items() if count >= 3)[
        : COMMON_WORDS + RARE_WORDS
    ]
    entries = [
        (word, copy)
        for place, word in enumerate(words)
        for copy in range(COMMON_REPEATS if place < COMMON_WORDS else RARE_REPEATS)
    ]
    listed = " ".join(f"{number}. {word}" for number, (word, _) in enumerate(shuffled(entries), 1))
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{listed}\n"
        f"Question: What are the {COMMON_WORDS} most common words in the above list?\n"
    )


PROMPTS = {"prose": prose, "needle": needle, "common-words": common_words}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", choices=PROMPTS)
    sys.stdout.write(PROMPTS[parser.parse_args().prompt]())


if __name__ == "__main__":
    main()
