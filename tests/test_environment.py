"""What gets installed: environment.yml, pyproject.toml, constraints.txt, Makefile and CI agree."""

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import xdistil

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SEVEN = "jupyterlab papermill torch transformers seqeval matplotlib ipywidgets".split()


def requirements(*extras):
    """Direct requirements as (canonical name, requirement): the core's and those of the extras."""
    found = set()
    queue = [f"{PROJECT['name']}[{','.join(extras)}]", *PROJECT["dependencies"]]
    while queue:
        requirement = Requirement(queue.pop())
        if requirement.name == PROJECT["name"]:  # an extra may name other extras
            for extra in requirement.extras:
                queue += PROJECT["optional-dependencies"][extra]
        else:
            found.add((canonicalize_name(requirement.name), requirement))
    return found


def constraints():
    """Pinned version by canonical name. Anything but name==version is an error here."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line:
            name, version = re.fullmatch(r"([\w.-]+)==([\w.+]+)", line).groups()
            assert canonicalize_name(name) not in pins, f"{name} is pinned twice"
            pins[canonicalize_name(name)] = version
    return pins


@pytest.fixture(scope="module")
def environment():
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def test_conda_gives_only_python_and_pip(environment):
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    conda_part = [line for line in environment["dependencies"] if isinstance(line, str)]
    assert sorted(re.split(r"[=<>]", line)[0] for line in conda_part) == ["pip", "python"]
    python = next(line.partition("=")[2] for line in conda_part if line.startswith("python"))
    assert f"{python}.0" in SpecifierSet(PROJECT["requires-python"])


def test_environment_reaches_the_seven_packages_through_pyproject(environment):
    pip_parts = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    assert len(pip_parts) == 1 and len(pip_parts[0]) == 1, "one pip line: bounds live in pyproject"
    match = re.fullmatch(r"-e \.\[([\w,]+)\]", pip_parts[0][0])
    assert match, pip_parts[0][0]
    extras = match[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert set(SEVEN) <= {name for name, _ in requirements(*extras)}


def test_every_direct_dependency_is_pinned_within_its_bounds():
    pins, direct = constraints(), requirements(*PROJECT["optional-dependencies"])
    assert sorted(name for name, _ in direct if name not in pins) == []
    outside = [str(wanted) for name, wanted in direct if pins[name] not in wanted.specifier]
    assert outside == [], "constraints.txt pins another version"


@pytest.mark.parametrize("preinstalled", ["torch", "numpy"])
def test_preinstalled_packages_are_never_replaced(preinstalled):
    direct = requirements(*PROJECT["optional-dependencies"])
    bounds = [s.operator for name, r in direct if name == preinstalled for s in r.specifier]
    assert bounds == [">="]


def test_make_takes_torch_from_the_constraints_and_installs_it_first():
    assert "torch" in constraints()
    assert re.search(r"^TORCH \?= \$\(shell grep '\^torch==' constraints\.txt\)$", MAKEFILE, re.M)
    rule = re.search(r"^\$\(VENV\)/\.demo \$\(VENV\)/\.dev \$\(VENV\)/\.browser: (.*)\n((?:\t.*\n)+)", MAKEFILE, re.M)
    assert "$(VENV)/constraints.txt" in rule[1] and "-c $(VENV)/constraints.txt" in rule[2]
    assert re.search(r"^\$\(VENV\)/constraints\.txt:.* \$\(VENV\)/\.torch$", MAKEFILE, re.M)


@pytest.mark.parametrize("target", ["demo", "test", "test-browser", "lint", "lab"])
def test_makefile_has_target(target):
    assert re.search(rf"^{target}:.*## \w+", MAKEFILE, re.M), "no such target, or help is missing"
    assert re.search(rf"^\.PHONY:.*\b{target}\b", MAKEFILE, re.M)


def test_extras_in_the_makefile_exist():
    extras = re.findall(r"^\$\(VENV\)/\.\w+: EXTRAS = ([\w,]+)$", MAKEFILE, re.M)
    assert len(extras) == 3
    assert set(",".join(extras).split(",")) <= set(PROJECT["optional-dependencies"])


def test_ci_lints_and_runs_the_tests_as_users_do():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line.split("#")[0] for line in script.read_text(encoding="utf-8").splitlines()]
    assert any(re.match(r"make lint\b", line) for line in lines)
    assert any(re.match(r"make test\b", line) for line in lines)
    assert any(re.match(r"set -euo pipefail\b", line) for line in lines)


def test_hooks_use_the_pinned_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    wanted = [
        d for r in hooks["repos"] for h in r["hooks"] for d in h.get("additional_dependencies", [])
    ]
    assert f"ruff=={constraints()['ruff']}" in wanted


def test_version_is_the_packages():
    assert xdistil.__version__ == PROJECT["version"]
