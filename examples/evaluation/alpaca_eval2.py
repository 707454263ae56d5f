"""
AlpacaEval 2: generates a model's answers to the 805 instructions and judges them with the package alpaca-eval.

    pip install 'trl-larpo[eval]'
    vllm serve Qwen/Qwen3-30B-A3B-Instruct-2507 --port 8000    # the judge, in an environment of its own
    python examples/evaluation/alpaca_eval2.py --model_name_or_path outputs/recipes/table2/mistral_instruct_lambdarank_fsfairx/iteration_3/model --preset mistral_instruct --initial_model mistralai/Mistral-7B-Instruct-v0.2 --best_of_n 16 --best_of_n_reward sfairXC/FsfairX-LLaMA3-RM-v0.1 --judge_url http://127.0.0.1:8000/v1 --output outputs/alpaca_eval2/mistral_instruct_lambdarank_fsfairx --recipe examples/recipes/table2/mistral_instruct_lambdarank_fsfairx.yaml

The judge is a model with open weights behind any OpenAI-compatible endpoint: the paper's GPT-4-turbo was shut down on
2026-10-23. Win rates of different judges cannot be compared, so the initial model, and the best of several of its
answers, are judged beside. `--judge` is how the judge is asked: `weighted` by its log-probabilities, as on the
leaderboard, or `llama3_70b_fn`, the paper's for table 4 and figure 4b (with meta-llama/Meta-Llama-3-70B-Instruct).
Answers and judgements are saved in the output folder; rerun the same command to resume.
"""  # noqa: E501

import argparse
import csv
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from answers import (
    Entrant,
    add_options,
    answer,
    digest,
    entrants,
    environment,
    paper_figures,
    run,
    sampling_of,
)
from huggingface_hub import hf_hub_download

from trl_larpo import DataError, LarPOError
from trl_larpo.settings import keep_settings
from trl_larpo.storage import read_json, write_json, write_text

NUM_INSTRUCTIONS = 805

JUDGES = {"weighted": "weighted_alpaca_eval_gpt4_turbo", "llama3_70b_fn": "alpaca_eval_llama3_70b_fn"}
"""How a judge is asked: the package's configuration, of which only the model is replaced."""

DEFAULT_JUDGE = "Qwen/Qwen3-30B-A3B-Instruct-2507"

PAPERS_JUDGES = {"table2": "alpaca_eval_gpt4_turbo_fn", "table3": "alpaca_eval_gpt4_turbo_fn",
                 "table4": "alpaca_eval_llama3_70b_fn", "figure4b": "alpaca_eval_llama3_70b_fn"}  # fmt: skip
"""Of the recipes in each folder."""


def main() -> None:
    parser = make_parser()
    arguments = parse(parser)
    measured = entrants(arguments, parser)
    references = load_references(arguments.references)
    for entrant in measured:
        outputs = write_outputs(arguments, entrant, references)
        if arguments.judge_later:
            print(f"Answers in {outputs}. Call again without --judge_later to have them judged.")
    if arguments.judge_later:
        return
    length_controlled = arguments.length_controlled == "yes" or (
        arguments.length_controlled == "auto" and len(references) == NUM_INSTRUCTIONS
    )
    results = []
    for entrant in measured:
        folder = entrant.folder / slug(f"{arguments.judge_model}_{arguments.judge}")
        judge(arguments, entrant, folder, length_controlled)
        results.append(report(arguments, entrant, references, folder, length_controlled))
    compare(arguments, results)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add_options(parser, max_new_tokens=2048)
    parser.add_argument("--temperature", type=float, help="temperature, instead of a preset's; 0 is greedy")
    parser.add_argument(
        "--references",
        type=Path,
        help="JSON file of the instructions with the reference's outputs (default: GPT-4-turbo's, from the hub)",
    )
    parser.add_argument("--judge", choices=JUDGES, default="weighted", help="how the judge is asked (%(default)s)")
    parser.add_argument("--judge_model", default=DEFAULT_JUDGE, help="the judge at --judge_url (%(default)s)")
    parser.add_argument("--judge_url", help="OpenAI-compatible endpoint of the judge")
    parser.add_argument(
        "--length_controlled",
        choices=["auto", "yes", "no"],
        default="auto",
        help="also the length-controlled win rate, which needs all 805 instructions and a file from the hub",
    )
    parser.add_argument("--judge_later", action="store_true", help="only write the answers")
    parser.add_argument("--recipe", type=Path, help="recipe whose results in the paper are printed with yours")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    if arguments.temperature is None and arguments.preset is None:
        parser.error("give --preset or --temperature: results depend on it")
    if not arguments.judge_later:
        if shutil.which("alpaca_eval", path=path_of_programs()) is None:
            parser.error("the package alpaca-eval is missing: pip install 'trl-larpo[eval]'")
        if arguments.judge_url is None:
            parser.error(
                f"give --judge_url, e.g. that of `vllm serve {arguments.judge_model}`, or --judge_later to generate "
                "only the answers. The judges of the paper's tables 2 and 3 were shut down"
            )
    return arguments


