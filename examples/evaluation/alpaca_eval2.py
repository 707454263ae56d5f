"""
AlpacaEval 2: generates a model's answers to the 805 instructions and judges them with the package alpaca-eval.

    pip install 'trl-larpo[eval]'
    export OPENAI_API_KEY=...
    python examples/evaluation/alpaca_eval2.py --model_name_or_path outputs/recipes/table2/mistral_instruct_lambdarank_fsfairx/iteration_3/model --preset mistral_instruct --output outputs/alpaca_eval2/mistral_instruct_lambdarank_fsfairx --recipe examples/recipes/table2/mistral_instruct_lambdarank_fsfairx.yaml

The judge is GPT-4-turbo, weighted by its log-probabilities, as on the leaderboard. To use another judge at an
OpenAI-compatible endpoint: `--judge_model meta-llama/Meta-Llama-3-70B-Instruct --judge_url http://127.0.0.1:8000/v1`.
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
from answers import add_options, answer, paper_figures, run
from huggingface_hub import hf_hub_download

from trl_larpo import DataError, LarPOError
from trl_larpo.storage import keep_settings, read_json, write_json, write_text

NUM_INSTRUCTIONS = 805
TEMPERATURES = {"mistral_instruct": 0.5, "mistral_base": 0.7}
"""Settings of the paper's baselines; up to 2048 new tokens."""

GPT4 = "weighted_alpaca_eval_gpt4_turbo"


def main() -> None:
    arguments = parse()
    name = arguments.name or Path(arguments.model_name_or_path).name
    references = load_references(arguments.references)
    outputs = write_outputs(arguments, references, name)
    if arguments.judge_later:
        print(f"Answers in {outputs}. Call again without --judge_later to have them judged.")
        return
    folder = arguments.output / ("gpt4_turbo" if arguments.judge_model is None else slug(arguments.judge_model))
    length_controlled = arguments.length_controlled == "yes" or (
        arguments.length_controlled == "auto" and len(references) == NUM_INSTRUCTIONS
    )
    judge(arguments, outputs, folder, name, length_controlled)
    report(arguments, references, folder, name, length_controlled)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add_options(parser, max_new_tokens=2048)
    parser.add_argument("--preset", choices=TEMPERATURES, help="temperature of the paper's baselines: 0.5 and 0.7")
    parser.add_argument("--temperature", type=float, help="temperature, instead of a preset's; 0 is greedy")
    parser.add_argument(
        "--references",
        type=Path,
        help="JSON file of the instructions with the reference's outputs (default: GPT-4-turbo's, from the hub)",
    )
    parser.add_argument("--judge_model", help="a judge at --judge_url (default: GPT-4-turbo at OpenAI)")
    parser.add_argument("--judge_url", help="OpenAI-compatible endpoint of the judge")
    parser.add_argument(
        "--length_controlled",
        choices=["auto", "yes", "no"],
        default="auto",
        help="also the length-controlled win rate, which needs all 805 instructions and a file from the hub",
    )
    parser.add_argument("--judge_later", action="store_true", help="only write the answers")
    parser.add_argument("--recipe", type=Path, help="recipe whose results in the paper are printed with yours")
    arguments = parser.parse_args()
    if arguments.temperature is None and arguments.preset is None:
        parser.error("give --preset or --temperature: results depend on it")
    if (arguments.judge_model is None) != (arguments.judge_url is None):
        parser.error("--judge_model and --judge_url go together")
    if not arguments.judge_later:
        if shutil.which("alpaca_eval", path=path_of_programs()) is None:
            parser.error("the package alpaca-eval is missing: pip install 'trl-larpo[eval]'")
        if arguments.judge_url is None and not os.environ.get("OPENAI_API_KEY"):
            parser.error("the judge needs OPENAI_API_KEY; or give --judge_model and --judge_url, or --judge_later")
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


