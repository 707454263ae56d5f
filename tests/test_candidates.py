"""Candidate lists: ranked, distinct, finished, and nothing left out without being counted."""

from trl_larpo.candidates import build_candidate_lists

USER = [{"role": "user", "content": "p"}]


def test_completions_are_ranked_and_keep_their_rewards():
    lists = build_candidate_lists(["p"], [["low", "high", "mid"]], [[0.0, 2.0, 1.0]])
    assert lists.rows == [{"prompt": "p", "completions": ["high", "mid", "low"], "rewards": [2.0, 1.0, 0.0]}]


def test_conversations_stay_conversations():
    lists = build_candidate_lists([USER], [["a", "b"]], [[1.0, 0.0]])
    assert lists.rows[0]["prompt"] == USER
    assert lists.rows[0]["completions"][0] == [{"role": "assistant", "content": "a"}]


def test_everything_left_out_is_counted():
    lists = build_candidate_lists(
        ["kept", "tied", "one", "none"],
        [["a", "a", "b", " ", "cut"], ["a", "b"], ["a", "a"], []],
        [[1.0, 0.0, 0.5, 1.0, 9.0], [1.0, 1.0], [1.0, 0.0], []],
        finished=[[True, True, True, True, False], [True, True], [True, True], []],
    )
    assert lists.rows == [{"prompt": "kept", "completions": ["a", "b"], "rewards": [1.0, 0.5]}]
    assert (lists.num_duplicates, lists.num_empty, lists.num_unfinished) == (2, 1, 1)
    assert (lists.num_tied, lists.num_too_small) == (1, 2)
    assert lists.summary() == (
        "1 lists of 2 completions; left out: 1 prompts with all rewards equal, 2 with fewer than 2 distinct "
        "completions; 1 cut off, 2 duplicate and 1 empty completions."
    )
