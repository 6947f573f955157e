"""The README holds: each promise names a test that is there and a parameter or command that exists."""

import ast
import re

import pytest

from xdistil import cli
from xdistil.params import Params


@pytest.fixture
def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def promises(readme):
    """The rows of "What works": what, how to ask for it, shown by."""
    section = readme.split("\n## What works\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert 20 < len(rows) <= 75 and max(map(len, rows)) <= 200
    return [line.strip("| ").split(" | ") for line in rows]


def test_each_promise_names_a_test_that_is_there(promises, root):
    seen = set()
    for what, _, shown in promises:
        file, name = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", shown).groups()
        body = ast.parse((root / "tests" / file).read_text(encoding="utf-8")).body
        assert name in {node.name for node in body if isinstance(node, ast.FunctionDef)}, (what, shown)
        seen.add(shown)
    assert len(seen) == len(promises)


def test_what_is_to_be_asked_for_exists(promises, readme):
    commands = cli.build_parser()._subparsers._group_actions[0].choices
    block = "\n".join(re.findall(r"(?ms)^```sh$(.*?)^```$", readme))
    asked = [code for _, how, _ in promises for code in re.findall(r"`([^`]+)`", how)]
    assert len(asked) >= len(promises)
    for code in (*asked, *re.findall(r"(?:^|\| )(xdistil .*?)(?:  +#.*)?$", block, re.M)):
        if code.startswith("xdistil "):
            command = commands[code.split()[1]]
            known = {option for action in command._actions for option in action.option_strings}
            assert set(re.findall(r"--\w+", code)) <= known, code
        else:
            assert code.split(":")[0] in Params.model_fields, code
    assert {f"xdistil {name}" for name in commands} <= {" ".join(c.split()[:2]) for c in (
        *asked, *re.findall(r"xdistil \w+", block))}


def test_the_tree_lists_every_module_once(readme, root):
    tree = readme.split("\nxdistil/\n")[1].split("\ntests/")[0]
    named = re.findall(r"(?:^  |  )(\w+\.py) ", tree, re.M)
    there = [path.name for path in (root / "xdistil").glob("*.py") if not path.name.startswith("__")]
    assert sorted(named) == sorted(there)


def test_every_params_file_is_in_the_table(readme, root):
    for path in (root / "params").glob("*.yaml"):
        assert f"[{path.name}](params/{path.name})" in readme
