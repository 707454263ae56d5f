"""
MixEval and MixEval-Hard: generates a model's greedy answers in the format that `mix_eval.compute_metrics` scores.

    git clone https://github.com/Psycoy/MixEval && pip install -e MixEval
    python examples/evaluation/mixeval.py --model_name_or_path outputs/recipes/table2/mistral_instruct_lambdarank_fsfairx/iteration_3/model --data MixEval/mix_eval/data/mixeval-2024-06-01 --output outputs/mixeval/mistral_instruct_lambdarank_fsfairx --recipe examples/recipes/table2/mistral_instruct_lambdarank_fsfairx.yaml

`--data` is the folder of one version of the benchmark, with mixeval/ and mixeval-hard/ in it. Rerun the same command to
resume. With `--judge`, mix_eval is called if it is installed; otherwise its command is printed. Answers are parsed by
mix_eval's rules, or by an open model: `--parser_model Qwen/Qwen3-30B-A3B-Instruct-2507 --parser_url
http://127.0.0.1:8000/v1`. The paper's parser, gpt-3.5-turbo-0125, was shut down on 2026-10-23; accuracies by another
parser cannot be compared with the paper's.
"""  # noqa: E501

import argparse
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from answers import Entrant, add_options, answer, entrants, environment, paper_figures, run, sampling_of

from trl_larpo import DataError, LarPOError
from trl_larpo.storage import read_jsonl, write_json, write_jsonl

BENCHMARKS = {"mixeval": "mixeval", "mixeval_hard": "mixeval-hard"}
"""Name of each benchmark and its folder."""

PARTS = {"free-form": "close_freeform", "multiple-choice": "close_multichoice"}
"""Name of each file of questions, and the name of its file of responses."""

STEP_BY_STEP = ("BBH", "GSM8k", "MATH")
"""Benchmarks whose questions are answered step by step."""


VERDICTS = {"ff": r"\[(0(\.\d*)?|1(\.0*)?)\]", "mp": r"\[[A-Z]\]"}
"""What mix_eval looks for in what a parser says of an answer, by the name of the kind of questions in its files."""

