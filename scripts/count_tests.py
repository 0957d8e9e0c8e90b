# SPDX-License-Identifier: Apache-2.0
"""Adds up CTest's JUnit reports: one test per doctest case, or per program that is not doctest's."""
import argparse
import re
import sys
import xml.etree.ElementTree as ElementTree

DOCTEST = re.compile(r"\[doctest\] test cases:\s*(\d+) \|\s*(\d+) passed \|\s*(\d+) failed")


def count(report):
    """(passed, failed, skipped) of one report."""
    passed = failed = skipped = 0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        status = case.get("status")
        cases = DOCTEST.search(case.findtext("system-out") or "")
        if cases:
            passed += int(cases.group(2))
            failed += int(cases.group(3))
            # A sanitizer may fail a program whose cases all passed.
            failed += status == "fail" and int(cases.group(3)) == 0
        else:
            passed += status == "run"
            failed += status == "fail"
            skipped += status in ("notrun", "disabled")
    return passed, failed, skipped


def print_failures(report):
    """The end of what each failed program printed, the cases that failed among it."""
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.get("status") != "fail":
            continue
        print(f"== {report}: {case.get('name')} failed after {case.get('time')} s: {case.find('failure').get('message')}")
        print((case.findtext("system-out") or "")[-4000:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--failures", metavar="REPORT", help="only print what failed programs printed last")
    parser.add_argument("--failed-steps", type=int, default=0, help="added to the failed tests")
    parser.add_argument("reports", nargs="*")
    arguments = parser.parse_args()
    if arguments.failures:
        print_failures(arguments.failures)
        return
    passed, failed, skipped = map(sum, zip((0, 0, 0), *map(count, arguments.reports)))
    failed += arguments.failed_steps
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0 or passed == 0)


if __name__ == "__main__":
    main()