def write_outputs(arguments: argparse.Namespace, references: list[dict], name: str) -> Path:
    """The model's answers in the package's format."""
    temperature = TEMPERATURES[arguments.preset] if arguments.temperature is None else arguments.temperature
    instructions = [row["instruction"] for row in references]
    answers = answer(arguments, instructions, arguments.output / "answers.jsonl", temperature)
    outputs = [
        {"instruction": row["instruction"], "output": text, "generator": name, "dataset": row.get("dataset", "")}
        for row, text in zip(references, answers, strict=True)
    ]
    path = arguments.output / "model_outputs.json"
    write_json(path, outputs)
    write_json(arguments.output / "reference_outputs.json", references)
    return path


def judge(arguments, outputs: Path, folder: Path, name: str, length_controlled: bool) -> None:
    """Calls alpaca-eval. Judgements are saved in the folder, and existing ones are reused."""
    environment = dict(os.environ, PATH=path_of_programs())
    if arguments.judge_model is None:
        annotator = GPT4
    else:
        annotator = write_judge(folder / "judge", arguments.judge_model)
        environment |= {"OPENAI_API_BASE": arguments.judge_url}
        environment.setdefault("OPENAI_API_KEY", "EMPTY")
    settings = {
        "judge": arguments.judge_model or GPT4,
        "alpaca_eval": importlib.metadata.version("alpaca-eval"),
        "answers": read_json(arguments.output / "answers.settings.json"),
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
    command += ["--reference_outputs", str(arguments.output / "reference_outputs.json")]
    command += ["--annotators_config", annotator, "--name", name, "--output_path", str(folder.resolve())]
    command += ["--caching_path", str(judgements), "--precomputed_leaderboard", "None"]
    if length_controlled:
        command += ["--metric_kwargs", str({"save_weights_dir": str(folder.resolve() / "glm_weights")})]
    else:
        command += ["--fn_metric", "get_winrate", "--sort_by", "win_rate"]
    print(" ".join(command))
    if subprocess.run(command, env=environment).returncode != 0:
        raise LarPOError(f"alpaca_eval failed; its message is above. Judgements so far are kept in {folder}.")


def write_judge(folder: Path, model: str) -> str:
    """Writes the configuration of alpaca-eval's weighted judge with another model. Returns its path."""
    import alpaca_eval

    configs = Path(alpaca_eval.__file__).parent / "evaluators_configs"
    [config] = yaml.safe_load((configs / GPT4 / "configs.yaml").read_text()).values()
    template = (configs / config["prompt_template"]).read_text()
    config["prompt_template"] = f"{folder.name}/template.txt"
    config["completions_kwargs"] |= {"model_name": model, "requires_chatml": True, "price_per_token": 0}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "template.txt", template)
    write_text(folder / "configs.yaml", yaml.safe_dump({f"weighted_{slug(model)}": config}))
    return str(folder.resolve())


def report(arguments, references: list[dict], folder: Path, name: str, length_controlled: bool) -> None:
    """Saves and prints the results, the settings, and which judgements are missing."""
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
    }
    write_json(folder / "result.json", result)
    controlled = result["length_controlled_win_rate"]
    print(f"\n{name} against {result['reference']}, judged by {result['settings']['judge']}:")
    print(f"  length-controlled win rate  {'not computed' if controlled is None else f'{controlled:.2f} %'}")
    print(f"  win rate                    {result['win_rate']:.2f} % ± {result['standard_error']:.2f}")
    print(f"  judged                      {result['n_total']} of {len(references)}")
    if arguments.recipe is not None:
        print(f"  the paper                   {paper_figures(arguments.recipe)}")
    if result["n_total"] != len(references):
        print(
            f"  WARNING: no judgement of the instructions {missing[:10]}{' ...' if len(missing) > 10 else ''}: the "
            "judge's first token was neither m nor M. The rates leave them out; call again to ask once more."
        )
    if len(references) != NUM_INSTRUCTIONS:
        print(f"  NOTE: AlpacaEval 2 has {NUM_INSTRUCTIONS} instructions; this result cannot be compared with others.")
    print(f"  everything is in {folder}")


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
