#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times one decode step of dense attention with magicpig, llama.cpp and PyTorch, on a layer of bench/decode's
shape. Installs the peers into build/peers/venv first, from PyPI. See the README beside this file."""
import argparse
import sys

import environment


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=positive, default=98304)
    parser.add_argument("--repeats", type=positive, default=15, help="timed steps of each row")
    parser.add_argument("--threads", type=thread_counts, default=[1, 2], help="such as 1,2")
    parser.add_argument("--only", metavar="REGEX", default="", help="of name/dtype/layout")
    parser.add_argument("--pages", choices=("huge", "small"), default="huge", help="of the caches")
    parser.add_argument("--json", metavar="FILE", help="where the results go, too")
    parser.add_argument("--install-only", action="store_true")
    return parser.parse_args()


def positive(text):
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def thread_counts(text):
    return [positive(count) for count in text.split(",")]


def main():
    options = parse_arguments()
    if environment.is_active():
        import timing  # which imports what only the environment has

        return timing.run(options)
    environment.install()
    environment.compile_ours()
    if not options.install_only:
        environment.run_inside(sys.argv, huge_pages=options.pages == "huge")


if __name__ == "__main__":
    main()
