"""Rules for verifiable instructions, and what is done with a reward that goes wrong."""

import copy
import functools
import math
import sys

import numpy as np
import pytest

from trl_larpo import ConfigError, DataError
from trl_larpo.candidates import Candidate, CandidatePool, Selection, build_list
from trl_larpo.pools import merge_pools
from trl_larpo.prompts import Prompt, without_thoughts
from trl_larpo.rewards import verifiers
from trl_larpo.rewards.functions import (
    Reward,
    check_columns,
    load_rewards,
    mean_preferences,
    reward_id,
    score_pools,
)
from trl_larpo.rewards.options import RewardOptions
from trl_larpo.rewards.scorer import RewardScorer
from trl_larpo.rewards.trl_convention import as_function
from trl_larpo.rewards.verifiers import (
    INSTRUCTIONS,
    boxed_answer,
    final_number,
    gsm8k_reward,
    is_repetitive,
    math_reward,
    sentences,
    verifiable_instruction_reward,
    verifiable_instructions_reward,
    words,
)

USER = [{"role": "user", "content": "Tell me about bees."}]


@pytest.mark.parametrize(
    "name, value, follows, breaks",
    [
        ("no_commas", None, "Bees make honey.", "Bees, too."),
        ("lowercase", None, "bees make honey.", "Bees make honey."),
        ("max_words", 3, "bees make honey", "bees make sweet honey"),
        ("min_words", 4, "bees make sweet honey", "bees make honey"),
        ("includes", "because", "Because of bees.", "The cause is bees."),
        ("excludes", "the", "There are other bees.", "The bees."),
        ("includes", "New York", "Bees of New\nYork.", "Newer York, new Yorkers."),
        ("excludes", "C++", "Bees know C.", "Bees know c++."),
        ("includes", "bee", "A --bee-- flies.", "Bee-like bee's."),
        ("starts_with", "well", "Well, bees.", "Bees do well."),
        ("ends_with", "?", "Do bees sleep? ", "Bees sleep."),
        ("num_sentences", 2, "Bees fly. Do they sleep?", "Bees fly at 3.5 m/s."),
    ],
)
def test_instructions(name, value, follows, breaks):
    assert INSTRUCTIONS[name](follows, value)
    assert not INSTRUCTIONS[name](breaks, value)


def test_words_and_sentences():
    assert words("It's a well-known fact: 3 bees, 2 hives!") == [
        "It's",
        "a",
        "well-known",
        "fact",
        "3",
        "bees",
        "2",
        "hives",
    ]
    assert sentences("One. Two!  Three?\nFour") == ["One.", "Two!", "Three?", "Four"]
    assert sentences("...") == []


def reward_of(text, finished=True):
    [reward] = verifiable_instruction_reward(
        [USER], [[{"role": "assistant", "content": text}]], instruction=["no_commas"], value=[None], finished=[finished]
    )
    return reward


def test_an_answer_must_end_and_say_something():
    assert reward_of("Bees make honey all summer.") == 1.0
    assert reward_of("Bees, wasps and ants all fly.") == 0.0
    assert reward_of("Bees make honey all summer.", finished=False) == 0.0
    assert reward_of("") == 0.0
    assert reward_of("Bees make honey.") == 0.0  # trivial answers satisfy most rules


def share_of(text, names=("no_commas", "max_words"), values=("", "6"), finished=True, about=None):
    completions, of_each = [[{"role": "assistant", "content": text}]], {"instructions": [names], "values": [values]}
    [reward] = verifiable_instructions_reward([USER], completions, **of_each, finished=[finished], about=[about])
    return reward


def test_instructions_are_graded():
    assert share_of("Bees make honey all summer.") == 1.0
    assert share_of("Bees make honey all summer long, too.") == 0.0
    assert share_of("Bees make honey all summer long in hives.") == 0.5
    assert share_of("Bees make honey all summer.", finished=False) == 0.0
    assert share_of("Bees make honey.") == 0.0
    assert share_of("Bees make honey all summer.", about="bees") == 1.0
    assert share_of("Wasps make nests all summer.", about="bees") == 0.0
    with pytest.raises(DataError, match="Unknown instruction 'sing'"):
        share_of("la", names=["sing"], values=[""])
    with pytest.raises(DataError, match="give lists, with one value for each instruction"):
        share_of("la", values=["6"])
    with pytest.raises(DataError, match="'max_words' cannot have the value None"):
        share_of("la", values=["", None])
    with pytest.raises(DataError, match="'includes' cannot have the value ' ': it is empty"):
        share_of("la", names=["includes"], values=[" "])
    with pytest.raises(DataError, match="values None; give lists"):
        share_of("la", values=None)


