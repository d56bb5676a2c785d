"""Docstrings of the public ops and averages: each has an example, and the examples run."""

import doctest
import inspect

import pytest

from cnext import averaging, ops
from cnext.adapters import AdapterLinear

PUBLIC = {
    f"{module.__name__}.{name}": value
    for module in (averaging, ops)
    for name, value in ((name, getattr(module, name)) for name in module.__all__)
    if inspect.isclass(value) or inspect.isfunction(value)
}


MORE = {"cnext.adapters.AdapterLinear.forward": AdapterLinear.forward}


@pytest.mark.parametrize("name", [*PUBLIC, *MORE])
def test_examples_run(name: str) -> None:
    value = (PUBLIC | MORE)[name]
    tests = doctest.DocTestFinder().find(value, name, globs=dict(vars(inspect.getmodule(value))))
    assert sum(len(test.examples) for test in tests) > 0, "there is no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    failed = {test.name: runner.run(test).failed for test in tests}
    assert not any(failed.values()), failed


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isfunction(value)])
def test_every_argument_is_described(name: str) -> None:
    function = PUBLIC[name]
    text = inspect.getdoc(function).partition("Args:")[2].partition("Returns:")[0]
    shared = (
        {"impl"} if function.__module__ in ("cnext.ops.averaging", "cnext.ops.kron") else set()
    )  # at the top of the module
    named = {word.strip() for line in text.splitlines() for word in line.partition(":")[0].split(",")}
    assert set(inspect.signature(function).parameters) - shared <= named
