"""Prompts of a run: which iteration gets which, the system turn, and those that negatives respond to."""

import json
from datetime import datetime
from types import SimpleNamespace

import pytest
import tiny
from datasets import Dataset
from transformers import LlamaConfig

from trl_larpo import ConfigError, DataError
from trl_larpo.candidates import Candidate, CandidatePool, build_lists
from trl_larpo.commands import prompts_of
from trl_larpo.prompts import Prompt, prompt_problem
from trl_larpo.run import disk
from trl_larpo.run.candidate_files import read_candidate_pools
from trl_larpo.run.folder import RunFolder
from trl_larpo.run.loading import model_init_kwargs
from trl_larpo.run.negatives import unrelated_prompts
from trl_larpo.run.options import RunConfig, RunModelConfig, RunTrainingConfig
from trl_larpo.run.prompts import choose_prompts, load_prompts, load_random_prompts
from trl_larpo.storage import write_jsonl


@pytest.fixture
def file(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"why {number}"}]} for number in range(40)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def choose(file, seed=0, **options):
    options = RunConfig(prompts=[file], num_held_out=4, reward_funcs=["gsm8k"], num_iterations=3, **options)
    options.check()
    return choose_prompts(options, tiny.tiny_tokenizer(), seed, 128)


def test_each_iteration_draws_from_all_prompts(file):
    chosen = choose(file, prompt_schedule="drawn", memory="all")
    assert chosen.counts["slices"] == [12, 12, 12]
    drawn = [{prompt.id for prompt in chosen.prompts[start : start + 12]} for start in (0, 12, 24)]
    assert all(len(ids) == 12 for ids in drawn)
    assert drawn[0] & drawn[1] and drawn[0] - drawn[1], "some prompts come again, and others do not"
    assert not {prompt.id for prompt in chosen.held_out} & set.union(*drawn)
    assert chosen.counts["unused"] == 36 - len(set.union(*drawn))
    assert choose(file, prompt_schedule="drawn").prompts == chosen.prompts
    assert choose(file, seed=1, prompt_schedule="drawn").prompts != chosen.prompts
    fewer = choose(file, prompt_schedule="drawn", prompts_per_iteration=5)
    assert [p.id for p in fewer.prompts[:5]] == [p.id for p in chosen.prompts[:5]]
    with pytest.raises(ConfigError, match="There are 36 prompts beside the 4 held out, too few for 37"):
        choose(file, prompt_schedule="drawn", prompts_per_iteration=37)


@pytest.mark.parametrize("text", ["", "Be brief."])
def test_a_system_turn_may_be_empty_which_is_not_none(file, tmp_path, text):
    [prompt, *_] = load_prompts(file, RunConfig(system_prompt=text))
    assert prompt.content == [{"role": "system", "content": text}, {"role": "user", "content": "why 0"}]
    assert load_prompts(file, RunConfig())[0].content == prompt.content[1:]
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}))
    assert load_prompts(str(own), RunConfig(system_prompt=text))[0].content[0]["content"] == "x"
    own.write_text(json.dumps({"prompt": "bare"}))
    with pytest.raises(ConfigError, match="`system_prompt` is for conversations, and the prompts are texts"):
        load_prompts(str(own), RunConfig(system_prompt=text))
    chosen = choose_prompts(
        RunConfig(prompts=[file], num_held_out=4, system_prompt=text), tiny.tiny_tokenizer(), 0, None
    )
    assert {p.content[0]["role"] for p in chosen.prompts + chosen.held_out} == {"system"}


def test_of_rows_with_the_same_prompt_the_first_counts(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": text, "completions": ["x"], "answer": answer} for text, answer in ("p1", "q1", "p2", "p1")]
    write_jsonl(path, rows)
    options = RunConfig(prompts=[str(path)], num_held_out=1)
    chosen = choose_prompts(options, tiny.tiny_tokenizer(), 0, None)
    of_run = [*chosen.prompts, *chosen.held_out]
    assert caplog.text.count("1 rows have the prompt of an earlier row with other columns") == 1
    caplog.clear()
    for prompts in (of_run, prompts_of(options), [pool.prompt for pool in read_candidate_pools(str(path))]):
        assert {prompt.content: prompt.columns["answer"] for prompt in prompts} == {"p": "1", "q": "1"}
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "1 rows have the prompt of an earlier row with other columns",
        f"{str(path)!r}: 1 of 4 rows have the prompt of an earlier row",
    ]