@pytest.mark.parametrize(
    "text, repetitive",
    [
        ("Because of the word because there is a because in because.", True),
        ("Bees are bees are bees are bees are bees.", True),
        ("Bees make honey. Bees make honey. Bees make honey.", True),
        ("Honey bees tell other bees where the flowers are by a dance that points away from the sun.", False),
        ("The cat and the dog and the bird and the fish live in the house by the sea.", False),
        ("", False),
    ],
)
def test_repetition(text, repetitive):
    assert is_repetitive(text) == repetitive


def test_unknown_instructions_are_named():
    with pytest.raises(DataError, match="Unknown instruction 'sing'; known are ends_with"):
        verifiable_instruction_reward([USER], ["la"], instruction=["sing"], value=[None], finished=[True])


def test_numbers_in_yaml_may_be_text():
    assert INSTRUCTIONS["max_words"]("bees fly", "2") and not INSTRUCTIONS["max_words"]("bees do fly", "2")


@pytest.mark.parametrize(
    "text, number",
    [
        ("He has 5 apples and buys 1,200 more.\n#### 1,205", 1205.0),
        ("So 3 + 4 = 7. The answer is \\boxed{7}, not 8.", 7.0),
        ("It costs $3.50.", 3.5),
        ("It is -2", -2.0),
        ("No idea.", None),
        (r"We get \boxed{\$18}. Check: 9 eggs times 2", 18.0),
        (r"\boxed{1{,}234} or \boxed{1,\!234}", 1234.0),
        ("#### 1. Add 3 eggs.\n#### 2. Double them.\nThe answer is \\boxed{14}.", 14.0),
        ("#### 18\nI checked 2 times.", 18.0),
        ("#### -$5", -5.0),
        (r"\boxed{-\$5}", -5.0),
        ("It is \u22125", -5.0),
        (r"\boxed{x=18} of 20", 18.0),
        (r"\boxed{3 \times 6 = 18\text{ cm}^2}", 18.0),
        (r"\boxed{\text{none}} of 20", 20.0),
        (r"\boxed{-\dfrac{3}{4}}", -0.75),
        ("It is 3/4.", 0.75),
        ("It is 3/0.", 0.0),
        ("1,2,3", 3.0),
        ("From 5-7", 7.0),
        ("It is .5 or 12,345.50", 12345.5),
        ("9" * 400, None),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == number


def test_gsm8k_reward_compares_numbers():
    answers = ["6 * 7 = 42\n#### 42"] * 3
    completions = ["It is 42.", [{"role": "assistant", "content": "42.0"}], "It is 41."]
    assert gsm8k_reward(["p"] * 3, completions, answer=answers) == [1.0, 1.0, 0.0]
    assert gsm8k_reward(["p"] * 2, ["9" * 400, "no idea"], answer=[42, 42]) == [0.0, 0.0]
    with pytest.raises(DataError, match="has no number"):
        gsm8k_reward(["p"], ["1"], answer=["none"])


def pool(prompt, completions, columns=None, finished=None):
    ended = [True] * len(completions) if finished is None else finished
    candidates = [Candidate(text, finished=x) for text, x in zip(completions, ended, strict=True)]
    return CandidatePool(Prompt.of(prompt, columns), candidates)


POOLS = [
    pool("p", ["a", "b"], {"kind": "x"}, [True, False]),
    pool("q", [], {"kind": "y"}),
    pool(USER, [[{"role": "assistant", "content": "c"}]], {"kind": "z"}),
]


def rewards_of(function, pools=POOLS, **options):
    scored = score_pools([Reward("mine", function, **options)], pools)
    return [[candidate.reward for candidate in pool.candidates] for pool in scored]


def test_rewards_come_back_by_prompt_and_columns_go_along():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [1, 2, None]

    assert rewards_of(reward) == [[1.0, 2.0], [], [None]]
    assert seen["prompts"] == ["p", "p", USER]
    assert seen["completions"] == ["a", "b", [{"role": "assistant", "content": "c"}]]
    assert (seen["kind"], seen["finished"]) == (["x", "x", "z"], [True, False, True])


def test_what_a_reward_does_to_its_arguments_changes_nothing():
    def careless(prompts, completions, **columns):
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, list):
                prompt.append({"role": "assistant", "content": "spoiled"})
                completions[i][0]["content"] = "spoiled"
                columns["notes"][i].append("spoiled")
        return [1.0] * len(prompts)

    def careless_ranker(prompt, completions):
        completions.pop()
        if isinstance(prompt, list):
            prompt.clear()
        return [[0.5, 0.5], [0.5, 0.5]]

    messages = [[{"role": "assistant", "content": text}] for text in "ab"]
    pools = [pool(USER, messages, {"notes": ["x"]})]
    before = copy.deepcopy(pools)
    assert score_pools([Reward("a", careless), Reward("b", careless_ranker, pairwise=True)], pools)
    assert pools == before


def test_columns_that_only_some_prompts_have_and_names_of_the_call_itself():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts)
        return [0.0] * len(prompts)

    columns = {"prompts": "mine", "completions": 3, "finished": "yes", "rewards": [9.0], "known": True, "prompt_id": 7}
    assert rewards_of(reward, [pool("p", ["a"], columns), pool("q", ["a"])]) == [[0.0], [0.0]]
    assert seen == {"prompts": ["p", "q"], "finished": [True, True], "rewards": [[9.0], None], "known": [True, None],
                    "prompt_id": [7, None]}  # fmt: skip


