"""Memory does not grow with the number of prompts, and neither does the page."""

import json
import shutil
import tracemalloc

import pytest
import yaml
from transformers import AutoTokenizer

from trl_larpo import DataError, cli
from trl_larpo.candidates import Candidate, CandidatePool, Selection, build_list
from trl_larpo.generation import server_sampling
from trl_larpo.generation.options import GenerationOptions
from trl_larpo.generation.sampler import PolicySampler
from trl_larpo.generation.sampling_task import SampleKind, SamplingTask
from trl_larpo.prompts import Prompt
from trl_larpo.report import statistics as report_statistics
from trl_larpo.report.page import write_report
from trl_larpo.report.statistics import statistics_of
from trl_larpo.storage import read_jsonl, write_json, write_jsonl

NUM_PROMPTS, NUM_SAMPLES = 300, 4

EVALUATION = {
    "prompts": 8, "samples": 16, "unrewarded": 0, "tokens": 9.0, "finished": 1.0, "best_of_n": [1.0, 1.5],
    "reward": {"mean": 1.0, "standard_error": 0.1}, "gain": {"mean": 0.0, "standard_error": 0.1},
    "kl_from_initial": None,
}  # fmt: skip


def pool(number, length):
    """Samples whose rewards are 0, 1, 2, 3, and a negative."""
    texts = [f"{number} {place} ".ljust(length, "x") for place in range(NUM_SAMPLES)]
    made = [Candidate(text, float(place), num_tokens=7, scored_by="j") for place, text in enumerate(texts)]
    return CandidatePool(
        Prompt.of(f"prompt {number}"), [*made, Candidate("other", 9.0, source="random_prompt", scored_by="j")]
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run whose first iteration has made lists."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    for number in (0, 1):
        (folder / f"iteration_{number}").mkdir(parents=True)
        write_json(folder / f"iteration_{number}/evaluation.json", EVALUATION)
    settings = {"model_name_or_path": "m", "loss_type": ["lambdarank"], "num_samples": 4, "memory": "none"}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings | {"num_iterations": 1}))
    pools = [pool(number, 10_000) for number in range(NUM_PROMPTS)]
    write_jsonl(folder / "iteration_1/rewarded.jsonl", (each.to_row() for each in pools))
    write_jsonl(folder / "iteration_1/lists.jsonl", (build_list(each, Selection(1, 1)).to_row() for each in pools))
    return folder


def peak_of(function, *arguments):
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_tokens_of_all_prompts_take_little_memory(tmp_path, tiny_model, monkeypatch):
    pytest.importorskip("openai")
    num_tokens, most = [], []

    def sample(self, requests, on_samples, on_failure, **about_failures):
        num_tokens.append(sum(len(request.prompt_ids) for request in requests))
        most.append(tracemalloc.get_traced_memory()[0])

    monkeypatch.setattr(server_sampling.Sampler, "sample", sample)
    options = GenerationOptions(server_urls=["http://127.0.0.1:1/v1"])
    prompts = [Prompt.of(f"{i} " + "why " * 2000) for i in range(100)]
    task = SamplingTask([SampleKind("policy", 1.0)] * 4, tiny_model, 1, key="1")

    def run(prompts, name):
        PolicySampler(options, seed=0, log_folder=tmp_path).sample(prompts, task, tmp_path / name)

    run(prompts[:1], "first")  # imports
    peak_of(run, prompts, "samples")
    assert num_tokens[1] > 200_000 and most[1] < 6 * num_tokens[1]