def test_a_template_of_texts_is_refused_for_conversations(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"prompt": [{"role": "user", "content": "x"}]}))
    with pytest.raises(ConfigError, match=r"`prompt_template` is for texts, and .* row 1 is a conversation. Leave it"):
        load_prompts(str(path), RunConfig(prompt_template="Q: {prompt}"))
    mixed = load_prompts(str(path), RunConfig(prompt_template="Q: {prompt}", prompts_as_messages=True))
    assert [prompt.content[0]["content"] for prompt in mixed] == ["Q: x", "x"]


def test_prompts_that_end_with_an_answer_are_told(tmp_path, caplog):
    question, answer = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    path = tmp_path / "a.jsonl"
    for rows, number in (([[question], [question, answer, question]], 0), ([[question]] + 2 * [[question, answer]], 2)):
        path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
        prompts = load_prompts(str(path), RunConfig(prompt_column="messages"))
        assert [prompt.content for prompt in prompts] == rows and len(caplog.records) == (number > 0)
    assert "a.jsonl': 2 of 3 prompts end with a message of the assistant (first: row 1)" in caplog.text


COLUMNS = {
    "dates": ["2024-01-01T00:00:00", "2024-01-02", None],  # datasets makes times of them
    "large integers": [2**70, -1, 2**53 + 1],  # and floats of these, with fewer digits
    "integers and floats": [2**53 + 1, 1.5, 1],
    "types": [1, "a", [2, None]],
    "keys": [{"a": 1}, {"b": {"c": "2024-01-01"}}, {}],
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("form", ["a.jsonl", "a.json", "array.jsonl", "array.json"])
def test_rewards_get_columns_as_they_are_in_the_file(tmp_path, name, form):
    rows = [{"prompt": f"{number}", "x": value} for number, value in enumerate(COLUMNS[name])]
    rows.append({"prompt": "2024-01-01"})  # which lacks the column
    path = tmp_path / form
    path.write_text(json.dumps(rows) if "array" in form else "\n".join(map(json.dumps, rows)))
    prompts = load_prompts(str(path), RunConfig())
    assert [prompt.content for prompt in prompts] == [row["prompt"] for row in rows]
    found = [prompt.columns["x"] for prompt in prompts]
    assert found == [*COLUMNS[name], None] and list(map(type, found[:-1])) == list(map(type, COLUMNS[name]))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{"prompt": "b"\n', "cannot be read: "),  # in words of datasets
        ('{"question": "a"}\n{"answer": "b"}\n', "Its columns: question, answer"),
        ('{"prompt": "a"}\n{"question": "b"}\n', "row 1, column `prompt`: is None"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        load_prompts(str(tmp_path / "a.jsonl"), RunConfig())


def test_times_in_a_table_are_refused(tmp_path):
    path = str(tmp_path / "a.parquet")
    Dataset.from_list([{"prompt": "a", "x": datetime(2024, 1, 1)}]).to_parquet(path)
    with pytest.raises(DataError, match=r"row 0, column `x`: holds datetime; .* Write it as text, or remove the col"):
        load_prompts(path, RunConfig())


@pytest.mark.parametrize("prompt", ["half \ud83d", [{"role": "user", "content": "half \ud83d"}]], ids=["text", "chat"])
def test_a_prompt_with_half_a_character_is_named(prompt):
    assert "has half of a surrogate pair" in prompt_problem(prompt)


def test_texts_beside_conversations_are_refused(file, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"prompt": f"what {number}"}) + "\n" for number in range(40)))
    options = RunConfig(num_held_out=4, reward_funcs=["gsm8k"], prompts=[file, str(texts)])
    with pytest.raises(
        DataError, match=r"'.*texts.jsonl' are texts, and .*prompts.jsonl' are conversations.* Set `prom"
    ):
        choose_prompts(options, tiny.tiny_tokenizer(), 0, 128)
    options.prompts_as_messages = True
    assert len(choose_prompts(options, tiny.tiny_tokenizer(), 0, 128).held_out) == 4
    options = RunConfig(num_held_out=4, reward_funcs=["gsm8k"], prompts=[file], held_out_prompts=str(texts))
    assert isinstance(choose_prompts(options, tiny.tiny_tokenizer(), 0, 128).held_out[0].content, str)