def test_weights_normalisation_and_rewards_that_do_not_apply():
    length = Reward("length", lambda completions, **_: [float(len(c)) for c in completions], weight=2.0)
    some = Reward("some", lambda completions, **_: [1.0 if c == "aa" else None for c in completions])
    pools = [pool("p", ["a", "aa", "aaa"])]
    [scored] = score_pools([length, some], pools, scored_by="these")
    assert [(c.reward, c.reward_parts, c.scored_by) for c in scored.candidates] == [
        (None, {"length": 1.0, "some": None}, "these"),
        (5.0, {"length": 2.0, "some": 1.0}, "these"),
        (None, {"length": 3.0, "some": None}, "these"),
    ]
    never = Reward("never", lambda completions, **_: [None] * len(completions))
    [scored] = score_pools([length, never], pools)
    assert [c.reward for c in scored.candidates] == [2.0, 4.0, 6.0], "what applies to none changes no order"
    [scored] = score_pools([length, never], pools, normalize=True)
    deviation = (2 / 3) ** 0.5
    assert [c.reward for c in scored.candidates] == pytest.approx([-2 / deviation, 0.0, 2 / deviation])


def test_a_candidate_that_a_penalty_does_not_apply_to_is_not_the_best():
    """Also among candidates that were scored before, and in merged files."""
    penalty = Reward("penalty", lambda completions, **_: [None if c == "a" else -float(len(c)) for c in completions])
    one = Reward("one", lambda completions, **_: [1.0] * len(completions))

    def scored(*texts):
        return score_pools([penalty, one], [pool("p", texts)], scored_by="these")[0]

    early, late = scored("a"), scored("bb", "ccc")
    assert [c.reward for c in early.candidates] == [1.0], "it is alone"
    [merged] = merge_pools([early, late])
    assert [c.reward for c in merged.candidates] == [None, -1.0, -2.0]
    assert [c.reward for c in scored("a", "bb", "ccc").candidates] == [None, -1.0, -2.0]
    made = build_list(merged, Selection())
    assert [c.text for c in made.selected] == ["bb", "ccc"] and [why for _, why in made.left_out] == ["no reward"]


def test_rewards_are_compared_with_those_of_candidates_scored_before(tmp_path, monkeypatch):
    (tmp_path / "some_apply.py").write_text(
        "def longer(prompts, completions, **_): return [None if c == 'a' else -1.0 for c in completions]\n"
        "def one(prompts, completions, **_): return [1.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    scorer = RewardScorer(RewardOptions(reward_funcs=["some_apply:longer", "some_apply:one"]), use_cpu=True)
    [before] = scorer.score_now([pool("p", ["a"])])
    [together] = scorer.score_now([before.with_candidates([*before.candidates, Candidate("bb")])])
    assert [c.reward for c in together.candidates] == [None, 0.0]


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda **_: [1.0, 2.0], "returned 2 values for 3 completions"),
        (lambda **_: 1.0, "returned float for 3 completions"),
        (lambda **_: [1.0, math.nan, 2.0], r"returned nan for completion 1 of the prompt 'p'"),
        (lambda **_: [1.0, 2.0, "good"], r"returned 'good' for completion 0 of the prompt 'Tell me about bees.'"),
        (lambda **_: [1.0, -(10**5000), 2.0], "returned a number too large for completion 1 of the prompt 'p'"),
        (lambda **_: [1.0, 1e300, 2.0], r"returned 1e\+300 for completion 1 of the prompt 'p'"),
        (lambda **_: 1 / 0, "The reward mine failed: ZeroDivisionError: division by zero"),
        (
            verifiable_instruction_reward,
            r"required keyword-only arguments: 'instruction'.*\(The prompts have the columns",
        ),
    ],
)
def test_rewards_that_go_wrong_are_named(function, message):
    with pytest.raises(DataError, match=message):
        rewards_of(function)


