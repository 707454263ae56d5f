"""What logs, health checks and the page say of samples is counted on the way, as a count of the files gives it."""

import logging

import pytest

from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.pools import StoredPools, read_pools
from trl_larpo.prompts import Prompt
from trl_larpo.report import statistics
from trl_larpo.report.statistics import SampleCounts, SampleStatistics, sample_statistics, statistics_of
from trl_larpo.rewards import early
from trl_larpo.rewards.options import RewardOptions
from trl_larpo.rewards.scorer import RewardScorer, pool_digest, saved_scores
from trl_larpo.run import loop
from trl_larpo.run.candidate_stages import generate
from trl_larpo.run.context import RunContext
from trl_larpo.run.folder import RunFolder
from trl_larpo.run.options import RunConfig, RunModelConfig, RunTrainingConfig
from trl_larpo.storage import GrowingFile, partial_files, read_json, write_json, write_jsonl


def sampled(prompt, number, iteration=1):
    """Three samples of which two are equal and one is cut off, and a negative, which says nothing of the policy."""
    ids = [3, 4, number] if number % 2 else None
    candidates = [
        Candidate(f"a {number}", iteration=iteration, num_tokens=number, token_ids=ids),
        Candidate(f"a {number}", iteration=iteration, num_tokens=number),
        Candidate(f"b {number}", iteration=iteration, num_tokens=40, finished=False, token_ids=[1, 2]),
        Candidate("c", iteration=iteration, source="high_temperature", num_tokens=1, token_ids=[9]),
    ]
    return CandidatePool(prompt, candidates)


@pytest.fixture
def run(tmp_path):
    """A run whose prompts are sampled, in a file that is not whole yet."""
    options = RunConfig(
        num_iterations=2, num_samples=3, negatives=["high_temperature", "related_prompt"], num_negatives=1,
        reward_funcs=["gsm8k"], reward_while_sampling=False,
    )  # fmt: skip
    training = RunTrainingConfig(str(tmp_path / "run"), report_to="none", use_cpu=True, bf16=False)
    folder = RunFolder(options, training, RunModelConfig(model_name_or_path="ORG/MODEL"))
    folder.prompts = [Prompt.of(f"why is it {number}") for number in range(6)]
    for iteration in (1, 2):
        pools = [sampled(prompt, number, iteration) for number, prompt in enumerate(folder.prompts)]
        GrowingFile(folder.iteration(iteration) / "samples.jsonl").add([pool.to_row() for pool in pools])
    return RunContext(folder)


@pytest.fixture
def reads(monkeypatch):
    """Rows of samples that were parsed."""
    found, from_row = [], CandidatePool.from_row

    def counting(row):
        found.append(row["prompt_id"])
        return from_row(row)

    monkeypatch.setattr(CandidatePool, "from_row", counting)
    return found


def path_of(run, iteration=1):
    return run.folder.iteration(iteration) / "samples.jsonl"


def test_the_end_of_the_sampling_reads_each_prompt_once(run, reads, caplog):
    run.options.negatives = ["high_temperature"]  # responses to other prompts are read with their own prompt
    with caplog.at_level(logging.INFO, logger="trl_larpo"):
        generate(run, 1, path_of(run))
    assert sorted(reads) == sorted(prompt.id for prompt in run.folder.prompts)
    kept = [text for text in caplog.messages if "would be tokenised in another way" in text]
    assert [text.split(" completions")[0] for text in kept] == [f"{3 + 6} of {3 * 6}"]
    assert not partial_files(path_of(run))


def test_responses_to_other_prompts_are_counted_once(run, caplog):
    with caplog.at_level(logging.INFO, logger="trl_larpo"):
        generate(run, 1, path_of(run))
    assert len(read_pools(path_of(run))[0].candidates) == 5
    assert any(text.startswith(f"{3 + 6} of {3 * 6} completions that ended") for text in caplog.messages)


def count_again(run, iteration):
    counts = SampleCounts()
    assert len(list(counts.counted(read_pools(path_of(run, iteration))))) == 6
    return counts.statistics()