def load_references(path: Path | None) -> list[dict]:
    """The instructions with the reference model's outputs, in the original order that alpaca-eval requires."""
    if path is None:
        path = hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json", repo_type="dataset")
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    for number, row in enumerate(rows):
        for key in ("instruction", "output", "generator"):
            if not isinstance(row.get(key), str):
                raise DataError(f"{path} entry {number} has no text {key!r}.")
    return rows


def write_outputs(arguments: argparse.Namespace, entrant: Entrant, references: list[dict]) -> Path:
    """An entrant's answers in the package's format."""
    sampling = sampling_of(arguments, arguments.temperature)
    instructions = [row["instruction"] for row in references]
    answers = answer(arguments, entrant, instructions, entrant.folder / "answers.jsonl", sampling)
    outputs = [
        {
            "instruction": row["instruction"],
            "output": text,
            "generator": entrant.name,
            "dataset": row.get("dataset", ""),
        }
        for row, text in zip(references, answers, strict=True)
    ]
    path = entrant.folder / "model_outputs.json"
    write_json(path, outputs)
    write_json(entrant.folder / "reference_outputs.json", references)
    return path


def judge(arguments, entrant: Entrant, folder: Path, length_controlled: bool) -> None:
    """Calls alpaca-eval. Judgements are saved in the folder, and existing ones are reused."""
    outputs, name = entrant.folder / "model_outputs.json", entrant.name
    annotator = write_judge(folder / "judge", arguments.judge, arguments.judge_model)
    judges = dict(os.environ, PATH=path_of_programs(), OPENAI_API_BASE=arguments.judge_url)
    judges.setdefault("OPENAI_API_KEY", "EMPTY")
    settings = {
        "judge": arguments.judge_model,
        "asked_by": JUDGES[arguments.judge],
        "alpaca_eval": importlib.metadata.version("alpaca-eval"),
        "answers": read_json(entrant.folder / "answers.settings.json"),
        "references": digest(read_json(entrant.folder / "reference_outputs.json")),
    }
    keep_settings(folder / "settings.json", settings, "--output")
    judgements = folder.resolve() / "judgements.json"
    if judgements.exists():
        # alpaca-eval saves -1 for a judgement that it could not parse, and would never request it again
        kept = [row for row in read_json(judgements) if 1 <= (row["preference"] or 0) <= 2]
        wanted = "length_controlled_winrate" if length_controlled else "win_rate"
        if len(kept) == len(read_json(outputs)) and wanted in (leaderboard_row(folder, name) or {}):
            print("All judgements are there.")
            return
        write_json(judgements, kept)
    command = ["alpaca_eval", "evaluate", "--model_outputs", str(outputs)]
    command += ["--reference_outputs", str(entrant.folder / "reference_outputs.json")]
    command += ["--annotators_config", annotator, "--name", name, "--output_path", str(folder.resolve())]
    command += ["--caching_path", str(judgements), "--precomputed_leaderboard", "None"]
    if length_controlled:
        command += ["--metric_kwargs", str({"save_weights_dir": str(folder.resolve() / "glm_weights")})]
    else:
        command += ["--fn_metric", "get_winrate", "--sort_by", "win_rate"]
    print(" ".join(command))
    if subprocess.run(command, env=judges).returncode != 0:
        raise LarPOError(f"alpaca_eval failed; its message is above. Judgements so far are kept in {folder}.")


