"""
Candidates and candidate lists: completions of a prompt, merged with those of earlier iterations, ranked and selected.

A [`Candidate`] is made by the sampler and travels through the pool of its prompt ([`CandidatePool`]) and the list to
train on ([`CandidateList`]) to the trainer's dataset and the page. [`build_list`] is the rule for one prompt,
[`build_lists`] applies it to all and counts what became of every completion. Source: "LLM Alignment as Retriever
Optimization", section 3.2 (hard negatives, candidate lists) and Algorithm 1.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import DataError
from .prompts import Content, Prompt, Row, completion_key, completion_text, is_empty
from .selection import Selection

_OF_TEMPLATES = ("tools", "chat_template_kwargs")  # the user's columns that a training reads in each row


@dataclass(frozen=True, slots=True)  # slots: there are millions of them
class Candidate:
    """
    One completion of a prompt: where it came from, and what is known of it. Made by the sampler or read from a file.

    Attributes:
        completion: Its text, or its list of messages.
        reward: What the judge says, larger is better; `None` if it says nothing, not all that it says of others, or
            nothing yet.
        iteration: Iteration that sampled it, from 1 on.
        source: `"policy"`, `"low_temperature"`, `"high_temperature"`, `"related_prompt"`, `"random_prompt"`, or a name
            that came with a file.
        temperature: Sampling temperature; `None` where unknown.
        finished: Whether the model ended it on its own; `False` where `max_new_tokens` cut it off.
        num_tokens: Its tokens; `None` where unknown.
        token_ids: Its tokens as they were sampled, an end token included, where they are known and its text alone does
            not give them back. `None` otherwise.
        count: How many times it was sampled.
        rank: Its place among all distinct usable completions of its prompt, 1 for the best; `None` where it has none.
        of_prompt: Name of the prompt that it answers, where that is another one.
        reward_parts: What each reward says, by its name; empty where unknown.
        scored_by: Name of the rewards that gave `reward`, with their settings; `None` if none did.
        ref_logp: Its log-probability under the reference model, the sum over its tokens; `None` if not computed.
    """

    completion: Content
    reward: float | None = None
    iteration: int = 1
    source: str = "policy"
    temperature: float | None = None
    finished: bool = True
    num_tokens: int | None = None
    token_ids: list[int] | None = None
    count: int = 1
    rank: int | None = None
    of_prompt: str | None = None
    reward_parts: dict[str, float | None] = field(default_factory=dict)
    scored_by: str | None = None
    ref_logp: float | None = None

    @property
    def text(self) -> str:
        return completion_text(self.completion)

    def description(self) -> Row:
        """Everything but what rows keep in columns of their own."""
        return {name: getattr(self, name) for name in _DESCRIPTION}

    @classmethod
    def from_row(cls, completion: Content, reward: float | None, description: Row, **known: Any) -> "Candidate":
        """A candidate from its columns. What a description holds beyond the attributes is left out."""
        # Parquet fills gaps with None
        told = {k: v for k, v in description.items() if k in _DESCRIBED and k not in known and v is not None}
        return cls(completion, reward, **told, **known)


_DESCRIBED = {each.name for each in fields(Candidate)} - {"completion", "reward"}
_DESCRIPTION = ("iteration", "source", "temperature", "finished", "num_tokens", "count", "rank", "of_prompt")
_ALWAYS_WRITTEN = ("iteration", "source", "temperature", "finished", "num_tokens")


@dataclass(frozen=True)
class CandidatePool:
    """
    A prompt and all of its candidates.

    Attributes:
        prompt: The prompt.
        candidates: Its candidates; those of the current iteration first.
    """

    prompt: Prompt
    candidates: list[Candidate]

    @classmethod
    def from_row(cls, row: Row) -> "CandidatePool":
        """From a row of a run's files: `completions` and `candidates`, and `rewards` and `reward_id` if scored."""
        rewards = row.get("rewards") or [None] * len(row["completions"])
        candidates = [
            Candidate.from_row(completion, reward, description, scored_by=row.get("reward_id"))
            for completion, reward, description in zip(row["completions"], rewards, row["candidates"], strict=True)
        ]
        return cls(Prompt.from_row(row), candidates)

    def to_row(self) -> Row:
        """
        A row whose columns `prompt`, `completions` and `rewards` are those of a dataset of lists.

        Raises:
            DataError: If different rewards have scored the candidates.
        """
        row = self.prompt.to_row() | {
            "completions": [candidate.completion for candidate in self.candidates],
            "candidates": [_short_description(candidate) for candidate in self.candidates],
        }
        rewards = [candidate.reward for candidate in self.candidates]
        judges = {candidate.scored_by for candidate in self.candidates} or {None}
        if len(judges) > 1:
            raise DataError(
                f"Candidates of the prompt {self.prompt.text[:60]!r} were scored by different rewards, which cannot be "
                "compared. Score all of them again."
            )
        [reward_id] = judges
        if reward_id is not None:
            return row | {"rewards": rewards, "reward_id": reward_id}
        return row if set(rewards) <= {None} else row | {"rewards": rewards}

    def with_candidates(self, candidates: list[Candidate]) -> "CandidatePool":
        return CandidatePool(self.prompt, candidates)

    def with_columns(self, names: Iterable[str]) -> "CandidatePool":
        """The same with these columns of the user alone; those that its prompt lacks are `None`."""
        return replace(self, prompt=replace(self.prompt, columns={n: self.prompt.columns.get(n) for n in names}))

    def without_rewards(self) -> "CandidatePool":
        """The same, still to be scored."""
        return self.with_candidates([replace(c, reward=None, reward_parts={}, scored_by=None) for c in self.candidates])

    def with_comparable_rewards(self) -> "CandidatePool":
        """
        The same, where a candidate has no reward if one of its parts is `None` that others of the prompt have.

        Its sum would lack what theirs hold: next to penalties it would rank first.
        """
        given = {name for c in self.candidates for name, value in c.reward_parts.items() if value is not None}
        missing = [any(c.reward_parts.get(name, 0.0) is None for name in given) for c in self.candidates]
        pairs = zip(self.candidates, missing, strict=True)
        return self.with_candidates([replace(c, reward=None) if lacks else c for c, lacks in pairs])


