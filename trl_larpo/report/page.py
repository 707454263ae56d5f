"""A run's pictures, health and candidate lists as one HTML page that needs nothing else."""

import base64
import gzip
import html
import json
import math
import re
from pathlib import Path

from ..candidates import Candidate, CandidateList
from ..errors import DataError
from ..iterations import iteration_folders
from ..prompts import Content, Row
from ..set_aside import set_aside_in
from ..storage import read_json, read_jsonl, read_yaml, write_text
from .numbers import with_error
from .statistics import lists_of_prompt, shown_lists, statistics_of

MAX_DATA_BYTES = 10_000_000
"""Size of the packed lists in the page. Beyond it long texts are cut, and say so."""

_TEXT_LIMITS = (None, 20_000, 8_000, 4_000, 2_000, 1_000, 500, 200)

_TEMPLATE = Path(__file__).with_name("template.html")

_MAX_SET_ASIDE = 20  # of each stage


def write_report(run: str | Path, with_plots: bool = True) -> Path:
    """
    Writes `report.html` and the folder `plots` of a run, finished or not.

    Args:
        run: Folder of the run.
        with_plots: Whether the pictures of the page are also saved as PNG in `plots`, which takes half of the time.

    Returns:
        Path of the page.

    Raises:
        DataError: If the folder holds no run.
    """
    from .charts import draw  # here: `larpo report --prompt` needs no matplotlib

    run = _checked(run)
    settings = read_yaml(run / "run.yaml")
    iterations = _read_iterations(run)
    pictures = draw(iterations, run / "plots" if with_plots else None)
    page = _TEMPLATE.read_text(encoding="utf-8")
    data, cut = _pack(run, iterations)
    values = {
        "title": html.escape(f"LarPO run {run.resolve().name}"),
        "subtitle": html.escape(
            f"{_model_name(settings['model_name_or_path'])} · {' + '.join(settings['loss_type'])} · "
            f"{settings['num_samples']} samples per prompt · memory {settings['memory']} · "
            f"{max(iterations, default=0)} of {settings['num_iterations']} iterations done{_begun(run, iterations)}"
        ),
        "iterations": _iterations_table(iterations),
        "kept_weights": _kept_weights(iterations),
        "charts": "".join(f"<figure>{svg}</figure>" for svg in pictures),
        "health": _health_table(iterations),
        "set_aside": _set_aside_table(run),
        "about_lists": html.escape(cut),
        "data": data,
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], page)
    path = run / "report.html"
    write_text(path, page)
    return path


def _checked(run: str | Path) -> Path:
    if not (Path(run) / "run.yaml").is_file():
        raise DataError(f"{str(run)!r} is no folder of a run: it has no run.yaml.")
    return Path(run)


def _read_iterations(run: Path) -> dict[int, Row]:
    """What is there of each iteration, 0 being the initial model."""
    iterations: dict[int, Row] = {}
    for number, folder in iteration_folders(run).items():
        found: Row = {}
        for name in ("evaluation", "selection", "health", "monitor"):
            if (folder / f"{name}.json").exists():
                found[name] = read_json(folder / f"{name}.json")
        if (folder / "training_log.jsonl").exists():
            found["training_log"] = read_jsonl(folder / "training_log.jsonl")
        if "evaluation" in found:
            found["statistics"] = statistics_of(folder, number)
            iterations[number] = found
    return iterations


def _model_name(name: str) -> str:
    """The hub id, or the last part of a path: a page that is passed on tells nothing of the machine."""
    return Path(name).name if Path(name).exists() or name.startswith((".", "/", "~")) else name


# Tables