def write_judge(folder: Path, asked_by: str, model: str) -> str:
    """Writes one of alpaca-eval's configurations of a judge with another model. Returns its path."""
    import alpaca_eval

    configs = Path(alpaca_eval.__file__).parent / "evaluators_configs"
    [config] = yaml.safe_load((configs / JUDGES[asked_by] / "configs.yaml").read_text()).values()
    template = (configs / config["prompt_template"]).read_text()
    config["prompt_template"] = f"{folder.name}/template.txt"
    config["completions_kwargs"].pop("client_kwargs", None)  # another endpoint
    config["completions_kwargs"] |= {"model_name": model, "requires_chatml": True, "price_per_token": 0}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "template.txt", template)
    write_text(folder / "configs.yaml", yaml.safe_dump({f"{asked_by}_{slug(model)}": config}))
    return str(folder.resolve())


def report(arguments, entrant: Entrant, references: list[dict], folder: Path, length_controlled: bool) -> dict:
    """Saves and prints the results of an entrant, the settings, and which judgements are missing."""
    name = entrant.name
    row = leaderboard_row(folder, name)
    annotations = read_json(leaderboard(folder).with_name("annotations.json"))
    judged = {a["instruction"] for a in annotations if a.get("preference") is not None}
    missing = [number for number, reference in enumerate(references) if reference["instruction"] not in judged]
    result = {
        "name": name,
        "win_rate": float(row["win_rate"]),
        "standard_error": float(row["standard_error"]),
        "length_controlled_win_rate": float(row["length_controlled_winrate"]) if length_controlled else None,
        "n_total": int(float(row["n_total"])),
        "instructions": len(references),
        "missing": missing,
        "average_length": int(float(row["avg_length"])),
        "reference": references[0]["generator"],
        "judge_url": arguments.judge_url,
        "settings": read_json(folder / "settings.json"),
        "environment": environment(arguments),
    }
    write_json(folder / "result.json", result)
    controlled = result["length_controlled_win_rate"]
    print(f"\n{name} against {result['reference']}, judged by {result['settings']['judge']}:")
    print(f"  length-controlled win rate  {'not computed' if controlled is None else f'{controlled:.2f} %'}")
    print(f"  win rate                    {result['win_rate']:.2f} % ± {result['standard_error']:.2f}")
    print(f"  judged                      {result['n_total']} of {len(references)}")
    if result["n_total"] != len(references):
        print(
            f"  WARNING: no judgement of the instructions {missing[:10]}{' ...' if len(missing) > 10 else ''}: the "
            "judge's answer named neither. The rates leave them out; call again to ask once more."
        )
    if len(references) != NUM_INSTRUCTIONS:
        print(f"  NOTE: AlpacaEval 2 has {NUM_INSTRUCTIONS} instructions; this result cannot be compared with others.")
    print(f"  everything is in {folder}")
    return result


def compare(arguments, results: list[dict]) -> None:
    """The model beside its baselines, all of the same judge, and what the paper's judge said."""
    write_json(arguments.output / "results.json", results)
    print(f"\nAll by the judge {arguments.judge_model}, asked by {JUDGES[arguments.judge]}:")
    print(f"  {'':32}{'LC win rate':>12}{'win rate':>12}{'characters':>12}")
    for result in results:
        controlled = result["length_controlled_win_rate"]
        shown = "" if controlled is None else f"{controlled:.2f}"
        print(f"  {result['name']:32}{shown:>12}{result['win_rate']:>12.2f}{result['average_length']:>12}")
    if len(results) == 1:
        print("  A win rate says little alone: measure the initial model beside it (--initial_model, --best_of_n).")
    if arguments.recipe is not None:
        said = PAPERS_JUDGES.get(arguments.recipe.parent.name)
        same = said == JUDGES[arguments.judge] and "llama-3-70b" in arguments.judge_model.lower()
        other = "it does not say which judge" if said is None else f"judge: {said}"
        warning = "the same judge" if same else f"{other}. Another judge's figures cannot be compared with these"
        print(f"The paper ({warning}): {paper_figures(arguments.recipe)}")


def leaderboard(folder: Path) -> Path | None:
    """The table of alpaca-eval; for its own judges it is in a subfolder with their name."""
    return next(folder.glob("**/leaderboard.csv"), None)


def leaderboard_row(folder: Path, name: str) -> dict[str, str] | None:
    path = leaderboard(folder)
    if path is None:
        return None
    with open(path, encoding="utf-8", newline="") as file:
        return next((row for row in csv.DictReader(file) if row[""] == name), None)


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")


def path_of_programs() -> str:
    """PATH with the programs of this Python environment first, even if the environment is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


if __name__ == "__main__":
    run(main)