def _short_description(candidate: Candidate) -> Row:
    """What is always written, and of the rest what is not at its default."""
    row = {name: getattr(candidate, name) for name in _ALWAYS_WRITTEN}
    further = {name: getattr(candidate, name) for name in ("token_ids", "of_prompt", "reward_parts")}
    return (
        row
        | {name: value for name, value in further.items() if value}
        | ({"count": candidate.count} if candidate.count != 1 else {})
    )


@dataclass
class SelectionCounts:
    """
    What became of every prompt and completion.

    Attributes:
        lists: Lists to train on.
        candidates: Candidates in them.
        not_selected: Usable candidates that the selection passed over.
        duplicates: Completions that the same prompt had already, word for word in all messages.
        truncated: Cut-off candidates in the lists, trained on without an end token.
        unfinished: Cut-off completions that were left out: all with `truncated_completions="drop"`, else those beyond
            [`Selection.max_truncated`].
        empty: Completions whose last message has neither text nor calls of tools.
        unrewarded: Completions to which the reward did not apply.
        prompts_too_few: Prompts with fewer than two usable candidates.
        prompts_tied: Prompts whose candidates all have the same reward.
        prompts_small_gap: Prompts whose best and worst are closer than `min_reward_gap`.
        prompts_short: Lists with fewer candidates than `num_best` and `num_worst` ask for. They are kept.
    """

    lists: int = 0
    candidates: int = 0
    truncated: int = 0
    not_selected: int = 0
    duplicates: int = 0
    unfinished: int = 0
    empty: int = 0
    unrewarded: int = 0
    prompts_too_few: int = 0
    prompts_tied: int = 0
    prompts_small_gap: int = 0
    prompts_short: int = 0

    def add(self, made: "CandidateList", selection: Selection) -> None:
        """Counts one prompt."""
        reasons = [reason for _, reason in made.left_out]
        self.unfinished += reasons.count("cut off")
        self.empty += reasons.count("empty")
        self.unrewarded += reasons.count("no reward")
        self.not_selected += reasons.count("not selected")
        self.duplicates += made.num_duplicates
        if made.problem:
            name = f"prompts_{made.problem}"
            setattr(self, name, getattr(self, name) + 1)
            return
        self.lists += 1
        self.candidates += len(made.selected)
        self.truncated += sum(not candidate.finished for candidate in made.selected)
        self.prompts_short += len(made.selected) < (selection.full_size or 0)

    def summary(self) -> str:
        """One sentence for a person."""
        left_out = {
            "prompts with all rewards equal": self.prompts_tied,
            "prompts with fewer than 2 usable completions": self.prompts_too_few,
            "prompts with too small a reward gap": self.prompts_small_gap,
            "completions cut off": self.unfinished,
            "duplicate": self.duplicates,
            "empty": self.empty,
            "without a reward": self.unrewarded,
            "not selected": self.not_selected,
        }
        parts = [f"{count} {what}" for what, count in left_out.items() if count]
        truncated = f" ({self.truncated} cut off)" if self.truncated else ""
        short = f" {self.prompts_short} lists are shorter than asked for." if self.prompts_short else ""
        return (
            f"{self.lists} lists of {self.candidates} candidates{truncated}; left out: "
            f"{', '.join(parts) or 'nothing'}.{short}"
        )


