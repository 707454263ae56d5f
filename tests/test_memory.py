"""Memory: Algorithm 1's merge of rows, the union of all so far, against an enumeration by hand."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from small_run import larpo_run, log_probability, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.prompts import Prompt
from trl_larpo.run import candidate_stages
from trl_larpo.run.candidate_files import read_candidate_pools
from trl_larpo.run.memory import earlier_rows, joined_prompts
from trl_larpo.storage import write_jsonl


def pool(name, *iterations):
    candidates = [Candidate(f"{name}{i}", float(i), iteration=i, scored_by="these") for i in iterations]
    return CandidatePool(Prompt.of(name), candidates)


def described(pools):
    return [(pool.prompt.content, [(c.completion, c.reward) for c in pool.candidates]) for pool in pools]


def test_rows_whose_prompts_do_not_come_again_stay_as_they_were():
    """Prompts a, b; then b, c; now c, d. Iteration 2 trained on b with both samples, on c, and again on a."""
    first, second = [pool("a", 1), pool("b", 1)], [pool("b", 2, 1), pool("c", 2), pool("a", 1)]
    now = [pool("c", 3, 2), pool("d", 3)]
    every = earlier_rows(now, [(second, 2), (first, 1)], "all", is_relative=False)
    assert described(every) == [("b", [("b2", 2.0), ("b1", 1.0)]), ("a", [("a1", 1.0)])]
    previous = earlier_rows(now, [(second, 2)], "previous", is_relative=False)
    assert described(previous) == [("b", [("b2", 2.0)])]
    assert list(earlier_rows(now, [], "none", is_relative=False)) == []


def test_what_was_measured_against_candidates_left_behind_is_scored_again():
    second = [pool("b", 2, 1), pool("c", 2)]
    [shortened, whole] = earlier_rows([pool("d", 3)], [(second, 2)], "previous", is_relative=True)
    assert [(c.completion, c.reward, c.scored_by) for c in shortened.candidates] == [("b2", None, None)]
    assert whole == second[1]
    assert list(earlier_rows([pool("d", 3)], [(second, 2)], "all", is_relative=True)) == second


@pytest.fixture
def context(tmp_path):
    """Of a run with the prompts a and b, whose candidates all have rewards."""
    PartialState()  # its logger asks for it
    scorer = SimpleNamespace(id="these", is_relative=False, score=lambda pools, path, description: pools)
    options = SimpleNamespace(memory="previous", earlier_candidates=[str(tmp_path / "old.jsonl")])
    folder = SimpleNamespace(
        iteration=lambda number: tmp_path / f"iteration_{number}",
        prompts_of=lambda number: [pool(name).prompt for name in "ab"],
    )
    for number in (1, 2):
        (tmp_path / f"iteration_{number}").mkdir()
        new = Candidate(f"new {number}", 0.5, iteration=number, scored_by="these")
        samples = [pool(name).with_candidates([new]) for name in "ab"]
        write_jsonl(tmp_path / f"iteration_{number}/samples.jsonl", map(CandidatePool.to_row, samples))
    return SimpleNamespace(scorer=scorer, options=options, folder=folder)


def rewarded(context, iteration):
    path = context.folder.iteration(iteration) / "rewarded.jsonl"
    candidate_stages.reward(context, iteration, path)
    return rows_of(path)


def test_candidates_of_another_run_are_of_no_iteration_of_this_one(context):
    write_jsonl(Path(context.options.earlier_candidates[0]), [pool("a", 1, 3).to_row()])
    origins = [(about["source"], about["iteration"]) for about in rewarded(context, 1)[0]["candidates"]]
    assert origins == [("policy", 1), ("policy", 0), ("policy", 0)]
    assert [row["completions"] for row in rewarded(context, 2)] == [["new 2", "new 1"]] * 2


def test_how_many_earlier_prompts_have_joined_is_logged(context, caplog):
    path = context.options.earlier_candidates[0]
    caplog.set_level("INFO", logger="trl_larpo")
    write_jsonl(Path(path), [pool(name, 1).to_row() for name in "acd"])
    rewarded(context, 1)
    [record] = caplog.records
    count = f"`earlier_candidates`: 1 of the 3 prompts in {path!r} are prompts of this iteration."
    assert record.levelname == "INFO" and record.message.endswith(f"Iteration 1: {count}")
    caplog.clear()
    write_jsonl(Path(path), [pool("A", 1).to_row()])
    rewarded(context, 1)
    [warning] = caplog.records
    assert warning.levelname == "WARNING" and "0 of the 1 prompts" in warning.message
    assert "Prompts must be equal character by character, after `prompt_template`" in warning.message


def test_earlier_prompts_are_the_same_with_keys_that_a_reader_fills_in(tmp_path):
    messages = [{"role": "user", "content": "why"}]
    filled = [{"role": "user", "content": "why", "tool_calls": None}]
    write_jsonl(tmp_path / "old.jsonl", [{"prompt": filled, "completions": ["so"]}])
    [found] = read_candidate_pools(str(tmp_path / "old.jsonl"))
    assert found.prompt == Prompt.of(messages)
    assert found.candidates[0].completion == [{"role": "assistant", "content": "so"}]
    conversation = Prompt.of([{"role": "system", "content": "be brief"}, *messages])
    assert joined_prompts([conversation], [found]) == {found.prompt.id}


DRAWN = (
    "--prompt_schedule", "drawn", "--prompts_per_iteration", 3, "--num_held_out", 4, "--memory", "all",
    "--num_iterations", 3, "--num_samples", 2, "--num_best", 1, "--num_worst", 1, "--num_eval_samples", 1,
    "--monitor_evals", 0, "--truncated_completions", "by_reward", "--save_strategy", "no",
)  # fmt: skip


@pytest.mark.slow
def test_the_union_of_rows_is_the_one_of_algorithm_1(project, talkative_model, capsys):
    """
    Three prompts drawn from six in each of three iterations, two samples of each, all earlier rows kept: rows, lists,
    references and order of each iteration, enumerated from the samples alone. `pytest -rP` prints them.
    """
    assert larpo_run(*DRAWN) == 0
    plan = capsys.readouterr().out
    completions, order, seen = {}, [], {}
    for iteration in (1, 2, 3):
        folder = project / f"out/iteration_{iteration}"
        samples = rows_of(folder / "samples.jsonl")
        drawn = [row["prompt_id"] for row in samples]
        order = drawn + [name for name in order if name not in drawn]
        for row in samples:
            completions[row["prompt_id"]] = row["completions"] + completions.get(row["prompt_id"], [])

        rows = rows_of(folder / "rewarded.jsonl")
        assert [row["prompt_id"] for row in rows] == order
        expected_lists = []
        for row in rows:
            assert row["completions"] == completions[row["prompt_id"]]
            texts = [completion[-1]["content"] for completion in row["completions"]]
            vowels = [sum(letter in "aeiou" for letter in text) / 10 for text in texts]
            assert row["rewards"] == vowels
            usable = [reward for text, reward in zip(texts, vowels, strict=True) if text.strip()]
            if len(set(usable)) > 1:
                expected_lists.append((row["prompt_id"], max(usable), min(usable)))

        lists = [row for row in rows_of(folder / "lists.jsonl") if row["problem"] is None]
        assert [(row["prompt_id"], row["rewards"][0], row["rewards"][-1]) for row in lists] == expected_lists

        path = rows_of(folder / "ref_logps.jsonl")
        references = {row["prompt_id"]: row["ref_logps"] for row in path}
        assert [row["prompt_id"] for row in path] == [row["prompt_id"] for row in lists]
        reference = talkative_model if iteration == 1 else project / f"out/iteration_{iteration - 1}/model"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(reference), AutoTokenizer.from_pretrained(reference)
        print(f"\niteration {iteration}: drawn {drawn}; reference {reference}")
        for row in lists:
            by_hand = [
                log_probability(model, tokenizer, row["prompt"], completion, cut)
                for completion, cut in zip(row["completions"], row["completion_ids"], strict=True)
            ]
            assert references[row["prompt_id"]] == pytest.approx(by_hand, abs=1e-3)
            for about, completion, reward, logp in zip(
                row["candidates"], row["completions"], row["rewards"], by_hand, strict=True
            ):
                key = row["prompt_id"], completion[-1]["content"]
                seen.setdefault(key, []).append(logp)
                print(f"  {row['prompt_id']} of iteration {about['iteration']} reward {reward:.1f} ref {logp:.3f}")
    again = [logps for logps in seen.values() if len(logps) > 1]
    assert again and all(not math.isclose(a, b) for a, b, *_ in again), "computed again for each reference"
    returned = sum(len(of_prompt) > 2 for of_prompt in completions.values())
    assert returned and len(order) > 3, "some prompts came again, and others did not"
    assert f"up to {len(order)} lists of up to 2" in plan.split("iteration 3: ")[1].split("\n")[0]
