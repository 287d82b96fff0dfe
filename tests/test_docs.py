"""Every public name has a docstring with an example that runs."""

import doctest

import pytest
import torch

import tritonsym
from tritonsym import FilterLayout, Symmetry, docs, functional, nn, testing

PUBLIC = [pytest.param(value, id=name) for _, name, value in docs.public()]
NAMES = {"torch": torch, "tritonsym": tritonsym, "nn": nn, "functional": functional, "testing": testing}
NAMES |= {"FilterLayout": FilterLayout, "Symmetry": Symmetry}
FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


@pytest.mark.parametrize("value", PUBLIC)
def test_examples(value):
    [test] = doctest.DocTestFinder(recurse=False).find(value, value.__name__, globs=dict(NAMES))
    assert test.examples, f"{value.__name__} has no example"
    assert len(test.docstring.partition(">>>")[2].split(">>>")) <= 4, "more than 4 statements"
    skipped = any(doctest.SKIP in example.options for example in test.examples)
    assert skipped == (value is tritonsym.load_escnn), "only load_escnn, which test_escnn.py tests, is skipped"
    messages = []
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=messages.append)
    assert not messages, "".join(messages)
