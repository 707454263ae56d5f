"""
Arena-Hard v2: generates a model's answers to the public questions and has a judge compare them with a baseline's.

    vllm serve Qwen/Qwen3-30B-A3B-Instruct-2507 --port 8000    # the judge, in an environment of its own
    python examples/evaluation/arena_hard.py --model_name_or_path outputs/recipes/today/qwen3_4b_skywork_8x80gb/iteration_3/model --preset qwen3 --initial_model Qwen/Qwen3-4B-Instruct-2507 --judge_url http://127.0.0.1:8000/v1 --output outputs/arena_hard/qwen3_4b

Each answer is compared with the baseline's in both orders. A verdict is one of A>>B, A>B, A=B, B>A, B>>A; clear ones
count three times, as in the benchmark. Beside the win rate stands the one with style control: the rate that a
Bradley-Terry model gives for answers of the baseline's length and markdown. The instructions to the judge are ours, and
the judge is an open model: results are for comparing models with each other here, not with the leaderboard.
Questions and baselines come from the hub (lmarena-ai/arena-hard-auto), or from `--questions` and `--baseline`. Rerun the
same command to resume.
"""  # noqa: E501

import argparse
import json
import os
import re
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from answers import Entrant, add_options, answer, digest, entrants, environment, run, sampling_of
from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm

from trl_larpo import DataError, LarPOError
from trl_larpo.settings import keep_settings
from trl_larpo.storage import GrowingFile, read_json, read_jsonl, write_json

REPOSITORY, VERSION = "lmarena-ai/arena-hard-auto", "arena-hard-v2.0"
BASELINES = {"hard_prompt": "o3-mini-2025-01-31", "creative_writing": "gemini-2.0-flash-001"}
"""Whose answers each category of questions is compared with."""

DEFAULT_JUDGE = "Qwen/Qwen3-30B-A3B-Instruct-2507"

VERDICTS = {"A>>B": [1.0] * 3, "A>B": [1.0], "A=B": [0.5], "B=A": [0.5], "B>A": [0.0], "B>>A": [0.0] * 3,
            "A<B": [0.0], "A<<B": [0.0] * 3, "B<A": [1.0], "B<<A": [1.0] * 3}  # fmt: skip
"""What each verdict counts for A: a clear one three times."""

INSTRUCTIONS = """\
You compare the answers of two assistants, A and B, to a user's request. First work out what a correct and useful answer
has to contain. Then check each answer against it: is it right, does it do what was asked, does it leave out or add
something that matters? Neither length nor order nor formatting is a merit. End with exactly one verdict:
[[A>>B]] A is clearly better, [[A>B]] A is slightly better, [[A=B]] both are equally good, [[B>A]] B is slightly better,
[[B>>A]] B is clearly better."""