MOST_WITHOUT_VERDICT = 0.05
"""Largest share of answers without a verdict."""


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    if (arguments.parser_model is None) != (arguments.parser_url is None):
        parser.error("--parser_model and --parser_url go together")
    measured = entrants(arguments, parser)
    if arguments.best_of_n > 1:
        parser.error("answers are greedy here, of which there is one: leave out --best_of_n")
    version = arguments.version or version_of(arguments.data)
    sampling = sampling_of(arguments, 0.0)  # greedy
    # Read all files before generating any answer, so that errors appear early
    questions = {
        (benchmark, part): read_questions(arguments.data / BENCHMARKS[benchmark] / f"{part}.json", part)
        for benchmark in arguments.benchmarks
        for part in PARTS
    }
    for entrant, ((benchmark, part), entries) in itertools.product(measured, questions.items()):
        folder = entrant.folder / arguments.name / benchmark / version
        print(f"{entrant.name}, {benchmark}, {part}: {len(entries)} questions")
        inputs = [format_input(entry) for entry in entries.values()]
        path = entrant.folder / "answers" / version / f"{benchmark}_{part}.jsonl"
        responses = answer(arguments, entrant, inputs, path, sampling)
        rows = [
            entry | {"id": name, "formated_input": text, "response": response}
            for (name, entry), text, response in zip(entries.items(), inputs, responses, strict=True)
        ]
        suffix = "_hard" if benchmark == "mixeval_hard" else ""
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / f"{arguments.name}_{PARTS[part]}{suffix}.jsonl", rows)
    write_json(arguments.output / "environment.json", environment(arguments))
    for entrant in measured:
        score(arguments, entrant, version)
    if arguments.recipe is not None:
        print(f"The paper (parser: gpt-3.5-turbo-0125): {paper_figures(arguments.recipe)}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add_options(parser, max_new_tokens=512)
    parser.set_defaults(name="local_chat")  # a name in mix_eval's registry of models
    parser.add_argument("--data", type=Path, required=True, help="folder of a version, e.g. .../mixeval-2024-06-01")
    parser.add_argument("--version", help="2024-06-01 or 2024-08-11 (default: from the folder's name)")
    parser.add_argument(
        "--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="what to run (default: both)"
    )
    parser.add_argument("--judge", action="store_true", help="score with mix_eval, if it is installed")
    parser.add_argument("--parser_model", help="model that parses answers, at --parser_url (default: mix_eval's rules)")
    parser.add_argument("--parser_url", help="OpenAI-compatible endpoint of the parser")
    parser.add_argument("--judge_arguments", default="", help="further arguments of mix_eval.compute_metrics")
    parser.add_argument("--recipe", type=Path, help="recipe whose results in the paper are printed with yours")
    return parser


def version_of(folder: Path) -> str:
    found = re.search(r"\d{4}-\d{2}-\d{2}$", folder.resolve().name)
    if not found:
        raise DataError(f"The folder {str(folder)!r} does not end in a version such as 2024-06-01; give --version.")
    return found.group()


def read_questions(path: Path, part: str) -> dict[str, dict]:
    """The entries of a benchmark file by id, in the order of the file."""
    if not path.is_file():
        raise DataError(f"There is no file {str(path)!r}. --data is the folder of a version, with mixeval/ in it.")
    entries = json.loads(path.read_text(encoding="utf-8"))
    needed = ("prompt", "target", "benchmark_name", *(("options",) if part == "multiple-choice" else ()))
    for name, entry in entries.items():
        missing = [key for key in needed if key not in entry]
        if missing:
            raise DataError(f"{path} entry {name!r} has no {', '.join(missing)}.")
    return entries


def format_input(entry: dict) -> str:
    """The benchmark's fixed prompt for a question."""
    context = f"{entry['context']}\n" if entry.get("context") else ""
    if "options" in entry:
        options = "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(entry["options"]))
        ending = "Answer with the option letter from the given choices directly."
        return f"{context}{entry['prompt']}\n{options}\n{ending}"
    if entry["benchmark_name"] in STEP_BY_STEP:
        ending = "Answer the question. \nLet's think step by step."
    else:
        ending = "Answer the question shortly."
    return f"Question: {context}{entry['prompt']}\n{ending}"


def score(arguments: argparse.Namespace, entrant: Entrant, version: str) -> None:
    """Calls mix_eval, or prints its commands."""
    common = ["--version", version, "--model_response_dir", str(entrant.folder), "--models_to_eval", arguments.name]
    if arguments.parser_model is None:
        common += ["--free_form_parser", "rule", "--multi_choice_parser", "rule"]
    else:
        common += ["--freeform_judge", arguments.parser_model, "--multichoice_judge", arguments.parser_model]
        common += ["--api_base_url", arguments.parser_url]
    common += shlex.split(arguments.judge_arguments)
    installed = importlib.util.find_spec("mix_eval") is not None
    if arguments.judge and not installed:
        print("mix_eval is not installed: git clone https://github.com/Psycoy/MixEval && pip install -e MixEval")
    for benchmark in arguments.benchmarks:
        command = [sys.executable, "-m", "mix_eval.compute_metrics", "--benchmark", benchmark, *common]
        if arguments.judge and installed:
            print(f"{entrant.name}:", flush=True)
            folder = entrant.folder / arguments.name / benchmark / version
            call_mix_eval(command, folder, arguments.parser_model)
        else:
            print(f"To score {entrant.name}:", shlex.join(["python", *command[1:]]))


def call_mix_eval(command: list[str], folder: Path, parser_model: str | None) -> None:
    """
    Calls mix_eval. With its rules, once more from what it has judged: there the first call ends in an error of its own
    (`KeyError: 'number_samples'`) after it has written all judgements.

    Args:
        command: The call.
        folder: Of the responses to the benchmark, where mix_eval writes judgements and `score.json`.
        parser_model: Model that parses the answers; `None`: mix_eval's rules.

    Raises:
        LarPOError: If there is no score, or too many of the answers that it counts could not be parsed.
    """
    settings = {"MODEL_PARSER_API": "EMPTY"} | os.environ
    score = folder / "score.json"
    for path in (score, *folder.glob("judge_results_*_rule.jsonl")):  # of an earlier call
        path.unlink(missing_ok=True)
    calls = [command]
    if parser_model is None:
        calls.append([*command, "--compute_score_from_judged_file"])
    has_ended = any(subprocess.run(call, env=settings).returncode == 0 for call in calls)
    if not (has_ended and score.exists()):
        raise LarPOError("mix_eval gave no score; its message is above. The responses are kept.")
    if parser_model is not None:
        check_verdicts(folder, parser_model)


def check_verdicts(folder: Path, parser_model: str) -> None:
    """
    Counts the answers on which the parser gave no verdict: mix_eval gives them a random score.

    Raises:
        LarPOError: If they are more than [`MOST_WITHOUT_VERDICT`]; the score is deleted.
    """
    num_answers = num_missing = 0
    for part, verdict in VERDICTS.items():
        path = folder / f"judge_results_{part}_model_judge_{parser_model.replace('/', '_')}.jsonl"
        rows = read_jsonl(path) if path.exists() else []
        num_answers += len(rows)
        num_missing += sum(re.search(verdict, row["judge_response"] or "") is None for row in rows)
    said = f"{parser_model} gave no verdict on {num_missing} of {num_answers} answers, which mix_eval scores at random."
    if num_missing > MOST_WITHOUT_VERDICT * num_answers:
        (folder / "score.json").unlink()
        raise LarPOError(f"{said} Is the parser up? The responses are kept; call again.")
    if num_missing:
        print(f"WARNING: {said}")


if __name__ == "__main__":
    run(main)