def test_columns_that_a_function_takes_are_checked_before_it_is_called():
    prompts = [Prompt.of("p", {"answer": "1", "finished": True}), Prompt.of("q", {"level": 2})]

    def check(function, pairwise=False):
        check_columns([Reward("mine", function, pairwise=pairwise)], prompts, "prompts")

    check(lambda prompts, completions, answer, hint=None, **columns: None)
    check(lambda prompts, completions, finished, answer, level: None)
    check(lambda prompt, completions: None, pairwise=True)
    check(lambda *arguments, **named: None)
    check(functools.wraps(gsm8k_reward)(lambda **columns: None))
    check(dict)
    with pytest.raises(ConfigError, match=r"mine needs the column `solution`, and the prompts have answer, level"):
        check(lambda completions, solution, **columns: None)
    with pytest.raises(ConfigError, match=r"mine takes no argument `finished`\. Let it end in `\*\*columns`"):
        check(lambda prompts, completions, answer, level: None)


def test_pairwise_rankers_become_mean_win_rates():
    def ranker(prompt, completions):
        return [[1.0 if a > b else 0.25 for b in completions] for a in completions]

    rows = [pool("p", ["a", "c", "b"])]
    assert rewards_of(ranker, rows, pairwise=True) == [[0.25, 1.0, 0.625]]
    assert mean_preferences([[0.0]]) == [None], "a single completion is preferred to none"
    assert rewards_of(lambda *_: [np.ones(3)] * 3, rows, pairwise=True) == [[1.0] * 3]
    for matrix in (
        None,
        1.0,
        [1.0] * 3,
        [None] * 3,
        [[0.0, 10**400, 0.0]] * 3,
        [[1.0]],
        [[0.0, 1.0, 1.0]] * 2,
        [[0.0, math.nan, 0.0]] * 3,
        [[0.0, None, 0.0]] * 3,
    ):
        with pytest.raises(DataError, match=r"The (ranker|reward) mine returned"):
            rewards_of(lambda *_, matrix=matrix: matrix, rows, pairwise=True)


def test_completions_of_another_model_are_what_rankers_compare_with():
    """Among themselves the samples of every model come to the same mean; against others they do not."""

    def ranker(prompt, completions):
        return [[float(len(a) > len(b)) for b in completions] for a in completions]

    rewards = [
        Reward("length", ranker, pairwise=True),
        Reward("one", lambda completions, **_: [1.0] * len(completions)),
    ]
    pools = [pool("p", ["aaa", "a"]), pool("q", ["a"])]
    against = {pools[0].prompt.id: ["aa", "", "aaaa"]}
    scored = score_pools(rewards, pools, normalize=True, against=against)
    assert [c.reward_parts for c in scored[0].candidates] == [
        {"length": 2 / 3, "one": 1.0},
        {"length": 1 / 3, "one": 1.0},
    ]
    assert scored[0].candidates[0].reward == pytest.approx(5 / 3), "not normalized"
    assert scored[1].candidates[0].reward_parts == {"length": None, "one": 1.0}, "no comparison, no reward"


THOUGHT = "<think>\nlet me see\n</think>\n\n"


@pytest.mark.parametrize(
    "text, answer",
    [
        (f"{THOUGHT}four", "four"),
        ("let me see</think>four", "four"),  # the chat template has begun the thought
        ("<think>no end", ""),
        ("no thought", "no thought"),
    ],
)
def test_answers_without_their_thoughts(text, answer):
    assert without_thoughts(text) == answer
    message = [{"role": "assistant", "content": text}]
    assert without_thoughts(message) == [{"role": "assistant", "content": answer}]


