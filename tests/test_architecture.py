"""What may import what, and how large a module may be (docs/architecture.md)."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trl_larpo
from trl_larpo.run.stages import STAGES

PACKAGE = Path(trl_larpo.__file__).parent
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# Package: the packages that its modules may import beside their own and the modules at the top
MAY_IMPORT = {
    "training": set(),
    "generation": set(),
    "rewards": set(),
    "report": set(),
    "run": {"training", "generation", "rewards", "report"},
}
COMMANDS = {"cli", "commands", "recall", "__main__", "arguments", "option_help"}  # above all packages
MAX_LINES, MAX_CLASS_LINES = 450, 250
LARGE = {"training/trainer": "LarPOTrainer"}  # one class to read from top to bottom


def imported(name: str, at_once: bool = False) -> set[str]:
    """Modules of the package that a module imports, anywhere in it or `at_once`, as paths below the package."""
    found = set()
    parts = name.split("/")
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            path = "/".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {path} if path in MODULES else {f"{path}/{alias.name}".strip("/") for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(x.split(".")[0] == "trl_larpo" for x in names), f"{name}: import relatively"
    return found & set(MODULES)


def test_imports_are_seen():
    assert {"errors", "training/config"} <= imported("run/folder") and imported("run/loop") > {"run/stages"}


@pytest.mark.parametrize("name", MODULES)
def test_layers(name):
    package = name.split("/")[0] if "/" in name else None
    for other in imported(name):
        other_package = other.split("/")[0] if "/" in other else None
        if package is not None:
            assert other not in COMMANDS, f"{name} imports the command {other}"
            assert other_package in {None, package} | MAY_IMPORT[package], f"{name} imports {other}"
        elif name not in COMMANDS | {"__init__"}:  # what all packages stand on
            assert other_package is None and other not in COMMANDS, f"{name} imports {other}"
        assert other != "cli" or name == "__main__", f"{name} imports cli"


@pytest.mark.parametrize("stages", ["candidate_stages", "evaluation_stages"])
def test_processes_that_sample_and_reward_import_no_trainer(stages):
    reached, new = set(), {"run/stage_process", f"run/{stages}"}
    while new:
        reached |= new
        new = set().union(*(imported(name, at_once=True) for name in new)) - reached
    assert reached >= {"generation/sampler", "rewards/scorer", "run/stages", "run/folder"}
    assert not reached & {"training/trainer", "run/training_stages", "run/loop", "report/charts"}


def test_a_run_imports_all_stages_before_it_begins():
    """What they lack, such as a version of TRL that they know, is an error in the first seconds."""
    stages = {name for name in MODULES if name.startswith("run/") and name.endswith("_stages")}
    reached, new = set(), {"run/loop"}
    while new:
        reached |= new
        new = set().union(*(imported(name, at_once=True) for name in new)) - reached
    assert len(stages) == 3 and stages <= reached and "training/trl_compat" in reached


def test_all_stages_have_a_function():
    for name, stage in STAGES.items():
        module, function = (cell.cell_contents for cell in stage.function.__closure__)
        assert function == name and f"def {name}(" in MODULES[f"run/{module}"].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_classes_are_short(name):
    text = MODULES[name].read_text(encoding="utf-8")
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    long = {node.name for node in classes if node.end_lineno - node.lineno >= MAX_CLASS_LINES}
    assert long <= {LARGE.get(name)}, f"{name}: classes of more than {MAX_CLASS_LINES} lines"
    if name not in LARGE:
        assert text.count("\n") <= MAX_LINES


@pytest.mark.slow
@pytest.mark.parametrize("module", ["trl_larpo", "trl_larpo.losses", "trl_larpo.cli"])
def test_imports_are_light(module):
    heavy = {"trl", "transformers", "datasets", "matplotlib", "accelerate"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_public_names_load():
    for name in trl_larpo.__all__:
        assert getattr(trl_larpo, name) is not None
    assert set(trl_larpo.__all__) <= set(dir(trl_larpo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = importlib.import_module("trl_larpo").nothing


def test_internals_of_trl_are_touched_in_one_module():
    """`trl.trainer` and private names of TRL are imported in trl_compat alone."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trl.trainer"):
                assert name == "training/trl_compat", f"{name} imports {node.module}"
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "trl":
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private or name == "training/trl_compat", f"{name} imports {private}"


def test_tests_do_not_import_each_other():
    for path in Path(__file__).parent.rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(?:from|import) test_", text, re.MULTILINE), f"{path.name} imports another test"
