"""Without these the table of faults would name tests that are gone, and a page faults that nobody reproduces.

Outcome: each row of the table names tests that exist, and stands in sdtrain/README.md.
"""

from __future__ import annotations

import ast
import re

from conftest import REPO
from fault_table import FAULTS, HEAD, row


def test_every_fault_names_tests_that_exist() -> None:
    for fault in FAULTS:
        for test in fault.tests:
            file, _, name = test.partition("::")
            tree = ast.parse((REPO / "tests" / file).read_text())
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert not name or name.partition("[")[0] in names, test


def test_every_fault_stands_in_the_table_of_the_rooms() -> None:
    page = (REPO / "sdtrain" / "README.md").read_text()
    assert HEAD in page
    found = re.findall(r"^\| \d+ \|.*$", page, re.MULTILINE)
    for fault, line in zip(FAULTS, found, strict=True):
        assert line.startswith(row(fault, "", "").removesuffix("|  |  |")), fault.number
