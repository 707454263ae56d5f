"""Candidate lists against an oracle in plain Python, and their parts."""

import json
import math
import random
from dataclasses import replace

import lanes
import pytest

from trl_larpo import ConfigError, DataError
from trl_larpo.candidates import Candidate, CandidateList, CandidatePool, Selection, build_list, build_lists
from trl_larpo.prompts import Prompt, prompt_id
from trl_larpo.run.memory import earlier_iterations
from trl_larpo.run.negatives import add_responses_to_other_prompts, random_prompts, related_prompts


def pool_of(candidates):
    return CandidatePool(Prompt.of("p"), candidates)


def oracle(candidates, selection):
    """Texts and rewards of the list, by the rules as they are written in the documentation; None if there is no "
    "list."""
    mode, seen, cut_off = selection.truncated_completions, [], []
    for c in candidates:
        if c.completion.strip() == "":
            continue
        key = (c.completion, c.finished)
        if mode == "rank_last" and not c.finished:
            cut_off += [] if c.completion in [text for text, _ in cut_off] else [(c.completion, c.reward)]
        elif c.reward is not None and (c.finished or mode == "by_reward"):
            seen += [] if key in [other for other, _ in seen] else [(key, c.reward)]
    ranked = []
    for (text, _), reward in seen:  # insertion: behind all that are at least as good
        place = len([1 for other in ranked if other[1] >= reward])
        ranked.insert(place, (text, reward))
    # Half of the worst, rounded up; one for four that ended where all are taken, and at least one
    share = max(1, len(ranked) // 4) if selection.num_worst is None else (selection.num_worst + 1) // 2
    cut_off = cut_off[:share]
    if len(ranked) < 2:
        return None
    gap = ranked[0][1] - ranked[-1][1]
    if gap == 0 or gap < selection.min_reward_gap:
        return None
    ranked += cut_off
    a, b = selection.num_best, selection.num_worst
    if a is not None:
        return [item for i, item in enumerate(ranked) if i < a or i >= len(ranked) - b]
    cap = selection.max_list_size
    if cap is None or cap >= len(ranked):
        return ranked
    picked = [round(k * (len(ranked) - 1) / (cap - 1) + 1e-9) for k in range(cap)]
    return [ranked[i] for i in picked]


SELECTIONS = [
    Selection(),
    Selection(1, 1),
    Selection(1, 3),
    Selection(2, 2),
    Selection(3, 1),
    Selection(max_list_size=2),
    Selection(max_list_size=4),
    Selection(max_list_size=7),
    Selection(min_reward_gap=1.5),
    Selection(2, 2, min_reward_gap=2.0),
]
SELECTIONS += [
    replace(selection, truncated_completions=mode) for selection in SELECTIONS for mode in ("by_reward", "drop")
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("memory", lanes.some_are_fast(["none", "previous", "all"], {"all"}))
def test_lists_equal_the_oracle(selection, memory):
    # Few texts and few rewards, so that duplicates and ties are common
    rng = random.Random(f"{selection}{memory}")
    for _ in range(300):
        history = {
            iteration: [
                Candidate(
                    completion=rng.choice(["a", "b", "c", "d", "e", "f", "g", "h", "", " "]),
                    reward=rng.choice([None, 0.0, 0.0, 1.0, 2.0, 2.5]),
                    iteration=iteration,
                    finished=rng.random() < 0.85,
                )
                for _ in range(rng.randint(0, 9))
            ]
            for iteration in (1, 2, 3)
        }
        pool = [c for i in [3, *earlier_iterations(memory, 3)] for c in history[i]]
        made, expected = build_list(pool_of(pool), selection), oracle(pool, selection)
        assert (made.problem is None) == (expected is not None)
        assert [(c.completion, c.reward) for c in made.selected] == (expected or [])
        # Every completion is accounted for
        total = sum(c.count for c in made.selected) + sum(c.count for c, _ in made.left_out)
        assert total == len(pool)


def test_duplicates_are_counted_and_the_first_stays():
    first = Candidate("a", 1.0, iteration=3)
    made = build_list(pool_of([first, Candidate("b", 0.0, iteration=3), Candidate("a", 5.0, iteration=1)]), Selection())
    assert made.selected == [replace(first, count=2, rank=1), Candidate("b", 0.0, iteration=3, rank=2)]
    assert made.num_duplicates == 1


def test_completions_of_several_messages_are_compared_in_all_of_them():
    def said(first, last):
        return [{"role": "assistant", "content": first}, {"role": "user", "content": "?"}, {"role": "assistant"} | last]

    def called(name):
        return [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": {}}}]}]

    completions = [said("a", {"content": "z"}), said("b", {"content": "z"}), called("f"), called("g")]
    again = [{"content": "", "name": None, **called("g")[0]}]  # as Parquet gives it
    empty = said("a", {"content": " "})
    pool = [Candidate(each, float(reward)) for reward, each in enumerate([*completions, again, empty])]
    made = build_list(pool_of(pool), Selection())
    assert [c.completion for c in made.selected] == completions[::-1] and made.num_duplicates == 1
    assert made.left_out == [(pool[-1], "empty")]


def test_rows_say_where_candidates_come_from_and_what_became_of_the_rest():
    pool = [
        Candidate("best", 3.0, iteration=2, temperature=0.8),
        Candidate("cut", 9.0, finished=False),
        Candidate("middle", 2.0, source="random_prompt"),
        Candidate("worst", 1.0),
        Candidate(" ", 0.0),
        Candidate("unjudged", None),
    ]
    other = [Candidate("x", 1.0), Candidate("y", 1.0)]
    selection = Selection(1, 1, truncated_completions="drop")
    pools = [CandidatePool(Prompt.of(text), candidates) for text, candidates in (("p", pool), ("q", other))]
    lists, counts = build_lists(pools, selection)
    rows = [made.to_row() for made in lists]
    assert [row["prompt"] for row in rows] == ["p", "q"]
    assert rows[0]["completions"] == ["best", "worst"] and rows[0]["rewards"] == [3.0, 1.0]
    assert rows[0]["candidates"][0] == {
        "iteration": 2, "source": "policy", "temperature": 0.8, "finished": True, "num_tokens": None,
        "count": 1, "rank": 1, "of_prompt": None,
    }  # fmt: skip
    assert {x["completion"]: x["why"] for x in rows[0]["left_out"]} == {
        "cut": "cut off", "middle": "not selected", " ": "empty", "unjudged": "no reward",
    }  # fmt: skip
    assert rows[1]["problem"] == "tied" and rows[1]["completions"] == []
    assert [CandidateList.from_row(row) for row in rows] == [replace(made, num_duplicates=0) for made in lists]
    assert counts.summary() == (
        "1 lists of 2 candidates; left out: 1 prompts with all rewards equal, 1 completions cut off, 1 empty, 1 "
        "without "
        "a reward, 1 not selected."
    )


CUT_OFF = [Candidate(f"cut {i}", reward, finished=False) for i, reward in enumerate([9.0, None, 5.0, 4.0])]
ENDED = [Candidate("good", 3.0), Candidate("fair", 2.0), Candidate("poor", 1.0)]


@pytest.mark.parametrize(
    "selection, expected",
    [
        (Selection(), "good fair poor cut-0"),  # one for four that ended, and at least one
        (Selection(truncated_completions="by_reward"), "cut-0 cut-2 cut-3 good fair poor"),
        (Selection(truncated_completions="drop"), "good fair poor"),
        # Of the worst at most half, rounded up
        (Selection(1, 1), "good cut-0"),
        (Selection(2, 2), "good fair poor cut-0"),
        (Selection(1, 3), "good poor cut-0 cut-1"),
        (Selection(1, 4), "good fair poor cut-0 cut-1"),
        (Selection(1, 3, truncated_completions="by_reward"), "cut-0 good fair poor"),
    ],
)
def test_what_becomes_of_completions_that_were_cut_off(selection, expected):
    made = build_list(pool_of([CUT_OFF[0], *ENDED, *CUT_OFF[1:]]), selection)
    assert " ".join(c.completion.replace(" ", "-") for c in made.selected) == expected
    [made], counts = build_lists([pool_of([*CUT_OFF, *ENDED])], selection)
    row = made.to_row()
    assert row["finished"] == [c.finished for c in made.selected]
    assert counts.truncated == row["finished"].count(False)


def test_ending_alone_makes_no_list():
    tied = [Candidate("a", 1.0), Candidate("b", 1.0)]
    assert build_list(pool_of([*tied, CUT_OFF[0]]), Selection()).problem == "tied"
    assert build_list(pool_of([tied[0], CUT_OFF[0]]), Selection()).problem == "too_few"
    assert build_list(pool_of([*ENDED, CUT_OFF[0]]), Selection(min_reward_gap=5.0)).problem == "small_gap"
    assert build_list(pool_of(CUT_OFF), Selection()).problem == "too_few"


def test_a_cut_off_completion_keeps_its_tokens():
    pool = [Candidate("a", 1.0), Candidate("c", 0.0), Candidate("b\ufffd", None, finished=False, token_ids=[5, 6])]
    [made], _ = build_lists([pool_of(pool)], Selection())
    row = made.to_row()
    assert row["completion_ids"] == ["", "", "5 6"]


def test_short_lists_are_kept_and_counted():
    pool = pool_of([Candidate("a", 1.0), Candidate("b", 0.0)])
    _, counts = build_lists([pool], Selection(2, 2))
    assert (counts.lists, counts.prompts_short) == (1, 1)
    assert counts.summary().endswith("1 lists are shorter than asked for.")


def test_memory_names_the_iterations():
    assert [earlier_iterations(memory, 4) for memory in ("none", "previous", "all")] == [[], [3], [3, 2, 1]]
    assert earlier_iterations("all", 1) == []
    with pytest.raises(ConfigError, match="`memory` is 'some'"):
        earlier_iterations("some", 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_best": 1}, "go together"),
        ({"num_best": 0, "num_worst": 2}, "at least 1"),
        ({"num_best": 1, "num_worst": 1, "max_list_size": 4}, "`max_list_size` has no effect"),
        ({"max_list_size": 1}, "`max_list_size` is 1"),
        ({"truncated_completions": "keep"}, "`truncated_completions` is 'keep'; it must be one of rank_last"),
        ({"min_reward_gap": -1.0}, "`min_reward_gap` is -1"),
        ({"min_reward_gap": float("nan")}, "`min_reward_gap` is nan"),
    ],
)
def test_impossible_selections_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Selection(**options)


def test_related_prompts_share_rare_words():
    # Forty prompts of one wording: its words say little, those of the topic much
    topics = ["bees", "trains", *(f"topic{i}" for i in range(38))]
    texts = [f"Tell me a fact about {topic}." for topic in topics]
    texts += ["How do bees make honey?", "When do trains leave the station?"]
    related = related_prompts(texts)
    assert (related[0], related[1], related[40], related[41]) == (40, 41, 0, 1)
    assert all(other != i for i, other in enumerate(related))


def test_related_prompts_are_those_of_plain_loops():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefghij", k=rng.randint(1, 6))) for _ in range(40)] + ["?", "unique"]
    words = [text.replace("?", "").split() for text in texts]
    num_with = {word: sum(word in of_text for of_text in words) for of_text in words for word in of_text}
    vectors = [
        {w: of_text.count(w) * (math.log(len(texts) / num_with[w]) + 1e-3) for w in of_text} for of_text in words
    ]
    norms = [math.hypot(*vector.values()) or 1.0 for vector in vectors]
    for i, place in enumerate(related_prompts(texts)):
        cosines = [
            round(1e5 * sum(vectors[i][w] * x.get(w, 0.0) for w in vectors[i]) / norms[i] / norms[j])
            if j != i
            else -math.inf
            for j, x in enumerate(vectors)
        ]
        if place is None:
            assert max(cosines) <= 1
            continue
        assert cosines[place] >= max(cosines) - 1  # what rounding makes of it


def test_related_prompts_are_looked_for_among_those_that_share_the_rarest_words():
    texts = [f"please tell me about topic{i // 2}" for i in range(400)]  # in pairs
    assert related_prompts(texts, most_compared=1) == [i + 1 - 2 * (i % 2) for i in range(400)]


@pytest.mark.parametrize(
    "texts",
    [
        ["请写一首关于春天的诗", "怎么做番茄炒蛋?", "番茄炒蛋要放糖吗", "关于春天有什么古诗"],
        ["春についての詩を書いてください", "トマトの卵炒めはどう作りますか", "卵炒めにトマトは必要?", "春の詩が好きだ"],
        ["봄에 대한 시를 써 줘", "토마토달걀볶음 만드는 법", "토마토달걀볶음에는 설탕?", "봄에는 시인이 시를 쓴다"],
        ["เขียนบทกวีเกี่ยวกับฤดูใบไม้ผลิ", "วิธีทำไข่ผัดมะเขือเทศ", "ไข่ผัดมะเขือเทศใส่น้ำตาลไหม", "ฤดูใบไม้ผลิมีบทกวีอะไร"],
    ],
    ids=["Chinese", "Japanese", "Korean", "Thai"],
)
def test_related_prompts_where_words_have_no_spaces_between_them(texts):
    assert related_prompts(texts) == [3, 2, 1, 0]


def test_prompts_that_share_no_word_get_responses_to_random_ones(caplog):
    caplog.set_level("INFO", logger="trl_larpo")
    texts = ["Where do bees live?", "Do bees sleep?", *(f"unique{i}" for i in range(30)), "?"]
    assert related_prompts(texts) == [1, 0] + [None] * 31
    pools = [CandidatePool(Prompt.of(text), [Candidate(text)]) for text in texts]

    def taken(names, seed=0):
        found = add_responses_to_other_prompts(pools, names, 1, seed, iteration=2)
        assert all(c.of_prompt != pool.prompt.id for pool in found for c in pool.candidates)
        return [[c.completion for c in pool.candidates if c.source in names] for pool in found]

    related = taken(["related_prompt"])
    assert related[:2] == [[texts[1]], [texts[0]]] and len({x for [x] in related}) > 10
    assert related == taken(["related_prompt"]) != taken(["related_prompt"], seed=1)
    assert "Iteration 2: 31 of 33 prompts have no word in common with another one" in caplog.text
    both = taken(["related_prompt", "random_prompt"])
    assert sum(one == other for one, other in both) < 10  # two different negatives


def test_random_prompts_are_others_and_repeatable():
    ids = [prompt_id(f"prompt {i}") for i in range(50)]
    drawn = random_prompts(ids, seed=0, iteration=1)
    assert drawn == random_prompts(ids, seed=0, iteration=1)
    assert all(other != i and 0 <= other < 50 for i, other in enumerate(drawn))
    assert drawn != random_prompts(ids, seed=0, iteration=2) and drawn != random_prompts(ids, seed=1, iteration=1)
    assert len(set(drawn)) > 20


def test_prompt_ids_depend_on_content_alone():
    assert prompt_id([{"role": "user", "content": "é"}]) == prompt_id([{"content": "é", "role": "user"}])
    assert prompt_id("a") != prompt_id("b")


def test_lists_are_read_as_they_were_written():
    prompt = Prompt.of("p", {"answer": "é", "of mixed types": [1, "a", {"b": None}], "tools": [{"a": 1}]})
    made = build_list(CandidatePool(prompt, [Candidate("a", 1.0), Candidate("b", 0.0), Candidate("")]), Selection())
    row = json.loads(json.dumps(made.to_row()))
    assert CandidateList.from_row(row) == made and row["tools"] == '[{"a": 1}]'
    earlier = {name: value for name, value in row.items() if name not in ("columns", "tools")}  # of an earlier version
    assert CandidateList.from_row(earlier) == replace(made, prompt=Prompt.of("p"))


def test_rows_of_pools_keep_rewards_and_never_mix_judges():
    judged = [Candidate("a", 1.0, scored_by="x"), Candidate("b", None, scored_by="x")]
    for candidates in ([], [Candidate("a", 1.0), Candidate("b")], [Candidate("a"), Candidate("b")], judged):
        pool = CandidatePool(Prompt.of("p", {"answer": "2"}), candidates)
        assert CandidatePool.from_row(pool.to_row()) == pool
    assert "rewards" not in CandidatePool(Prompt.of("p"), [Candidate("a")]).to_row()
    with pytest.raises(DataError, match="different rewards"):
        CandidatePool(Prompt.of("p"), [*judged, Candidate("c", 1.0, scored_by="y")]).to_row()