@dataclass
class CandidateList:
    """
    The candidates of one prompt, sorted into those to train on and the rest.

    Attributes:
        prompt: Their prompt.
        selected: Best first.
        left_out: Candidate and the reason it is not in the list.
        problem: Why there is no list at all: `"too_few"`, `"tied"` or `"small_gap"`; `None` if there is one.
        num_duplicates: Completions that occur among the others already.
    """

    prompt: Prompt
    selected: list[Candidate] = field(default_factory=list)
    left_out: list[tuple[Candidate, str]] = field(default_factory=list)
    problem: str | None = None
    num_duplicates: int = 0

    @property
    def all_candidates(self) -> list[Candidate]:
        return [*self.selected, *(candidate for candidate, _ in self.left_out)]

    def to_row(self) -> Row:
        """
        A row of a dataset of lists (`prompt`, `completions`, `rewards`, `finished`, `completion_ids`, and `ref_logps`
        if known), with what else there is to know: `candidates` (source, iteration, temperature, rank, ... of each),
        `left_out` (the other candidates, and why), `problem`, `reward_id` if known, and `columns`, the user's, with
        `tools` and `chat_template_kwargs` once more for the training. These are JSON: Arrow has one type for all rows
        of a column.
        """
        row: Row = {
            "prompt_id": self.prompt.id,
            "prompt": self.prompt.content,
            "completions": [candidate.completion for candidate in self.selected],
            "rewards": [candidate.reward for candidate in self.selected],
            "finished": [candidate.finished for candidate in self.selected],
            # As text: of lists that are empty for the first ten thousand rows Arrow would not know the type
            "completion_ids": [" ".join(map(str, candidate.token_ids or [])) for candidate in self.selected],
            "candidates": [candidate.description() for candidate in self.selected],
            "left_out": [
                {"completion": candidate.completion, "reward": candidate.reward, "why": reason}
                | candidate.description()
                for candidate, reason in self.left_out
            ],
            "problem": self.problem,
            "columns": json.dumps(self.prompt.columns),
        }
        row |= _for_templates(self.prompt.columns)
        judge = next((candidate.scored_by for candidate in self.all_candidates if candidate.scored_by), None)
        row |= {} if judge is None else {"reward_id": judge}
        ref_logps = [candidate.ref_logp for candidate in self.selected]
        return row if None in ref_logps or not ref_logps else row | {"ref_logps": ref_logps}

    @classmethod
    def from_row(cls, row: Row) -> "CandidateList":
        """What `to_row` keeps, without the log-probabilities under the reference."""
        judge = row.get("reward_id")
        token_ids = row.get("completion_ids") or [""] * len(row["completions"])
        columns = zip(row["completions"], row["rewards"], row["candidates"], token_ids, strict=True)
        selected = [
            Candidate.from_row(
                completion, reward, about, token_ids=[int(x) for x in ids.split()] or None, scored_by=judge
            )
            for completion, reward, about, ids in columns
        ]
        left_out = [
            (Candidate.from_row(x["completion"], x["reward"], x, scored_by=judge), x["why"]) for x in row["left_out"]
        ]
        return cls(Prompt.from_row(row), selected, left_out, row["problem"])


