"""What the table of faults and the list of defects name is there."""

from __future__ import annotations

import ast

import pytest
from bench.faults import DEFECTS, PARTS

from coldsnap.settings import ROOT

NAMED = sorted({row.test for rows in PARTS.values() for row in rows} | {test for _, tests in DEFECTS for test in tests})


@pytest.mark.parametrize("test", NAMED)
def test_the_test_exists(test: str) -> None:
    file, *names = test.split("::")
    body = ast.parse((ROOT / file).read_text("utf-8")).body
    for name in names:
        defined = {
            node.name: node.body
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in defined
        body = defined[name]