QUESTION = "Request:\n{question}\n\nAnswer of A:\n{first}\n\nAnswer of B:\n{second}"


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    if arguments.temperature is None and arguments.preset is None:
        parser.error("give --preset or --temperature: results depend on it")
    measured = entrants(arguments, parser)
    questions = load_questions(arguments.questions, arguments.category)
    baseline = load_answers(arguments.baseline, arguments.category)
    missing = [row["uid"] for row in questions if row["uid"] not in baseline]
    if missing:
        raise DataError(f"The baseline has no answer to {len(missing)} of {len(questions)} questions: {missing[:3]}.")
    results = []
    for entrant in measured:
        sampling = sampling_of(arguments, arguments.temperature)
        texts = [row["prompt"] for row in questions]
        answers = answer(arguments, entrant, texts, entrant.folder / "answers.jsonl", sampling)
        if arguments.judge_url is None:
            print(f"Answers of {entrant.name} in {entrant.folder}. Call again with --judge_url to have them judged.")
            continue
        games = in_both_orders(judge(arguments, entrant, questions, answers, baseline))
        if not games:
            raise LarPOError(f"No verdict on {entrant.name} in both orders: see the answers of {arguments.judge_url}.")
        results.append(
            result_of(entrant, games, dict(zip([q["uid"] for q in questions], answers, strict=True)), baseline)
        )
    if results:
        report(arguments, results, questions)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add_options(parser, max_new_tokens=4096)
    parser.add_argument("--temperature", type=float, help="temperature, instead of a preset's; 0 is greedy")
    parser.add_argument("--category", choices=BASELINES, default="hard_prompt", help="which questions (%(default)s)")
    parser.add_argument("--questions", type=Path, help="question.jsonl (default: from the hub)")
    parser.add_argument("--baseline", type=Path, help="answers of the baseline (default: from the hub)")
    parser.add_argument("--judge_model", default=DEFAULT_JUDGE, help="the judge at --judge_url (%(default)s)")
    parser.add_argument("--judge_url", help="OpenAI-compatible endpoint of the judge; without it, answers are written")
    parser.add_argument("--judge_max_tokens", type=int, default=4096, help="longest judgement (%(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="requests to the judge at the same time (%(default)s)")
    return parser


def load_questions(path: Path | None, category: str) -> list[dict[str, Any]]:
    """Questions of a category, with `uid` and `prompt`."""
    path = path or Path(hf_hub_download(REPOSITORY, f"data/{VERSION}/question.jsonl", repo_type="dataset"))
    rows = [row for row in read_jsonl(path) if row.get("category", category) == category]
    for number, row in enumerate(rows):
        if not all(isinstance(row.get(key), str) for key in ("uid", "prompt")):
            raise DataError(f"{path} row {number} has no text `uid` or `prompt`.")
    if not rows:
        raise DataError(f"{path} has no question of the category {category!r}.")
    return rows


def load_answers(path: Path | None, category: str) -> dict[str, str]:
    """The baseline's answers by the question's `uid`."""
    name = f"data/{VERSION}/model_answer/{BASELINES[category]}.jsonl"
    path = path or Path(hf_hub_download(REPOSITORY, name, repo_type="dataset"))
    return {row["uid"]: _last_text(row, path) for row in read_jsonl(path)}


def _last_text(row: dict[str, Any], path: Path) -> str:
    try:
        content = row["messages"][-1]["content"]
        return content if isinstance(content, str) else content["answer"]
    except (KeyError, IndexError, TypeError):
        raise DataError(f"{path}: the answer to {row.get('uid')!r} has no `messages` that end in a text.") from None


# Judging


def judge(
    arguments: argparse.Namespace,
    entrant: Entrant,
    questions: list[dict[str, Any]],
    answers: list[str],
    baseline: dict[str, str],
) -> list[dict[str, Any]]:
    """
    Verdicts of both orders on each question: `uid`, `model_first`, `verdict`. Those that are kept are not asked for
    again; a request that fails leaves its question to the next call.
    """
    folder = entrant.folder / re.sub(r"[^A-Za-z0-9.]+", "_", arguments.judge_model)
    settings = {
        "judge": arguments.judge_model,
        "max_tokens": arguments.judge_max_tokens,
        "category": arguments.category,
        "answers": read_json(entrant.folder / "answers.settings.json"),
        "baseline": digest([[question["uid"], baseline[question["uid"]]] for question in questions]),
    }
    keep_settings(folder / "settings.json", settings, "--output")
    file = GrowingFile(folder / "games.jsonl")
    done = {(row["uid"], row["model_first"]) for row in file.rows}
    texts = {question["uid"]: text for question, text in zip(questions, answers, strict=True)}
    games = [
        (q, model_first) for q in questions for model_first in (False, True) if (q["uid"], model_first) not in done
    ]

    def play(game: tuple[dict[str, Any], bool]) -> dict[str, Any]:
        question, model_first = game
        pair = texts[question["uid"]], baseline[question["uid"]]
        first, second = pair if model_first else pair[::-1]
        about = {"uid": question["uid"], "model_first": model_first}
        try:
            said = ask(arguments, QUESTION.format(question=question["prompt"], first=first, second=second))
        except (OSError, HTTPException, LookupError, TypeError, ValueError) as error:  # no answer, or of another form
            return about | {"verdict": None, "problem": f"{type(error).__name__}: {error}"}
        return about | {"verdict": verdict_of(said), "judgement": said}

    problems = []
    with ThreadPoolExecutor(arguments.requests) as pool:
        for game in tqdm(pool.map(play, games), total=len(games), desc=f"Judging {entrant.name}"):
            if game["verdict"] is not None:  # others are asked again by the next call
                file.add([game])
            elif "problem" in game:
                problems.append(game["problem"])
    if problems:
        print(f"WARNING: {len(problems)} requests to {arguments.judge_url} failed; the last one: {problems[-1]}")
    kept = GrowingFile(folder / "games.jsonl").rows
    if len(kept) < 2 * len(questions):
        print(
            f"WARNING: {2 * len(questions) - len(kept)} judgements have no verdict, and their questions do not count. "
            "Call again to ask once more."
        )
    return kept


def ask(arguments: argparse.Namespace, text: str) -> str:
    """The judge's words, by the route /chat/completions."""
    body = {
        "model": arguments.judge_model,
        "messages": [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": arguments.judge_max_tokens,
    }
    request = urllib.request.Request(
        f"{arguments.judge_url.rstrip('/')}/chat/completions",
        data=json.dumps(body).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'EMPTY')}",
        },
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)["choices"][0]["message"]["content"] or ""


def verdict_of(text: str) -> str | None:
    """The verdict that a judgement ends in, if it has one."""
    found = re.findall(r"\[\[([AB][<>=]{1,2}[AB])\]\]", text)
    return found[-1] if found and found[-1] in VERDICTS else None


