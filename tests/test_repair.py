"""What is damaged or incomplete in the folder of a run is found and done again, and not taken for whole."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from small_run import change_options, larpo_run, rows_of
from trl import ModelConfig

from trl_larpo import ConfigError, DataError, LarPOTrainer, cli
from trl_larpo.candidates import Candidate, CandidateList, CandidatePool
from trl_larpo.prompts import Prompt
from trl_larpo.run.folder import RunFolder
from trl_larpo.run.options import RunConfig, RunTrainingConfig
from trl_larpo.run.repair import repair
from trl_larpo.run.stages import STAGES, is_done
from trl_larpo.run.status import status_of
from trl_larpo.run.timings import TIMINGS, seconds_of_stages
from trl_larpo.run.training_stages import TrainingStage
from trl_larpo.storage import partial_files, read_json, write_json, write_jsonl
from trl_larpo.training.checkpoints import check_optimizer, last_whole_checkpoint, set_options


@pytest.fixture
def run(tmp_path, config):
    """A run of one iteration up to its training, of four prompts and three held-out ones, as files."""
    PartialState()
    options = RunConfig(prompts=["prompts.jsonl"], reward_funcs=["gsm8k"], num_iterations=1, max_failed_share=0.3)
    folder = RunFolder(options, config(RunTrainingConfig, output_dir=str(tmp_path / "out")), ModelConfig("model"))
    folder.prompts = [Prompt.of(f"prompt {i}", {}) for i in range(4)]
    folder.held_out = [Prompt.of(f"held out {i}", {}) for i in range(3)]
    start, first = folder.iteration(0), folder.iteration(1)
    for path, name, prompts in ((first, "samples", folder.prompts), (start, "held_out_samples", folder.held_out)):
        path.mkdir(parents=True)
        write_jsonl(path / f"{name}.jsonl", [pool_of(prompt).to_row() for prompt in prompts])
    for path, name, prompts in ((first, "rewarded", folder.prompts), (start, "held_out", folder.held_out)):
        write_jsonl(path / f"{name}.jsonl", [pool_of(prompt, [1.0, 0.0]).to_row() for prompt in prompts])
    lists = [CandidateList(prompt, pool_of(prompt, [1.0, 0.0]).candidates) for prompt in folder.prompts]
    write_jsonl(first / "lists.jsonl", [made.to_row() for made in lists])
    write_json(first / "selection.json", {"lists": 4})
    write_jsonl(first / "ref_logps.jsonl", [{"prompt_id": p.id, "ref_logps": [-1.0, -2.0]} for p in folder.prompts])
    write_json(start / "evaluation.json", {})
    return folder


def pool_of(prompt, rewards=None):
    rewards = rewards or [None, None]
    scored_by = None if rewards[0] is None else "judge"
    return CandidatePool(
        prompt, [Candidate(text, reward, scored_by=scored_by) for text, reward in zip("ab", rewards, strict=True)]
    )


def files_of(folder):
    return {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}


AFTER_REWARDS = {f"iteration_1/{name}" for name in ("lists.jsonl", "selection.json", "ref_logps.jsonl")}


def test_a_whole_folder_stays_as_it_is(run):
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    repair(run)
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}


def test_samples_shorter_than_the_prompts_are_sampled_and_what_was_made_of_them_is_made_again(run, caplog):
    path = run.iteration(1) / "samples.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    repair(run)
    assert "samples.jsonl lacks 1 of 4 prompts: 'prompt 3'. What is missing is done again" in caplog.text
    assert not path.exists() and [row["prompt"] for row in rows_of(partial_files(path)[0])] == [
        "prompt 0", "prompt 1", "prompt 2"
    ]  # fmt: skip
    assert not AFTER_REWARDS & files_of(run) and (run.iteration(1) / "rewarded.jsonl").exists()


def test_prompts_that_were_set_aside_are_not_missing(run):
    first = run.iteration(1)
    for name in ("samples.jsonl", "rewarded.jsonl", "lists.jsonl", "ref_logps.jsonl"):
        (first / name).write_bytes(b"".join((first / name).read_bytes().splitlines(keepends=True)[:3]))
    row = {"prompt_id": run.prompts[3].id, "prompt": "prompt 3", "reason": "too long"}
    write_jsonl(first / "samples.set_aside.jsonl", [row])
    before = files_of(run)
    repair(run)
    assert files_of(run) == before


@pytest.mark.parametrize("damage", [
    lambda lines: [lines[0], b"\0" * 4096 + b"\n", *lines[2:]],
    lambda lines: [lines[0], lines[1][:40] + lines[2], lines[3]],
    lambda lines: [lines[0], b'{"prompt": "\xff\xfe"}\n', *lines[1:]],
], ids=["zeros", "half a line", "no UTF-8"])  # fmt: skip
@pytest.mark.parametrize("name, gone", [
    ("samples.jsonl", AFTER_REWARDS), ("rewarded.jsonl", AFTER_REWARDS), ("lists.jsonl", AFTER_REWARDS),
    ("ref_logps.jsonl", {"iteration_1/ref_logps.jsonl"}),
])  # fmt: skip
def test_damaged_lines_are_dropped_and_done_again(run, caplog, damage, name, gone):
    path, before = run.iteration(1) / name, files_of(run)
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    repair(run)
    assert f"{path} line 2 is not JSON" in caplog.text
    grows = {str(each.relative_to(run.path)) for each in partial_files(path)}
    assert files_of(run) == (before - gone - {f"iteration_1/{name}"}) | grows
    assert bool(grows) == (name in ("samples.jsonl", "rewarded.jsonl"))


def test_negatives_of_other_prompts_are_added_again(run):
    path = run.iteration(1) / "samples.jsonl"
    pools = [pool_of(prompt) for prompt in run.prompts]
    negative = Candidate("of another prompt", source="random_prompt", of_prompt=run.prompts[0].id)
    write_jsonl(path, [pool.with_candidates([*pool.candidates, negative]).to_row() for pool in pools[:3]])
    repair(run)
    assert {len(row["completions"]) for row in rows_of(partial_files(path)[0])} == {2}


def test_held_out_samples_are_completed_and_evaluated_again(run):
    path = run.iteration(0) / "held_out.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    repair(run)
    assert not path.exists() and not (run.iteration(0) / "evaluation.json").exists()
    rows = rows_of(partial_files(path)[0])
    assert [row["scores"][0]["reward"] for row in rows] == [1.0, 1.0]


def test_held_out_samples_that_the_next_evaluation_compares_with_are_completed(run):
    run.options.num_iterations = 2
    first, second = run.iteration(1), run.iteration(2)
    for path in (first, second):
        shutil.copytree(run.iteration(0), path, dirs_exist_ok=True)
        save_model(path / "model")
    (second / "evaluation.json").write_text("{")
    before = files_of(run)
    damage_first_line(first / "held_out.jsonl")
    repair(run)
    gone = {f"iteration_{name}" for name in ("1/held_out.jsonl", "1/evaluation.json", "2/evaluation.json")}
    assert files_of(run) == before - gone | {"iteration_1/held_out.jsonl.partial-reopened"}


@pytest.mark.parametrize("memory", ["none", "all"])
def test_rewards_that_the_next_iteration_remembers_are_completed(run, memory):
    run.options.num_iterations, run.options.memory = 2, memory
    save_model(run.iteration(1) / "model")
    path = run.iteration(1) / "rewarded.jsonl"
    damage_first_line(path)
    repair(run)
    assert path.exists() == (memory == "none") and (run.iteration(1) / "model").exists()


def damage_first_line(path):
    path.write_bytes(b"{" + path.read_bytes())


def test_damaged_results_are_made_again(run, caplog):
    (run.iteration(1) / "selection.json").write_text("")
    (run.iteration(0) / "evaluation.json").write_text('{"reward": ')
    (run.path / TIMINGS).write_text('{"iteration": 0, "stage": "held_out", "seconds": 1}\n{"iterat\n')
    repair(run)
    assert not (run.iteration(1) / "selection.json").exists() and not (run.iteration(0) / "evaluation.json").exists()
    assert "selection.json line 1 is not JSON" in caplog.text
    assert seconds_of_stages(run.path) == {(0, "held_out"): 1}


def test_a_model_that_is_cut_off_is_trained_again(run):
    model = run.iteration(1) / "model"
    save_model(model)
    repair(run)
    assert model.exists()
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:200])
    repair(run)
    assert not model.exists() and (run.iteration(1) / "ref_logps.jsonl").exists()


@pytest.mark.parametrize("use_peft, name", [
    (False, "config.json"), (True, "adapter_config.json"), (False, "tokenizer_config.json")
])  # fmt: skip
def test_a_model_that_was_not_copied_to_its_end_is_trained_again(run, caplog, use_peft, name):
    model, run.model.use_peft = run.iteration(1) / "model", use_peft
    save_model(model)
    write_json(model / "adapter_config.json", {"base_model_name_or_path": "model"})
    repair(run)
    assert model.exists()
    (model / name).unlink()
    repair(run)
    missing = "tokenizer" if "tokenizer" in name else name
    assert not model.exists() and f"is damaged (it has no {missing}): it is deleted, and trained again" in caplog.text


def test_checkpoints_are_deleted_where_a_kill_left_them_beside_the_model(run):
    save_model(run.iteration(1) / "model")
    checkpoint = save_checkpoint(run.iteration(1) / "trainer", 3)
    repair(run)
    assert not checkpoint.parent.exists() and (run.iteration(1) / "model").exists()


def test_adapters_of_a_training_that_was_killed_name_their_base_where_it_is_now(run):
    run.model.use_peft = True
    configs = [run.iteration(1) / "trainer" / name / "adapter_config.json" for name in ("start", "best-2")]
    for config in configs:
        config.parent.mkdir(parents=True)
        write_json(config, {"base_model_name_or_path": "old", "r": 4})
    repair(run)
    assert [read_json(config) for config in configs] == [{"base_model_name_or_path": "model", "r": 4}] * 2


def save_model(folder):
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(100)}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer_config.json"):
        write_json(folder / name, {})


def save_checkpoint(folder: Path, step):
    path = folder / f"checkpoint-{step}"
    save_model(path)
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({"state": torch.zeros(100)}, path / name)
    write_json(path / "trainer_state.json", {"global_step": step, "max_steps": 10})
    return path


@pytest.mark.parametrize("name, damage", [
    ("optimizer.pt", lambda data: data[: len(data) // 2]), ("model.safetensors", lambda data: data[:-50]),
    ("model.safetensors", lambda data: b""), ("trainer_state.json", lambda data: data[:5]), ("config.json", None),
    ("trainer_state.json", None), ("optimizer.pt", None), ("scheduler.pt", None), ("model.safetensors", None),
])  # fmt: skip
def test_a_training_resumes_from_the_last_whole_checkpoint(tmp_path, run, name, damage, caplog):
    trainer = run.iteration(1) / "trainer"
    first, second = (save_checkpoint(trainer, step) for step in (9, 10))
    save_checkpoint(trainer, "of-mine")
    assert last_whole_checkpoint(trainer) == str(second)
    if damage is None:
        (second / name).unlink()
    else:
        (second / name).write_bytes(damage((second / name).read_bytes()))
    if name == "config.json":  # a trainer saves what it likes: only what is there is checked
        assert last_whole_checkpoint(trainer) == str(second)
        return
    assert last_whole_checkpoint(trainer) == str(first)
    assert f"{second} is not whole (" in caplog.text and second.exists(), "any process may ask; none deletes"
    repair(run)
    assert first.exists() and not second.exists()
    assert last_whole_checkpoint(tmp_path / "none") is None


def test_checkpoints_of_weights_alone_are_whole_where_a_training_saves_no_more(tmp_path):
    path = save_checkpoint(tmp_path, 1)
    for name in ("optimizer.pt", "scheduler.pt"):
        (path / name).unlink()
    assert last_whole_checkpoint(tmp_path, only_model=True) == str(path)
    (path / "model.safetensors").unlink()
    assert last_whole_checkpoint(tmp_path, only_model=True) is None


@pytest.mark.parametrize("files, saved_by", [
    ([], None), (["global_step3/mp_rank_00_model_states.pt"], "DeepSpeed"), (["pytorch_model_fsdp.bin"], "FSDP"),
    (["pytorch_model_fsdp_0/0.pt"], "FSDP"),
])  # fmt: skip
def test_a_training_does_not_resume_without_the_state_of_its_optimizer(tmp_path, files, saved_by):
    path = save_checkpoint(tmp_path, 3)
    for name in files:
        (path / name).parent.mkdir(exist_ok=True)
        torch.save({}, path / name)
    for sharded_by in (None, "DeepSpeed", "FSDP"):
        if sharded_by == saved_by:
            check_optimizer(str(path), sharded_by)
            continue
        with pytest.raises(ConfigError, match=r"cannot read the state of its optimizer\. .* or delete .*checkpoint-\*"):
            check_optimizer(str(path), sharded_by)


@pytest.mark.slow
def test_a_run_refuses_a_checkpoint_whose_optimizer_it_cannot_read(project, monkeypatch, capsys):
    change_options(project, num_iterations=1, monitor_evals=0)
    with monkeypatch.context() as patched:
        patched.setattr(TrainingStage, "_save_model", killed)
        assert larpo_run() == 130
    last = Path(last_whole_checkpoint("out/iteration_1/trainer"))
    (last / "global_step3").mkdir()
    torch.save({}, last / "global_step3/mp_rank_00_model_states.pt")
    assert larpo_run() == 2
    assert f"{last} was saved with DeepSpeed, and the training would resume without" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_forgets_the_best_weights_of_one_that_it_does_not_resume(project, monkeypatch):
    change_options(project, num_iterations=1, save_strategy="no")
    folder, found = project / "out/iteration_1", []

    def killed_later(self, **options):
        found.append(sorted(path.name for pattern in ("best-*", "monitor.json") for path in folder.rglob(pattern)))
        for name in ("best-90", "best-91", "best-92.partial"):
            (folder / "trainer" / name).mkdir(exist_ok=True)
        write_json(folder / "monitor.json", {"stopped_at": None, "points": []})
        killed()

    monkeypatch.setattr(LarPOTrainer, "train", killed_later)
    assert larpo_run() == larpo_run() == 130
    save_checkpoint(folder / "trainer", 1)
    assert larpo_run("--monitor_evals", 0) == 130  # resumes, and ends with its last weights
    assert found == [[], [], []]


def killed(*args):
    raise KeyboardInterrupt


def test_weights_that_an_index_names_must_be_there(tmp_path):
    PartialState()
    path = save_checkpoint(tmp_path, 1)
    write_json(path / "model.safetensors.index.json", {"weight_map": {"a": "model.safetensors", "b": "2.safetensors"}})
    assert last_whole_checkpoint(tmp_path) is None
    save_file({"b": torch.zeros(1)}, path / "2.safetensors")
    assert last_whole_checkpoint(tmp_path) == str(path)


def test_damaged_prompts_are_chosen_again_if_they_are_the_same(project, config, talkative_model, caplog):
    from transformers import AutoTokenizer

    options = RunConfig(prompts=["prompts.jsonl"], reward_funcs=["run_rewards:vowels"], num_held_out=4)
    training, tokenizer = config(RunTrainingConfig), AutoTokenizer.from_pretrained(talkative_model)

    def prepared():
        folder = RunFolder(options, training, ModelConfig(talkative_model))
        folder.prepare_prompts(tokenizer)
        return folder

    before = prepared()
    files = [before.path / name for name in ("prompts.jsonl", "held_out_prompts.jsonl", "prompts.json")]
    contents = [path.read_bytes() for path in files]
    for path, kept in zip(files, (-1, 3, 0), strict=True):  # the last line, the last one of four, all
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:kept]))
        again = prepared()
        assert (again.prompts, again.held_out, again.prompt_counts) == (
            before.prompts, before.held_out, before.prompt_counts
        )  # fmt: skip
        assert [each.read_bytes() for each in files] == contents
    assert "prompts.jsonl has 5 of 6 prompts. The prompts are chosen again" in caplog.text
    Path("prompts.jsonl").write_text(
        '{"prompt": "another"}\n' * 2 + "".join(f'{{"prompt": "{i}"}}\n' for i in range(9))
    )
    files[0].write_bytes(contents[0][:-30])
    with pytest.raises(DataError, match="does not give the same ones again"):
        prepared()


@pytest.mark.parametrize("text", ["", "\0" * 100, "a: [1"])
def test_a_damaged_configuration_is_one_line(project, capsys, text):
    (project / "out").mkdir()
    (project / "out/run.yaml").write_text(text)
    assert larpo_run() == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("larpo: error: ")]
    assert len(errors) == 1 and "out/run.yaml" in errors[0]
    for command in ("status", "report"):
        assert cli.main([command, "out"]) == 2
        assert capsys.readouterr().err.startswith("larpo: error: out/run.yaml ")


@pytest.mark.slow
def test_a_damaged_run_ends_with_the_files_of_an_undamaged_one(finished_run, project):
    whole = {path.relative_to(finished_run): path.read_bytes() for path in finished_run.rglob("*.jsonl")}
    shutil.copytree(finished_run, project / "out")
    second = project / "out/iteration_2"
    for name in ("model", "training_log.jsonl", "held_out_samples.jsonl", "held_out.jsonl", "evaluation.json"):
        shutil.rmtree(second / name) if (second / name).is_dir() else (second / name).unlink()
    for name in ("samples.jsonl", "rewarded.jsonl"):
        lines = (second / name).read_bytes().splitlines(keepends=True)
        (second / name).write_bytes(b"".join([lines[0], lines[1][:50], b"\0" * 100 + b"\n", *lines[3:-1]]))
    (second / "selection.json").write_text("")
    (project / "out/iteration_1/evaluation.json").write_text("{")
    assert larpo_run() == 0
    for path, data in whole.items():  # what is computed in another process may differ in its last digits
        if path.name in ("samples.jsonl", "rewarded.jsonl", "lists.jsonl") or path.parent.name == "iteration_1":
            assert (project / "out" / path).read_bytes() == data, path
    assert all((project / "out" / path).exists() for path in whole)


def test_what_was_deleted_to_free_space_is_not_made_again(finished_run, project):
    shutil.copytree(finished_run, project / "out")
    first, second = project / "out/iteration_1", project / "out/iteration_2"
    shutil.rmtree(first / "model")
    (first / "samples.jsonl").unlink()
    assert status_of("out")["state"] == "finished"
    for name in ("evaluation.json", "health.json"):
        (second / name).unlink()
    timings = len(rows_of("out/timings.jsonl"))
    assert larpo_run() == 0
    ran = [(row["iteration"], row["stage"]) for row in rows_of("out/timings.jsonl")[timings:]]
    assert ran == [(2, "evaluate")] and not (first / "model").exists() and not (first / "samples.jsonl").exists()
    now, before = (read_json(path / "health.json") for path in (second, finished_run / "iteration_2"))
    assert [check["value"] for check in now] == pytest.approx([check["value"] for check in before], rel=1e-3)


@pytest.mark.parametrize("deleted, done", [
    (["1/model"], [1, 2, 3]), (["1/model", "2/model"], [1, 2, 3]), (["1/samples.jsonl", "3/samples.jsonl"], [1, 2, 3]),
    (["3/model"], [1, 2]), (["2/model", "3/model"], [1]), (["1/model", "2/ref_logps.jsonl"], [2, 3]),
    (["1/model", "2/model", "2/evaluation.json"], [3]), (["1/model", "2/samples.jsonl", "2/rewarded.jsonl"], [3]),
    (["1/model", "1/evaluation.json"], [2, 3]), (["1/samples.jsonl", "1/rewarded.jsonl"], [2, 3]),
])  # fmt: skip
def test_deleted_outputs_that_the_run_still_needs_are_made_again(tmp_path, deleted, done):
    for iteration in (1, 2, 3):
        for stage in STAGES.values():
            (tmp_path / f"iteration_{iteration}" / stage.output).mkdir(parents=True)
    for name in deleted:
        (tmp_path / f"iteration_{name}").rmdir()
    stages = [STAGES["generate"], STAGES["train"]]
    assert [i for i in (1, 2, 3) if all(is_done(tmp_path, stage, i, 3) for stage in stages)] == done


def test_a_run_that_is_stopped_as_it_writes_prompts_starts_again(project, config, talkative_model, monkeypatch):
    from transformers import AutoTokenizer

    options = RunConfig(prompts=["prompts.jsonl"], reward_funcs=["run_rewards:vowels"], num_held_out=4)
    training, tokenizer = config(RunTrainingConfig), AutoTokenizer.from_pretrained(talkative_model)

    def start():
        folder = RunFolder(options, training, ModelConfig(talkative_model))
        folder.check_configuration()
        folder.prepare_prompts(tokenizer)
        return folder

    def stops(path, value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("trl_larpo.run.folder.write_json", stops)
        with pytest.raises(KeyboardInterrupt):
            start()
    assert len(start().held_out) == 4


def test_a_training_resumes_with_another_batch_size_and_other_steps(tmp_path, tiny_model, config):
    def arguments(batch_size=4, **options):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1} | options
        return config(output_dir=str(tmp_path), per_device_train_batch_size=batch_size, **options)

    def train(args, checkpoint=None):
        trainer = LarPOTrainer(model=tiny_model, args=args, train_dataset=tiny.lists())
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    train(arguments(max_steps=1))
    checkpoint = last_whole_checkpoint(tmp_path)
    before = {path.name: path.read_bytes() for path in Path(checkpoint).iterdir()}
    set_options(checkpoint, arguments())
    assert {path.name: path.read_bytes() for path in Path(checkpoint).iterdir()} == before
    args = arguments(2, save_steps=3, logging_steps=2)
    set_options(checkpoint, args)
    trainer = train(args, checkpoint)
    assert trainer._train_batch_size == 2
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 4]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 3, 4)}
