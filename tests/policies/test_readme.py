"""The code of policies/README.md runs, and its catalogue is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rapidfire_policies
from rapidfire_policies import Policy

README = Path(__file__).parents[2] / "policies" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_code_runs(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Imported rather than executed from a string: the contract pickles the policy, which needs a module.
    (tmp_path / f"policies_readme_{block}.py").write_text(BLOCKS[block], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    __import__(f"policies_readme_{block}")


def test_catalogue_lists_every_policy() -> None:
    listed = re.findall(r"^\| \[`(\w+)`\]\((\S+)\)", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    exported = {name: getattr(rapidfire_policies, name) for name in rapidfire_policies.__all__}
    policies = {name for name, value in exported.items() if issubclass(value, Policy) and value is not Policy}
    assert {name for name, _ in listed} == policies
    assert all((README.parent / path).is_file() for _, path in listed)
