"""
Where the time of a test run went: minutes of each file, and the slowest tests.

    python3 .ci/slowest.py junit.xml
"""

import sys
from collections import Counter
from xml.etree import ElementTree


def main(path: str) -> None:
    cases = [
        (float(case.get("time", 0)), case.get("classname", ""), case.get("name", ""))
        for case in ElementTree.parse(path).iter("testcase")
    ]
    by_file: Counter[str] = Counter()
    for seconds, file, _ in cases:
        by_file[file] += seconds
    print(f"{sum(by_file.values()) / 60:.1f} minutes of tests, over all workers:")
    for file, seconds in by_file.most_common(25):
        print(f"{seconds / 60:7.1f} min  {file}")
    for seconds, file, name in sorted(cases, reverse=True)[:30]:
        print(f"{seconds:7.0f} s    {file}::{name}")


if __name__ == "__main__":
    main(sys.argv[1])
