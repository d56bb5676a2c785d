"""Messages where the compiled core is missing: the reason, from the build's record, and the remedy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cnext.doctor import checks
from cnext.ops import build, dispatch


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cnext that has no compiled module, as `build` sees it."""
    made = tmp_path / "here" / "cnext"
    made.mkdir(parents=True)
    (made / "__init__.py").touch()
    monkeypatch.setattr(build, "PACKAGE", made)
    monkeypatch.setattr(dispatch, "core", lambda part: None)
    monkeypatch.setattr(dispatch, "best", dispatch.best.__wrapped__)
    return made


def test_the_reason_of_the_build_is_given_with_its_remedy(package: Path) -> None:
    why = "nvcc is of CUDA 11.8, and the CUDA part needs 12.1 or newer"
    (package / "_build.json").write_text(json.dumps({"built": {"cpp": "g++"}, "left_out": {"cuda": why}}))
    expected = f"cnext was built without it: {why}; install a CUDA toolkit of version 12.1 or newer, then"
    assert dispatch.missing("cuda", "cuda").startswith(expected)
    assert any(expected in finding.text for finding in checks.kernels())
    # Built, and not to be found all the same.
    assert "its module is gone, or is one for another Python; install" in dispatch.missing("cpp", "cpu")


def test_the_warning_says_why(package: Path) -> None:
    (package / "_build.json").write_text(json.dumps({"built": {}, "left_out": {"cpp": "there was no C++ compiler"}}))
    expected = r"cnext was built without it: there was no C\+\+ compiler; install a C\+\+17 compiler, then cnext again"
    with pytest.warns(RuntimeWarning, match=f"{dispatch.SLOWER}; cpp: {expected}"):
        assert dispatch.best("cpu") == "reference"


def test_a_source_tree_that_is_not_installed_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = package.parent
    (tree / "csrc").mkdir()
    (tree / "cnext.egg-info").mkdir()  # which building leaves there, and which is no installation
    site = tree.parent / "site"
    monkeypatch.setattr(sys, "path", [str(tree), str(site)])
    expected = f"this is the source tree in {tree}, imported without being installed, and nothing in it is compiled; "
    assert dispatch.missing("cpp", "cpu") == f"{expected}`pip install -e {tree}` compiles it"
    (site / "cnext-0.1.0.dist-info").mkdir(parents=True)
    (site / "cnext").mkdir()
    (site / "cnext" / "__init__.py").touch()
    expected += (
        f"cnext is installed in {site}/cnext: run from another folder or with python -P, or `pip install -e {tree}`"
    )
    assert dispatch.missing("cuda", "cuda") == expected
    assert any(f"plain torch, {dispatch.SLOWER}; no cpp: {expected}" in finding.text for finding in checks.kernels())
