#!/usr/bin/env python3
"""Adds up the JUnit files of tests/run.sh: prints `passed failed skipped` and names each failure on stderr.

count_results.py RESULTS_DIR CTEST_RC PYTEST_RC. A CTest program that wrote a GoogleTest report counts by
its cases, any other as one test. A runner that failed without a failed test in its report counts as one.
"""

import sys
import xml.etree.ElementTree as xml
from pathlib import Path


def cases(path):
    """(name, "passed" | "failed" | "skipped") of each test case in a JUnit file."""
    for case in xml.parse(path).iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name')}".strip(".")
        if case.find("failure") is not None or case.find("error") is not None or case.get("status") == "fail":
            yield name, "failed"
        elif case.find("skipped") is not None or case.get("status") in ("notrun", "disabled", "run-skipped"):
            yield name, "skipped"
        else:
            yield name, "passed"


def ctest_cases(results):
    reports = {path.stem: path for path in sorted((results / "ctest").glob("*.xml"))}
    if not (results / "ctest.xml").exists():
        return
    for name, outcome in cases(results / "ctest.xml"):
        name = name.split(".")[-1]
        inner = list(cases(reports.pop(name))) if name in reports else []
        yield from ((f"{name}: {case}", case_outcome) for case, case_outcome in inner)
        # A crash leaves no report, or one without a failure.
        if not inner or (outcome == "failed" and all(o != "failed" for _, o in inner)):
            yield name, outcome


def main():
    results, ctest_rc, pytest_rc = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    runs = {"ctest": (ctest_rc, list(ctest_cases(results)))}
    pytest_xml = results / "pytest.xml"
    runs["pytest"] = (pytest_rc, list(cases(pytest_xml)) if pytest_xml.exists() else [])
    totals = dict(passed=0, failed=0, skipped=0)
    for runner, (rc, outcomes) in runs.items():
        for name, outcome in outcomes:
            totals[outcome] += 1
            if outcome == "failed":
                print(f"failed: {runner}: {name}", file=sys.stderr)
        if rc != 0 and all(outcome != "failed" for _, outcome in outcomes):
            print(f"failed: {runner} ended with status {rc}", file=sys.stderr)
            totals["failed"] += 1
    print(totals["passed"], totals["failed"], totals["skipped"])


if __name__ == "__main__":
    main()
