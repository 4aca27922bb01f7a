"""Every public op shows in its docstring what it does, and does it."""

from __future__ import annotations

import doctest

import pytest
import torch

from moekernels import ops

OPS = [name for name in ops.__all__ if name not in ("GateOutput", "Quantized", "Routing")]


@pytest.mark.parametrize("name", OPS)
def test_the_example_of_an_op(name):
    names = {"torch": torch, "ops": ops}
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(getattr(ops, name), name, module=False, globs=names)
    assert test.examples, f"{name}: no >>> example in its docstring"
    said: list[str] = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)