def in_both_orders(games: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Games of questions with both: judges prefer one of the places, which cancels within a question alone."""
    orders = Counter(game["uid"] for game in games)
    return [game for game in games if orders[game["uid"]] == 2]


# Results


def result_of(
    entrant: Entrant, games: list[dict[str, Any]], answers: dict[str, str], baseline: dict[str, str]
) -> dict[str, Any]:
    """Outcomes of the model, one for each count of a verdict, and the style of its answers beside the baseline's."""
    outcomes, styles, uids = [], [], []
    for game in games:
        for for_first in VERDICTS[game["verdict"]]:
            outcomes.append(for_first if game["model_first"] else 1 - for_first)
            styles.append(style_difference(answers[game["uid"]], baseline[game["uid"]]))
            uids.append(game["uid"])
    settings = read_json(entrant.folder / "answers.settings.json")
    return {"name": entrant.name, "outcomes": outcomes, "styles": styles, "uids": uids, "answers": settings}


def style_of(text: str) -> np.ndarray:
    """Words, headers, list items and bold passages outside of code blocks."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    patterns = (r"^#{1,6}\s", r"^\s*(?:[-*+]|\d+\.)\s", r"\*\*[^*\n]+\*\*")
    return np.array([len(text.split()), *(len(re.findall(pattern, text, re.MULTILINE)) for pattern in patterns)], float)


def style_difference(text: str, other: str) -> np.ndarray:
    """Difference of the lengths, and of markdown for each word, each relative to the sum of both."""
    mine, theirs = style_of(text), style_of(other)
    length = (mine[0] - theirs[0]) / max(1.0, mine[0] + theirs[0])
    mine, theirs = mine[1:] / max(1.0, mine[0]), theirs[1:] / max(1.0, theirs[0])
    return np.array([length, *((mine - theirs) / (mine + theirs + 1))])


def style_controlled(results: list[dict[str, Any]], rows: list[np.ndarray] | None = None) -> list[float]:
    """
    Win rate of each model if its answers had the baseline's style.

    A logistic regression of the outcomes on the model and the style, which is common to all models: Bradley-Terry with
    the baseline at 0. A little ridge keeps coefficients finite where all outcomes are equal.
    """
    rows = [np.arange(len(result["outcomes"])) for result in results] if rows is None else rows
    outcomes = np.concatenate(
        [np.array(result["outcomes"])[chosen] for result, chosen in zip(results, rows, strict=True)]
    )
    styles = np.concatenate([np.array(result["styles"])[chosen] for result, chosen in zip(results, rows, strict=True)])
    scale = styles.std(axis=0)
    styles = styles / np.where(scale > 0, scale, 1.0)  # not centred: 0 is the baseline's style
    model = np.repeat(np.eye(len(results)), [len(chosen) for chosen in rows], axis=0)
    features = np.hstack([model, styles])
    weights = np.zeros(features.shape[1])
    for _ in range(50):
        rates = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (outcomes - rates) - 1e-2 * weights
        curvature = (features * (rates * (1 - rates))[:, None]).T @ features + 1e-2 * np.eye(len(weights))
        weights = weights + np.linalg.solve(curvature, gradient)
    return [float(1 / (1 + np.exp(-weight))) for weight in weights[: len(results)]]


def bootstrap(results: list[dict[str, Any]], repeats: int = 200) -> np.ndarray:
    """Resampled rates, by question: `(repeats, model, (raw, style-controlled))`."""
    rng, drawn = np.random.default_rng(0), []
    places = []
    for result in results:
        uids = np.array(result["uids"])
        places.append({uid: np.flatnonzero(uids == uid) for uid in dict.fromkeys(result["uids"])})
    for _ in range(repeats):
        rows = [np.concatenate([of[uid] for uid in rng.choice(list(of), len(of))]) for of in places]
        raw = [float(np.array(r["outcomes"])[chosen].mean()) for r, chosen in zip(results, rows, strict=True)]
        drawn.append(np.stack([raw, style_controlled(results, rows)], axis=1))
    return np.array(drawn)


def report(arguments: argparse.Namespace, results: list[dict[str, Any]], questions: list[dict[str, Any]]) -> None:
    """Saves and prints the rates of all models with the same judge."""
    low, high = np.quantile(bootstrap(results), [0.05, 0.95], axis=0)
    rates = [
        [float(np.mean(r["outcomes"])), controlled]
        for r, controlled in zip(results, style_controlled(results), strict=True)
    ]
    rows = [
        {"name": r["name"], "judgements": len(set(r["uids"])), "questions": len(questions), "answers": r["answers"]}
        | {
            kind: {"rate": rates[i][k], "low": float(low[i, k]), "high": float(high[i, k])}
            for k, kind in enumerate(("win_rate", "style_controlled"))
        }
        for i, r in enumerate(results)
    ]
    about = {"judge": arguments.judge_model, "category": arguments.category, "environment": environment(arguments)}
    write_json(arguments.output / "results.json", about | {"results": rows})
    print(
        f"\n{arguments.category} of Arena-Hard v2 against {BASELINES[arguments.category]}, "
        f"judged by {arguments.judge_model}"
    )
    print(f"  {'':32}{'win rate':>24}{'style-controlled':>24}")
    for row in rows:
        shown = [
            f"{100 * v['rate']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]"
            for v in (row["win_rate"], row["style_controlled"])
        ]
        print(f"  {row['name']:32}{shown[0]:>24}{shown[1]:>24}")
    for row in rows:
        if row["judgements"] < len(questions):
            print(f"  {row['name']}: {row['judgements']} of {len(questions)} questions have both verdicts")
    print(
        "Other judges, and the leaderboard's instructions, give other rates: compare these rows with each other only."
    )


if __name__ == "__main__":
    run(main)