def test_unrelated_prompts_are_drawn_by_the_prompt_alone():
    prompts, others = [Prompt.of(f"p{i}") for i in range(30)], [Prompt.of(f"o{i}") for i in range(5)]
    drawn = unrelated_prompts(prompts, others, seed=0, iteration=1)
    assert drawn.keys() == {prompt.id for prompt in prompts} and {p.id for p in drawn.values()} == {
        p.id for p in others
    }
    assert unrelated_prompts(prompts[7:9], others, 0, 1) == {prompt.id: drawn[prompt.id] for prompt in prompts[7:9]}
    assert unrelated_prompts(prompts, others, 0, 2) != drawn != unrelated_prompts(prompts, others, 1, 1)


def test_unrelated_prompts_are_no_longer_than_others(tmp_path):
    path = tmp_path / "others.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in ("why", "why is the cat blue")))
    options = RunConfig(random_prompts=str(path), random_prompts_column="question", max_prompt_length=3)
    assert [prompt.text for prompt in load_random_prompts(options, tiny.tiny_tokenizer())] == ["why"]
    options.max_prompt_length = 0
    with pytest.raises(ConfigError, match=r"all 2 prompts in .* have more than 0 tokens: raise `max_prompt_length`"):
        load_random_prompts(options, tiny.tiny_tokenizer())
    options.max_prompt_length = None
    assert len(load_random_prompts(options, tiny.tiny_tokenizer())) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"random_prompts": "other.jsonl"}, "add it to `negatives`"),
        ({"random_prompts_column": "question"}, "`random_prompts`, which is missing"),
    ],
)
def test_options_of_unrelated_prompts_that_have_no_effect(file, options, message):
    with pytest.raises(ConfigError, match=message):
        choose(file, **options)


@pytest.mark.parametrize("use_peft, dtype", [(False, "float32"), (True, "auto")])
def test_an_adapters_base_keeps_the_type_of_its_checkpoint(tmp_path, use_peft, dtype):
    training = RunTrainingConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    assert model_init_kwargs(RunModelConfig(use_peft=use_peft), training)["dtype"] == dtype
    assert model_init_kwargs(RunModelConfig(use_peft=use_peft, dtype="float16"), training)["dtype"] == "float16"