def _iterations_table(iterations: dict[int, Row]) -> str:
    head = [
        "",
        "held-out reward",
        "gain over the start",
        "tokens",
        "end on their own",
        "KL from the start",
        "lists",
        "candidates",
    ]
    unrewarded = [found["evaluation"]["unrewarded"] for found in iterations.values()]
    lines = []
    for number, found in iterations.items():
        evaluation, selection = found["evaluation"], found.get("selection", {})
        kl = evaluation.get("kl_from_initial")
        lines.append(
            [
                "start" if number == 0 else f"iteration {number}",
                with_error(evaluation["reward"]),
                with_error(evaluation["gain"], "+") if number else "",
                _number(evaluation["tokens"], ".1f"),
                f"{evaluation['finished']:.0%}",
                with_error(kl) if kl else "",
                str(selection.get("lists", "")),
                str(selection.get("candidates", "")),
            ]
        )
    if any(unrewarded):
        head.append("without a reward")
        lines = [[*line, str(count)] for line, count in zip(lines, unrewarded, strict=True)]
    return _table(head, lines, first_is_text=True)


def _kept_weights(iterations: dict[int, Row]) -> str:
    """A line for each iteration that did not end with the last weights of its training."""
    explanations = {number: found.get("monitor", {}).get("explanation") for number, found in iterations.items()}
    return "".join(
        f'<p class="bad">Iteration {number}: {html.escape(text)}</p>'
        for number, text in explanations.items()
        if text is not None
    )


def _begun(run: Path, iterations: dict[int, Row]) -> str:
    """The iteration that is not finished, if there is one."""
    unfinished = [number for number in iteration_folders(run) if number and number not in iterations]
    return f" · iteration {unfinished[-1]} has begun" if unfinished else ""


def _set_aside_table(run: Path) -> str:
    """What was left out and why, if anything was, also in an iteration that is not finished; the first of many."""
    lines = []
    for number, folder in iteration_folders(run).items():
        for name, rows in set_aside_in(folder).items():
            for row in rows[:_MAX_SET_ASIDE]:
                cells = (str(number), name.replace("_", " "), row["prompt"][:200], row["reason"][:300])
                lines.append("".join(f"<td class=text>{html.escape(cell)}</td>" for cell in cells))
            if len(rows) > _MAX_SET_ASIDE:
                lines.append(f"<td></td><td colspan=3>and {len(rows) - _MAX_SET_ASIDE} more</td>")
    if not lines:
        return ""
    head = "<tr><th>iteration</th><th>from</th><th>prompt</th><th>why</th></tr>"
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<h2>Set aside</h2>\n<div class="scroll"><table>{head}{body}</table></div>'