def health(run, iteration):
    folder = run.folder
    path = folder.iteration(iteration)
    counts = {"lists": 1, "prompts_too_few": 0, "prompts_tied": 0, "prompts_small_gap": 0}
    evaluation = {
        "prompts": 64, "tokens": 40.0, "finished": 0.95, "change": {"mean": 0.1, "standard_error": 0.02},
        "kl_from_initial": {"mean": 1.0},
    }  # fmt: skip
    write_json(path / "selection.json", counts)
    write_jsonl(path / "training_log.jsonl", [])
    for number in (0, iteration):
        folder.iteration(number).mkdir(exist_ok=True)
        write_json(folder.iteration(number) / "evaluation.json", evaluation)
    loop._check_health(folder, iteration, True)
    return read_json(path / "health.json")


def test_health_checks_read_no_samples(run, reads):
    for iteration in (1, 2):
        generate(run, iteration, path_of(run, iteration))
        statistics_of(run.folder.iteration(iteration), iteration)  # of the page, in the same file
    reads.clear()
    found = [health(run, iteration) for iteration in (1, 2)]
    assert not reads
    for iteration in (1, 2):
        expected = SampleStatistics((2 * sum(range(6)) + 6 * 40) / 18, 2 / 3, 1 / 3)
        assert vars(count_again(run, iteration)) == pytest.approx(vars(expected))
        assert sample_statistics(run.folder.iteration(iteration)) == count_again(run, iteration)
        # As of a folder that an older version made
        (run.folder.iteration(iteration) / "statistics.json").unlink()
        reads.clear()
        assert health(run, iteration) == found[iteration - 1]
        assert len(reads) == 6
        reads.clear()
        assert health(run, iteration) == found[iteration - 1]
        assert not reads, "once counted, it is kept"


def test_samples_that_change_are_counted_again(run):
    generate(run, 1, path_of(run))
    before, folder = sample_statistics(run.folder.iteration(1)), run.folder.iteration(1)
    page = {name: value for name, value in statistics_of(folder, 1).items() if name not in ("made_of", "sampled")}
    write_jsonl(path_of(run), (pool.to_row() for pool in list(read_pools(path_of(run)))[:3]))
    assert sample_statistics(folder) == SampleStatistics((2 * 3 + 3 * 40) / 9, 2 / 3, 1 - 2 / 3) != before
    assert statistics_of(folder, 1)["tokens"] != page["tokens"]
    (folder / "statistics.json").write_text("{ damaged")
    assert sample_statistics(folder).tokens == 14.0
    assert statistics_of(folder, 1) == statistics_of(folder, 1) and "sampled" in read_json(folder / "statistics.json")


def test_a_file_without_samples_of_the_policy_has_no_statistics(tmp_path):
    (tmp_path / "samples.jsonl").write_text("")
    statistics.keep_sample_statistics(tmp_path, SampleCounts())
    assert not (tmp_path / "statistics.json").exists()


def test_early_rewards_are_looked_up_once(tmp_path, monkeypatch):
    prompts = [Prompt.of(f"why {number}") for number in range(4)]
    pools = [CandidatePool(prompt, [Candidate(f"{n}") for n in range(3)]) for prompt in prompts]
    scorer = RewardScorer(RewardOptions(reward_funcs=["gsm8k"]), use_cpu=True)
    output = tmp_path / "rewarded.jsonl"
    scored = [pool.with_candidates([Candidate(f"{n}", float(n)) for n in range(3)]) for pool in pools[:3]]
    GrowingFile(early._path(output)).add(
        [saved_scores(new, pool_digest(pool)) for new, pool in zip(scored, pools, strict=False)]
    )
    digests = []
    monkeypatch.setattr(early, "pool_digest", lambda pool: digests.append(pool) or pool_digest(pool))
    stored = StoredPools([prompt.id for prompt in prompts], pools.__getitem__)
    found = early.with_early_rewards(stored, output, scorer)
    passes = [[[candidate.reward for candidate in pool.candidates] for pool in found] for _ in range(3)]
    assert passes == 3 * [3 * [[0.0, 1.0, 2.0]] + [3 * [None]]]
    assert len(digests) == 4