ZERO2 = "examples/accelerate_configs/zero2.yaml"
CASES = {  # options: bytes of a parameter for each of the two models, twice for the best weights, in three checkpoints
    "float32": ({}, {}, 2 * 4 + 2 * 4 + 3 * 12),
    "bfloat16 and ZeRO-2": ({"dtype": "bfloat16"}, {"accelerate_config": ZERO2}, 2 * 2 + 2 * 2 + 3 * 16),
    "one checkpoint": ({"dtype": "auto"}, {"save_total_limit": 1}, 2 * 2 + 2 * 2 + 2 * 12),
    "no checkpoint": ({}, {"save_strategy": "no", "monitor_evals": 0}, 2 * 4),
    "a merged adapter": ({"use_peft": True}, {"merge_adapter": True}, 2 * 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_disk_a_run_needs_is_known_from_the_config_alone(tmp_path, monkeypatch, case):
    """Also of a model on the hub, which is not there yet."""
    model, options, per_parameter = CASES[case]
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    layer = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    expected = (2 * 100 * 16 + 2 * layer + 16) * per_parameter
    training_names = {"save_strategy", "save_total_limit"} & options.keys()
    folder = SimpleNamespace(
        path=tmp_path,
        iteration=lambda number: tmp_path / str(number),
        keeps_adapter=False,
        model=RunModelConfig(model_name_or_path="ORG/MODEL", **model),
        training=RunTrainingConfig(
            str(tmp_path), report_to="none", use_cpu=True, bf16=False, **{x: options[x] for x in training_names}
        ),
        options=RunConfig(num_iterations=2, **{x: options[x] for x in options if x not in training_names}),
    )
    for free, fits in ((expected, True), (expected - 1, False)):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            disk.check_disk(folder, config)
        else:
            with pytest.raises(ConfigError, match=r"the disk has .* free, and the run may need"):
                disk.check_disk(folder, config)


def test_what_a_stopped_training_has_left_is_not_needed_again(tmp_path):
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    folder = RunFolder(
        RunConfig(num_iterations=3),
        RunTrainingConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        RunModelConfig(model_name_or_path="ORG/MODEL"),
    )
    (tmp_path / "iteration_1/model").mkdir(parents=True)
    before = disk.bytes_of_models(folder, config)
    found = {"trainer/checkpoint-2/optimizer.pt": 500, "trainer/best-1/model.safetensors": 70, "model.partial/a": 3}
    for name, size in found.items():
        path = tmp_path / "iteration_2" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"0" * size)
    assert disk.bytes_of_models(folder, config) == before - 573
    (tmp_path / "iteration_2/trainer/checkpoint-2/optimizer.pt").write_bytes(b"0" * 2 * before)
    assert 0 < disk.bytes_of_models(folder, config) < before - 573, "models are still to be written"


@pytest.mark.parametrize("memory", ["none", "all"])
def test_samples_and_lists_need_the_disk_that_is_estimated(tmp_path, memory, monkeypatch, caplog):
    """The check counted models alone: 60,000 prompts × 10 samples are 2.3 GB more in each iteration."""
    options = RunConfig(
        num_iterations=2, num_samples=8, num_eval_samples=2, max_new_tokens=200, memory=memory, num_best=2, num_worst=2
    )
    training = RunTrainingConfig(str(tmp_path / "run"), report_to="none", use_cpu=True, bf16=False)
    folder = RunFolder(options, training, RunModelConfig(model_name_or_path="ORG/MODEL"))
    folder.prompts = [Prompt.of(f"{number} why is it so " * 10) for number in range(20)]
    folder.held_out = [Prompt.of(f"held out {number}") for number in range(5)]
    expected = disk.bytes_of_candidates(folder)

    def pools(prompts, counts, reward=None):
        for prompt in prompts:
            texts = [(f"{i} {number} " + "some words of it " * 60)[:900] for i, n in counts for number in range(n)]
            about = {"num_tokens": 200, "temperature": 1.0, "reward_parts": {"it": reward}, "scored_by": "a" * 16}
            about = about if reward is not None else {"num_tokens": 200, "temperature": 1.0}
            yield CandidatePool(prompt, [Candidate(text, n and reward, **about) for n, text in enumerate(texts)])

    used = 0
    for iteration in range(3):
        path = folder.iteration(iteration)
        path.mkdir(parents=True)
        counts = [(i, 8) for i in range(1, iteration + 1) if memory == "all" or i == iteration]
        made = {"held_out_samples": pools(folder.held_out, [(0, 2)]), "held_out": pools(folder.held_out, [(0, 2)], 0.5)}
        if iteration:
            rewarded = list(pools(folder.prompts, counts, 0.5))
            lists = build_lists(rewarded, options.selection())[0]
            made |= {"samples": pools(folder.prompts, [(iteration, 8)]), "rewarded": rewarded, "lists": lists}
        for name, rows in made.items():
            write_jsonl(path / f"{name}.jsonl", (row.to_row() for row in rows))
            used += (path / f"{name}.jsonl").stat().st_size
    most_twice = (folder.iteration(2) / "samples.jsonl").stat().st_size
    assert used + most_twice < expected < 1.35 * (used + most_twice)
    left = disk.bytes_of_candidates(folder)
    assert left < 0.3 * expected, "what is there already is not needed again"
    for free, of_models, warns in ((left + 9, 9, False), (left + 8, 9, True), (left, None, False), (10, None, True)):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        caplog.clear()
        disk.warn_of_little_space(folder, of_models)
        assert ("samples and lists may need" in caplog.text) == warns, (free, caplog.text)


@pytest.mark.slow
def test_a_model_whose_size_is_not_known_may_run(tmp_path, caplog):
    class NoLanguageModel(LlamaConfig):
        model_type = "none-of-transformers"

    folder = SimpleNamespace(training=RunTrainingConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False))
    with caplog.at_level("WARNING", logger="trl_larpo"):
        disk.check_disk(folder, NoLanguageModel())
    assert "The disk space that the run needs is not known and was not checked" in caplog.text