@pytest.mark.parametrize("strip", ["none", "rewards", "all"])
def test_what_rewards_see_of_thoughts_and_what_is_trained_on(tmp_path, monkeypatch, strip):
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions, **columns): return [float(len(c)) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    texts = [f"{THOUGHT}four", "<think>no end", "three"]
    cut = Candidate(texts[1], finished=False, token_ids=[1, 2])
    pools = [CandidatePool(Prompt.of("p"), [Candidate(texts[0]), cut, Candidate(texts[2])])]
    scorer = RewardScorer(RewardOptions(reward_funcs=["my_rewards:length"], strip_thinking=strip), use_cpu=True)
    [scored] = scorer.score(pools, tmp_path / "rewarded.jsonl")
    seen = texts if strip == "none" else ["four", "", "three"]
    assert [c.reward for c in scored.candidates] == [float(len(text)) for text in seen]
    assert [c.completion for c in scored.candidates] == (seen if strip == "all" else texts)
    assert scored.candidates[1].token_ids == (None if strip == "all" else [1, 2])
    assert [c.completion for c in scorer.score_now(pools)[0].candidates] == (seen if strip == "all" else texts)
    monkeypatch.delitem(sys.modules, "my_rewards")


def test_math_compares_answers_and_not_texts():
    pytest.importorskip("math_verify", reason="needs the extra [eval]")
    solution = r"So the answer is $\boxed{\frac{1}{2}}$."
    completions = [r"It is $\boxed{0.5}$", r"$\boxed{\frac{2}{4}}$", r"$\boxed{\frac{1}{3}}$", "no idea"]
    rewards = math_reward(["p"] * 4, completions, solution=[solution] * 4)
    assert rewards == [1.0, 1.0, 0.0, 0.0]
    as_messages = [[{"role": "assistant", "content": text}] for text in completions]
    assert math_reward(["p"] * 4, as_messages, solution=[solution] * 4) == rewards
    assert math_reward(["p"] * 3, [r"$\boxed{14}$"] * 3, solution=[14, 14.0, None]) == [1.0, 1.0, None]


def test_math_says_which_package_is_missing(monkeypatch):
    monkeypatch.setattr(verifiers, "is_math_verify_available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'trl-larpo\[eval\]'"):
        math_reward(["p"], ["c"], solution=["1"])


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{3}", "3"),
        (r"\boxed{1} or \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        ("no box", None),
        (r"\boxed{never closed", None),
    ],
)
def test_boxed_answers(text, answer):
    assert boxed_answer(text) == answer


def test_rewards_are_found_by_name(tmp_path, monkeypatch):
    # A name of its own: other tests import modules named my_rewards
    (tmp_path / "by_name.py").write_text("def good(prompts, completions, **columns): return [1.0] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    [mine, built_in] = load_rewards(["by_name:good", "gsm8k"], [0.5, 2.0])
    assert mine.function(["p"], ["c"]) == [1.0] and mine.weight == 0.5
    assert built_in.function is gsm8k_reward
    assert load_rewards(["pairwise:by_name:good"])[0].pairwise


@pytest.mark.parametrize(
    "names, weights, message",
    [
        ([], None, "`reward_funcs` is empty"),
        (["gsm8k"], [1.0, 2.0], "`reward_weights` has 2 numbers for 1 rewards"),
        (["no_such_module_here:f"], None, "cannot be imported: ModuleNotFoundError"),
        (["this_one_exits:f"], None, "cannot be imported: SystemExit: 0"),
        (["math:no_such_function"], None, "has no function 'no_such_function'"),
        (["math:pi"], None, "has no function 'pi'"),
        (
            ["gsm9k"],
            None,
            "'gsm9k', which is neither one of verifiable_instruction, verifiable_instructions, gsm8k, math nor",
        ),
        (["./none"], None, "names the folder './none', and there is no such folder"),
        (["pairwise:gsm8k"], None, "'gsm8k', which is neither"),
        (["pairwise:./none"], None, "names the folder './none', and there is no such folder"),
    ],
)
def test_rewards_that_cannot_be_found_are_named(names, weights, message, tmp_path, monkeypatch):
    (tmp_path / "this_one_exits.py").write_text("import sys; sys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_rewards(names, weights)


def test_reward_id_changes_with_every_setting():
    ids = {
        reward_id(["a"], None),
        reward_id(["b"], None),
        reward_id(["a"], [2.0]),
        reward_id(["a"], None, max_length=5),
    }
    assert len(ids) == 4 and reward_id(["a"], None) == reward_id(["a"], [1.0])


def test_rankers_as_functions_of_trl():
    def ranker(prompt, completions):
        calls.append((prompt, completions))
        return [[float(len(a) > len(b)) for b in completions] for a in completions]

    calls = []
    function = as_function(Reward("pairwise:mine:ranker", ranker, pairwise=True))
    prompts = [[{"role": "user", "content": text}] for text in "aab"]
    assert function(prompts=prompts, completions=["x", "xyz", "xy"], trainer_state=None) == [0.0, 1.0, None]
    assert [completions for _, completions in calls] == [["x", "xyz"], ["xy"]]
    assert function.__name__ == "pairwise:mine:ranker"
