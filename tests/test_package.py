"""The package as a user imports it."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module, resources
from pathlib import Path

import pytest

import rapidfire_automl

ROOT = Path(rapidfire_automl.__file__).parent


@pytest.mark.parametrize("name", rapidfire_automl.__all__)
def test_every_exported_name_exists(name: str) -> None:
    value = getattr(rapidfire_automl, name)
    assert name in dir(rapidfire_automl)
    assert getattr(rapidfire_automl, name) is value


def test_names_for_type_checkers_and_names_at_run_time_are_the_same() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    named = {alias.name: str(node.module).removeprefix("rapidfire_automl.") for node in imports for alias in node.names}
    assert named == rapidfire_automl._MODULES
    assert {*named, "__version__"} == set(rapidfire_automl.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'RapidFireExecuter'"):
        _ = rapidfire_automl.RapidFireExecuter


@pytest.mark.parametrize("package", ["rapidfire_automl", "rapidfire_policies"])
def test_types_are_shipped(package: str) -> None:
    import_module(package)
    assert resources.files(package).joinpath("py.typed").is_file()


@pytest.mark.parametrize(
    "module",
    [
        "rapidfire_automl",
        "rapidfire_automl.configs",
        "rapidfire_automl.control",
        "rapidfire_automl.demo",
        "rapidfire_automl.experiment",
        "rapidfire_automl.notebook",
        "rapidfire_automl.pruners",
        "rapidfire_automl.search",
        "rapidfire_automl.space",
        "rapidfire_automl.steering",
        "rapidfire_policies",
    ],
)
def test_imports_without_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
