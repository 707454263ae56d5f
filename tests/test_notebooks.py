"""The notebooks run from top to bottom, with a tiny model in place of theirs, and are kept without outputs."""

import ast
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from trl_larpo import cli
from trl_larpo.report.page import write_report
from trl_larpo.run import loop
from trl_larpo.run.small import save_small_model

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "notebooks"
CELLS = json.loads((FOLDER / "one_small_gpu.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]

SMALL = {"RUN": "outputs/small", "NUM_PROMPTS": 6, "NUM_HELD_OUT": 4, "NUM_SAMPLES": 4, "MAX_NEW_TOKENS": 24,
         "BATCH_SIZE": 2, "PRECISION": "float32"}  # fmt: skip


def tags(cell):
    return cell["metadata"].get("tags", [])


def assigned(source):
    """The variables that a cell sets."""
    statements = [line for line in ast.parse(source).body if isinstance(line, ast.Assign)]
    return {target.id for statement in statements for target in statement.targets}


def run_cell(source, namespace):
    """What IPython does, for the few of its commands that the notebooks use. Returns the value of a last expression."""
    if source.startswith("%%writefile "):
        name, text = source.removeprefix("%%writefile ").split("\n", 1)
        return Path(name).write_text(text, encoding="utf-8")
    if source.startswith("!"):
        program, *words = shlex.split(source[1:])
        assert program == "larpo" and cli.main(words) == 0
        return None
    tree = ast.parse(source)
    shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), namespace)
    return None if shown is None else eval(compile(ast.Expression(shown.value), "cell", "eval"), namespace)


def test_it_is_kept_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)


def test_its_links_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    pages = re.findall(r"\]\((\.\.[^)#]*)", text)
    assert pages and all((FOLDER / page).is_file() for page in pages)


@pytest.mark.slow
def test_its_cells_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # Pictures take a third of the time
    monkeypatch.setattr(loop, "write_report", lambda path, ends: ends and write_report(path, with_plots=False))
    display = ModuleType("IPython.display")
    display.HTML = str
    small, namespace, shown = SMALL | {"MODEL": save_small_model(tmp_path / "model")}, {}, []
    for cell in CODE:
        source = "".join(cell["source"])
        if "install" in tags(cell):
            continue
        if "parameters" in tags(cell):
            assert assigned(source) == small.keys()
            exec(source, namespace)
            namespace |= small
            continue
        with monkeypatch.context() as patch:
            if (
                "IPython" in source
            ):  # for this cell alone, as matplotlib takes a notebook for granted where it is loaded
                patch.setitem(sys.modules, "IPython", ModuleType("IPython"))
                patch.setitem(sys.modules, "IPython.display", display)
            shown.append(run_cell(source, namespace))
    sys.modules.pop("my_reward", None)
    [rewards] = [value for value in shown if isinstance(value, list)]
    assert rewards == pytest.approx([0.88, -0.23, -0.95])
    page = next(value for value in shown if str(value).startswith("<iframe"))
    assert "Iteration 2" in page or "iteration 2" in page
    run = tmp_path / "outputs/small"
    assert [path.name for path in (run / "iteration_2/model").glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert isinstance(namespace["answer"], str)