def _health_table(iterations: dict[int, Row]) -> str:
    checked = {number: found["health"] for number, found in iterations.items() if "health" in found}
    if not checked:
        return "<p>No iteration is finished yet.</p>"
    names = [check["name"] for check in next(iter(checked.values()))]
    cells = "".join(f"<th class=number>iteration {number}</th>" for number in checked)
    lines = [f"<tr><th>check</th>{cells}<th>should be</th><th>if it is not</th></tr>"]
    for row, name in enumerate(names):
        values = [checks[row] for checks in checked.values()]
        cells = "".join(
            "<td class='number "
            f"{'good' if x['ok'] else 'bad'}'>{_number(x['value'], '.3g')}{'' if x['ok'] else ' ⚠'}</td>"
            for x in values
        )
        texts = "".join(f"<td class=text>{_with_code(values[-1][x])}</td>" for x in ("limit", "meaning"))
        lines.append(f"<tr><td>{html.escape(name.replace('_', ' '))}</td>{cells}{texts}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _with_code(text: str) -> str:
    """Escaped text in which names of options look like code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _table(head: list[str], lines: list[list[str]], first_is_text: bool) -> str:
    def cells(tag: str, values: list[str]) -> str:
        return "".join(
            f"<{tag}{'' if first_is_text and i == 0 else ' class=number'}>{html.escape(v)}</{tag}>"
            for i, v in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


# Candidate lists


def _pack(run: Path, iterations: dict[int, Row]) -> tuple[str, str]:
    """Lists, packed for the page, and sentences where there are more of them or texts had to be cut."""
    lists = [(number, CandidateList.from_row(row)) for number, row in shown_lists(run, iterations)]
    texts = [[made.prompt.text, *(candidate.text for candidate in made.all_candidates)] for _, made in lists]
    longest = max((len(text) for of_list in texts for text in of_list), default=0)
    data, limit = "", None
    for limit in _TEXT_LIMITS:
        if limit is not None and limit >= longest and data:
            continue  # nothing would be cut
        packed = gzip.compress(json.dumps(_list_data(lists, limit), ensure_ascii=True).encode(), 6, mtime=0)
        data = base64.b64encode(packed).decode()
        if len(data) <= MAX_DATA_BYTES:
            break
    said = []
    total = sum(found["statistics"].get("num_lists", 0) for found in iterations.values())
    if len(lists) < total:
        said.append(
            f"{len(lists)} of {total} prompts are shown, evenly spread over the run. Pictures and tables are of all. "
            f"Any other: larpo report {run.resolve().name} --prompt ID (the prompt_id of lists.jsonl)."
        )
    if limit is not None:
        said.append(f"Texts of more than {limit} characters are cut; the run's lists.jsonl has all.")
    return data, " ".join(said)


def _list_data(shown: list[tuple[int, CandidateList]], limit: int | None) -> Row:
    numbers: dict[str, int] = {}

    def text_number(text: str) -> int:
        if limit is not None and len(text) > limit:
            text = f"{text[:limit]} […{len(text) - limit} more characters]"
        return numbers.setdefault(text, len(numbers))

    def as_candidate(candidate: Candidate, why: str | None) -> Row:
        names = ("reward", "rank", "source", "iteration", "temperature", "count")
        about = {name: getattr(candidate, name) for name in names}
        return {"text": text_number(candidate.text), "why": why} | about

    lists = []
    for number, made in shown:
        candidates = [as_candidate(candidate, None) for candidate in made.selected]
        candidates += [as_candidate(candidate, why) for candidate, why in made.left_out]
        candidates.sort(key=lambda c: math.inf if c["rank"] is None else c["rank"])
        lists.append(
            {
                "id": made.prompt.id,
                "iteration": number,
                "prompt": text_number(as_text(made.prompt.content)),
                "problem": made.problem,
                "candidates": candidates,
            }
        )
    return {"texts": list(numbers), "lists": lists}


def as_text(prompt: Content) -> str:
    """A prompt to be read by a person, with the roles of a conversation."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)


def describe_prompt(run: str | Path, name: str) -> str:
    """
    All lists of a prompt as text.

    Args:
        run: Folder of the run.
        name: The `prompt_id` of its rows, or how it begins.

    Raises:
        DataError: If the run has no list of it.
    """
    lines: list[str] = []
    for number, row in lists_of_prompt(_checked(run), name):
        made = CandidateList.from_row(row)
        lines += [f"Iteration {number}, prompt {made.prompt.id}{f': {made.problem}' if made.problem else ''}"]
        lines += [as_text(made.prompt.content), ""]
        both = [*((candidate, "selected") for candidate in made.selected), *made.left_out]
        for candidate, why in sorted(both, key=lambda pair: pair[0].rank or math.inf):
            facts = [
                "no reward" if candidate.reward is None else f"reward {candidate.reward:g}",
                None if candidate.rank is None else f"rank {candidate.rank}",
                candidate.source.replace("_", " "),
                f"iteration {candidate.iteration}",
                f"{candidate.count} times" if candidate.count > 1 else None,
                why,
            ]
            lines += ["--- " + ", ".join(filter(None, facts)), candidate.text, ""]
    if not lines:
        raise DataError(f"{str(run)!r} has no list of a prompt {name!r}; `prompt_id` in its lists.jsonl names them.")
    return "\n".join(lines)