def _for_templates(columns: Row) -> Row:
    """What chat templates are given, as JSON. The user's columns of these names that have another form are no such."""
    found = {}
    for name in _OF_TEMPLATES:
        value = columns.get(name)
        text = value if isinstance(value, str) else json.dumps(value)
        with contextlib.suppress(ValueError):
            if _is_for_templates(name, json.loads(text)):
                found[name] = text
    return found


def _is_for_templates(name: str, value: Any) -> bool:
    if name == "tools":
        return isinstance(value, list) and all(isinstance(tool, dict) for tool in value)
    return isinstance(value, dict)


def build_list(pool: CandidatePool, selection: Selection) -> CandidateList:
    """
    Ranks the candidates of one prompt and selects those to train on.

    Args:
        pool: The prompt and its candidates, those of the current iteration first. Of completions that are equal word
            for word the first stays and counts for all; where rewards tie, the first ranks higher.
        selection: What to take.

    Returns:
        The list; without anything selected where it would not be of use.
    """
    result = CandidateList(pool.prompt)
    distinct: dict[tuple[str, bool], Candidate] = {}

    def ranks_last(candidate: Candidate) -> bool:
        return selection.truncated_completions == "rank_last" and not candidate.finished

    for candidate in pool.candidates:
        key = completion_key(candidate.completion), candidate.finished
        if not candidate.finished and selection.truncated_completions == "drop":
            result.left_out.append((candidate, "cut off"))
        elif is_empty(candidate.completion):
            result.left_out.append((candidate, "empty"))
        elif candidate.reward is None and not ranks_last(candidate):
            result.left_out.append((candidate, "no reward"))
        elif key in distinct:
            first = distinct[key]
            distinct[key] = replace(first, count=first.count + candidate.count)
            result.num_duplicates += candidate.count
        else:
            distinct[key] = candidate

    rewarded = [(c.reward, c) for c in distinct.values() if c.reward is not None and not ranks_last(c)]
    rewarded.sort(key=lambda pair: -pair[0])
    gap = rewarded[0][0] - rewarded[-1][0] if rewarded else 0.0
    num_rewarded = len(rewarded)
    last = [candidate for candidate in distinct.values() if ranks_last(candidate)]
    num_last = selection.max_truncated(num_rewarded)
    result.left_out += [(candidate, "cut off") for candidate in last[num_last:]]
    in_order = [*(candidate for _, candidate in rewarded), *last[:num_last]]
    ranked = [replace(candidate, rank=rank) for rank, candidate in enumerate(in_order, start=1)]
    if num_rewarded < 2:
        result.problem = "too_few"
    elif gap == 0:  # also where some were cut off: such a list would teach nothing but to end soon
        result.problem = "tied"
    elif gap < selection.min_reward_gap:
        result.problem = "small_gap"
    places = set() if result.problem else set(selection.places(len(ranked)))
    for place, candidate in enumerate(ranked):
        if place in places:
            result.selected.append(candidate)
        else:
            result.left_out.append((candidate, "not selected" if result.problem is None else "no list"))
    return result


def build_lists(pools: Iterable[CandidatePool], selection: Selection) -> tuple[list[CandidateList], SelectionCounts]:
    """
    The candidate list of each prompt, or the reason it has none.

    Args:
        pools: Prompts and their candidates, current iteration first.
        selection: What to take.

    Returns:
        The lists, and the counts.
    """
    counts = SelectionCounts()
    return list(each_list(pools, selection, counts)), counts


def each_list(pools: Iterable[CandidatePool], selection: Selection, counts: SelectionCounts) -> Iterator[CandidateList]:
    """As [`build_lists`], one list at a time; `counts` has counted those that were taken."""
    for pool in pools:
        made = build_list(pool, selection)
        counts.add(made, selection)
        yield made