def test_servers_do_not_wait_until_all_prompts_are_tokenised(tmp_path, tiny_model, monkeypatch):
    pytest.importorskip("openai")
    tokenised, asked, encode = [], [], server_sampling.encode_prompt

    def counted(tokenizer, prompt, kwargs):
        tokenised.append(prompt)
        return encode(tokenizer, prompt, kwargs)

    def sample(self, requests, on_samples, on_failure, **about_failures):
        asked.append(len(tokenised))
        for request in [*requests, requests[0].for_one_sample(), requests[0]]:
            assert request.prompt_ids == encode(AutoTokenizer.from_pretrained(tiny_model), request.prompt)

    monkeypatch.setattr(server_sampling, "encode_prompt", counted)
    monkeypatch.setattr(server_sampling.Sampler, "sample", sample)
    sampler = PolicySampler(GenerationOptions(server_urls=["http://127.0.0.1:1/v1"]), seed=0, log_folder=tmp_path)
    prompts = [Prompt.of([{"role": "user", "content": f"why {i}"}]) for i in range(4)]
    task = SamplingTask([SampleKind("policy", 1.0)], tiny_model, 1, key="1")
    sampler.sample(prompts, task, tmp_path / "samples.jsonl")
    assert asked == [0] and tokenised == [prompt.content for prompt in prompts]
    # What the chat template refuses is refused before servers are asked, or started
    template = "{{ raise_exception('no system') if messages[0]['role'] == 'system' else 'x' }}"
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    bad = Prompt.of([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}])
    with pytest.raises(DataError, match="The chat template refuses the prompt 'hi'"):
        sampler.sample([*prompts, bad], SamplingTask(task.kinds, str(model), 1, key="1"), tmp_path / "again.jsonl")
    assert asked == [0]


def test_lists_are_made_one_at_a_time(run, capsys):
    rewarded = run / "iteration_1/rewarded.jsonl"
    cli.main(["select", "--candidates", str(rewarded), "--output", "first.jsonl"])  # imports
    peak = peak_of(cli.main, ["select", "--candidates", str(rewarded), "--output", "lists.jsonl"])
    assert rewarded.stat().st_size > 12_000_000 > 2 * peak
    assert len(read_jsonl("lists.jsonl")) == NUM_PROMPTS


def test_statistics_are_of_all_and_kept_until_a_file_changes(run, monkeypatch):
    folder = run / "iteration_1"
    peak = peak_of(statistics_of, folder, 1)
    assert peak < 6_000_000
    found = statistics_of(folder, 1)
    assert (found["tokens"], found["num_lists"]) == (7.0, NUM_PROMPTS)
    assert found["sources"] == {"random prompt": NUM_PROMPTS, "iteration 1": NUM_PROMPTS}
    assert found["sizes"] == [[2, NUM_PROMPTS]]
    histogram = found["rewards"]  # of the policy's samples alone
    assert (histogram["low"], histogram["high"], sum(histogram["counts"])) == (0.0, 3.0, 4 * NUM_PROMPTS)
    assert [i for i, count in enumerate(histogram["counts"]) if count] == pytest.approx([0, 333, 666, 999], abs=1)
    with monkeypatch.context() as patched:
        patched.setattr(report_statistics, "iter_jsonl", None)  # nothing is read again
        assert statistics_of(folder, 1) == found
    write_jsonl(folder / "lists.jsonl", [build_list(pool(0, 10), Selection(1, 1)).to_row()])
    assert statistics_of(folder, 1)["num_lists"] == 1


@pytest.mark.slow
def test_the_page_shows_some_of_many_lists_and_any_is_found(run, monkeypatch, capsys):
    monkeypatch.setattr(report_statistics, "MAX_LISTS", 20)
    page = write_report(run, with_plots=False).read_text()
    assert f"20 of {NUM_PROMPTS} prompts are shown, evenly spread over the run" in page
    name = json.loads((run / "iteration_1/lists.jsonl").read_text().splitlines()[7])["prompt_id"]
    assert cli.main(["report", "run", "--prompt", name[:10]]) == 0
    shown = capsys.readouterr().out
    assert f"Iteration 1, prompt {name}" in shown and "prompt 7\n" in shown
    assert "--- reward 9, rank 1, random prompt, iteration 1, selected\nother" in shown
    assert "--- reward 3, rank 2, policy, iteration 1, not selected\n7 3 xx" in shown
    assert cli.main(["report", "run", "--prompt", "nothing"]) == 2
    assert "has no list of a prompt 'nothing'" in capsys.readouterr().err
    with pytest.raises(DataError, match="is no folder of a run"):
        write_report(run / "iteration_1")
