"""What a person may write into a configuration file or a file of prompts by mistake, or with good reason."""

import dataclasses
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from small_run import change_options, larpo_run
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from trl_larpo import cli
from trl_larpo.arguments import parse_options
from trl_larpo.commands import SampledModelConfig, check_model
from trl_larpo.config_file import as_meant, check_types
from trl_larpo.errors import ConfigError, DataError
from trl_larpo.run.candidate_files import read_candidate_pools
from trl_larpo.run.folder import _plain as plain
from trl_larpo.run.loading import tokenizer_of
from trl_larpo.run.options import RunConfig, RunModelConfig, RunTrainingConfig
from trl_larpo.training.datasets import load_splits


def error_of(capsys):
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("larpo: error: ")]
    return line


def test_a_key_that_occurs_twice_is_refused(project, capsys):
    text = (project / "it.yaml").read_text()
    (project / "it.yaml").write_text(f"seed: 3\n{text}seed: 4\n")
    assert larpo_run("--dry_run") == 2
    last = text.count("\n") + 2
    assert f"it.yaml has `seed` twice, in lines 1 and {last}." in error_of(capsys)
    (project / "it.yaml").write_text(text + "chat_template_kwargs:\n  a: 1\n  a: 2\n")
    assert larpo_run("--dry_run") == 2 and "has `a` twice" in error_of(capsys)
    (project / "it.yaml").write_text("a: [1")
    assert larpo_run("--dry_run") == 2 and "is not YAML: while parsing a flow" in error_of(capsys)
    (project / "it.yaml").unlink()
    assert larpo_run("--dry_run") == 2 and "'it.yaml' cannot be read: No such file" in error_of(capsys)


@pytest.mark.parametrize("name", ["temperature", "learning_rate", "top_p", "min_reward_gap", "max_failed_share"])
def test_nan_is_no_number(project, capsys, name):
    change_options(project, **{name: float("nan")})
    assert ".nan" in (project / "it.yaml").read_text()
    assert larpo_run("--dry_run") == 2
    assert f"`{name}` is nan, which is not a number" in error_of(capsys)


def test_no_without_quotes(project, capsys):
    """YAML reads it as false."""
    text = (project / "it.yaml").read_text()
    (project / "it.yaml").write_text(text + "eval_strategy: no\nsave_strategy: no\n")
    assert yaml.safe_load((project / "it.yaml").read_text())["eval_strategy"] is False
    assert larpo_run("--dry_run") == 0
    (project / "it.yaml").write_text(text + "prompt_column: no\n")
    assert larpo_run("--dry_run") == 2
    assert "`prompt_column` is False; it must be text (YAML reads no, off, yes and on as true or false: quote it)" in (
        error_of(capsys)
    )


def test_false_stays_false_where_no_is_no_choice():
    class Action:
        dest, choices, nargs = "a", None, None

    assert as_meant({"a": False, "b": False}, [Action]) == {"a": False, "b": False}


@pytest.mark.parametrize(
    "text, message",
    [
        ("loss_weights: [1, 1e-2, few]", "`loss_weights` is 'few'; it must be a number."),
        ("loss_weights: [1, true]", "`loss_weights` is [1, True]; it must be a list (each item: a number)."),
        ("max_steps: 1.5", "`max_steps` is 1.5; it must be a whole number."),
        ("per_device_train_batch_size: 2.5", "`per_device_train_batch_size` is 2.5; it must be a whole number."),
        ("per_device_train_batch_size: 0", "`per_device_train_batch_size` is 0; it must be at least 1."),
        ("gradient_accumulation_steps: 0", "`gradient_accumulation_steps` is 0; it must be at least 1."),
        ("beta: true", "`beta` is True; it must be a number (YAML reads"),
        ("beta: [0.1]", "`beta` is [0.1]; it must be a number."),
        ("lora_r: 1.5", "`lora_r` is 1.5; it must be a whole number."),
        ("seed: 1.5", "`seed` is 1.5; it must be a whole number."),
        ("max_length: 512.0", "`max_length` is 512.0; it must be a whole number."),
        ("dtype: no", "`dtype` is False; it must be text (YAML reads"),
        ("learning_rate: null", "`learning_rate` is None; it must be a number."),
        ("num_train_epochs: [1]", "`num_train_epochs` is [1]; it must be a number."),
        ("lr_scheduler_type: 1", "`lr_scheduler_type` is 1; it must be text."),
        ("pad_to_multiple_of: 8.5", "`pad_to_multiple_of` is 8.5; it must be a whole number"),
        ("use_peft: 2", "`use_peft` is 2; it must be true or false."),
    ],
)
def test_training_options_of_another_type(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(f"output_dir: out\nuse_cpu: true\nbf16: false\n{text}\n")
    kinds = (RunConfig, RunTrainingConfig, RunModelConfig)
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_options(["--config", str(tmp_path / "a.yaml")], kinds, command="run", description="")


def test_training_options_that_yaml_may_write_in_several_ways(tmp_path):
    (tmp_path / "a.yaml").write_text(
        """
output_dir: out
use_cpu: true
bf16: false
temperature: [1, 1e-1]
loss_type: [listmle, sft]
loss_weights: [1, 1e-2]
learning_rate: 1e-6
beta: 1
save_steps: 0.5
lr_scheduler_type: cosine
lr_scheduler_kwargs: {num_cycles: 2}
model_init_kwargs: '{"a": 1}'
save_strategy: no
report_to: [none]
logging_steps: 5
pad_to_multiple_of: 8
max_length: null
shared_prompt: off
optim_target_modules: [a, b]
accelerator_config: {split_batches: true}
lora_target_modules: all-linear
lora_modules_to_save: lm_head
model_revision:
fsdp: false
"""
    )
    kinds = (RunConfig, RunTrainingConfig, RunModelConfig)
    options, training, model, *_ = parse_options(
        ["--config", str(tmp_path / "a.yaml")], kinds, command="run", description=""
    )
    assert options.temperature == [1.0, 0.1] and training.loss_weights == [1, 0.01] and training.beta == 1
    assert training.save_strategy == "no" and training.shared_prompt == "off" and training.max_length is None
    assert (model.lora_target_modules, model.lora_modules_to_save) == ("all-linear", ["lm_head"])


@pytest.mark.skipif(not tiny.HAS_ONLINE, reason="needs `larpo online`")
def test_truth_that_trl_takes_as_text():
    check_types({"scale_rewards": True}, [importlib.import_module("trl_larpo").OnlineLarPOConfig])


KINDS_OF_OPTIONS = [ScriptArguments, RunTrainingConfig, RunModelConfig, SampledModelConfig, DatasetMixtureConfig]
if tiny.HAS_ONLINE:
    KINDS_OF_OPTIONS.append(importlib.import_module("trl_larpo").OnlineLarPOConfig)


@pytest.mark.parametrize("kind", KINDS_OF_OPTIONS)
def test_defaults_are_of_the_types_that_are_checked(tmp_path, kind):
    folder = {"output_dir": str(tmp_path)} if issubclass(kind, TrainingArguments) else {}
    made = kind(**folder, **({"use_cpu": True, "bf16": False} if folder else {}))
    for each in dataclasses.fields(kind):
        default = each.default if each.default is not dataclasses.MISSING else getattr(made, each.name, None)
        if each.init and default is not dataclasses.MISSING:
            check_types({each.name: default}, [kind])  # as the class has it
    in_yaml = yaml.safe_load(yaml.safe_dump({name: plain(value) for name, value in vars(made).items()}))
    known = {each.name for each in dataclasses.fields(kind) if each.init}
    check_types({name: value for name, value in in_yaml.items() if name in known}, [kind])  # as run.yaml has it


def test_prompts_that_are_not_utf8_are_named_by_their_line(project, capsys):
    rows = '{"prompt": "one"}\n{"prompt": "d\u00e9j\u00e0 vu"}\n'
    for name, data in (("a.jsonl", rows.encode("latin-1")), ("a.csv", "prompt\nun caf\u00e9\n".encode("latin-1"))):
        (project / name).write_bytes(data)
        assert larpo_run("--dry_run", "--prompts", name) == 2
        said = error_of(capsys)
        assert f"{name} line 2 is not UTF-8: byte 0xe9 at place" in said and "iconv -f latin1 -t utf-8" in said


def test_names_with_the_signs_of_patterns(tmp_path):
    for name, prompt in (("r[1].jsonl", "mine"), ("r1.jsonl", "another")):
        (tmp_path / name).write_text(json.dumps({"prompt": prompt}) + "\n")
    assert list(load_splits(str(tmp_path / "r[1].jsonl"))["train"]) == [{"prompt": "mine"}]


def test_earlier_candidates_are_read_before_the_start(project, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    row = {"prompt": "why", "responses": ["a", "b"], "rewards": [float("nan"), 1.0]}
    (project / "earlier.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--dry_run", "--earlier_candidates", "~/earlier.jsonl"]
    assert larpo_run(*flags) == 2
    assert "'~/earlier.jsonl' row 0, column `rewards`: entry 0 is nan, not a finite number" in error_of(capsys)
    (project / "earlier.jsonl").write_text(json.dumps(row | {"rewards": [0.0, 1.0]}) + "\n")
    assert larpo_run(*flags) == 0
    assert [pool.prompt.text for pool in read_candidate_pools("~/earlier.jsonl")] == ["why"]


@pytest.mark.parametrize(
    "completion, problem",
    [
        ("half \ud83d", "entry 1 has half of a surrogate pair"),
        ([{"role": "assistant", "content": "half \ud83d"}], "entry 1 has half of a surrogate pair"),
        ([], "entry 1 is an empty list of messages"),
        (["a text"], "entry 1 holds 'a text', which is no message"),
        ([{"role": "poet", "content": "a"}], "entry 1 has a message of the unknown role 'poet'"),
    ],
)
def test_earlier_completions_that_no_model_takes_are_named(tmp_path, completion, problem):
    path = tmp_path / "earlier.jsonl"
    empty = [{"role": "assistant", "content": ""}]  # a model may say nothing
    rows = [{"prompt": "why", "completions": [first, second]} for first, second in ((empty, ""), (empty, completion))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=f"row 1, column `completions`: {re.escape(problem)}"):
        read_candidate_pools(str(path))


def test_a_prompt_that_the_chat_template_refuses_is_named(project, capsys, talkative_model):
    shutil.copytree(talkative_model, "model")
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported.') }}"
    tokenizer.save_pretrained("model")
    change_options(project, model_name_or_path="model")
    assert larpo_run("--dry_run") == 2
    said = error_of(capsys)
    assert "'prompts.jsonl': The chat template refuses the prompt '0 why is the dog blue': System role not supp" in said


def test_prompts_that_are_all_too_long_are_said_to_be(project, capsys):
    assert larpo_run("--dry_run", "--max_prompt_length", 1) == 2
    said = error_of(capsys)
    assert "there are only 0 prompts to hold out. 10 of the 10 that were read are left out" in said
    assert "more than 1 tokens: raise `max_prompt_length`" in said


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_is_a_file_is_named(project, capsys, place):
    (project / "file").write_text("")
    assert larpo_run("--output_dir", place) == 2
    assert f"`output_dir` is '{place}', but file is a file, not a folder" in error_of(capsys)
    words = ["--model_name_or_path", "m", "--dataset_name", "prompts.jsonl", "--bf16", "false", "--use_cpu"]
    assert cli.main(["train", "--output_dir", place, *words]) == 2
    assert f"`output_dir` is '{place}', but file is a file" in error_of(capsys)
    assert Path("file").is_file()


def test_a_yaml_file_may_name_the_home_folder(project, monkeypatch):
    """There no shell puts it in place of `~`."""
    monkeypatch.setenv("HOME", str(project / "home"))
    shutil.copytree(tiny.save_tiny_model(project / "tiny"), project / "home/model")
    (project / "home/prompts.jsonl").write_text('{"prompt": "why"}\n{"prompt": "how"}\n')
    judge = {"reward_funcs": "run_rewards:vowels", "use_cpu": True}
    steps = {
        "generate": {
            "model_name_or_path": "~/model", "prompts": "~/prompts.jsonl", "output": "~/samples.jsonl",
            "num_samples": 2, "max_new_tokens": 4, "use_cpu": True,
        },
        "reward": {"samples": "~/samples.jsonl", "output": "~/rewarded.jsonl"} | judge,
        "select": {"candidates": "~/rewarded.jsonl", "output": "~/lists.jsonl"},
        "recall": {"candidates": ["~/run"], "output": "~/recall"} | judge,
    }  # fmt: skip
    for command, options in steps.items():
        if command == "recall":
            (project / "home/run/iteration_1").mkdir(parents=True)
            (project / "home/run/run.yaml").touch()
            shutil.copy(project / "home/rewarded.jsonl", project / "home/run/iteration_1/held_out.jsonl")
        Path("options.yaml").write_text(yaml.safe_dump(options))
        assert cli.main([command, "--config", "options.yaml"]) == 0
    assert (project / "home/recall/recall.md").is_file() and (project / "home/lists.jsonl").is_file()
    change_options(project, model_name_or_path="~/model", output_dir="~/out")
    assert larpo_run("--small", "--dry_run") == 0 and (project / "home/out-small-parts").is_dir()
    assert not Path("~").exists()


@pytest.mark.parametrize("name", ["nomodel", "./nomodel", "void", "prompts.jsonl"])
@pytest.mark.parametrize("command", ["run", "generate", "recall", "train", *(["online"] if tiny.HAS_ONLINE else [])])
def test_a_model_that_is_not_there_is_named(project, capsys, command, name):
    Path("void").mkdir()  # transformers 4 takes a name such as "empty" for that of an MPT
    judge = ["--reward_funcs", "run_rewards:vowels"]
    of_training = ["--dataset_name", "prompts.jsonl", "--output_dir", "out", "--bf16", "false"]
    flags = {
        "run": ["--config", "it.yaml"],
        "generate": ["--prompts", "prompts.jsonl", "--output", "samples.jsonl"],
        "recall": ["--prompts", "prompts.jsonl", "--output", "recall", *judge],
        "train": of_training,
        "online": [*of_training, *judge],
    }
    assert cli.main([command, *flags[command], "--use_cpu", "true", "--model_name_or_path", name]) == 2
    said = error_of(capsys)
    missing = f"is {name!r}, and there is no such folder."
    assert f"`model_name_or_path`: {name!r} cannot be loaded: " in said or (name == "./nomodel" and missing in said)


def test_an_adapter_is_a_model_to_sample_or_train(project, talkative_model):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(talkative_model)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained("adapter")
    check_model(ModelConfig("adapter"))
    with pytest.raises(ConfigError, match="'adapter' cannot be loaded"):
        tokenizer_of(ModelConfig("adapter"))


def test_config_may_be_written_in_one_word_but_not_twice(project, capsys):
    for words in (["--config=it.yaml"], ["--config=it.yaml", "--small"], ["--config", "it.yaml"]):
        assert cli.main(["run", *words, "--dry_run"]) == 0
    assert cli.main(["run", "--config=it.yaml", "--config", "it.yaml", "--dry_run"]) == 2
    assert "`--config` is given twice" in error_of(capsys)
    assert cli.main(["run", "--config=nowhere.yaml"]) == 2 and "'nowhere.yaml' cannot be read" in error_of(capsys)


@pytest.mark.parametrize("text, flag", [("small: true", "--small"), ("try: 5", "--try"), ("help: true", "--help")])
def test_flags_are_no_options_of_a_yaml_file(project, capsys, text, flag):
    (project / "it.yaml").write_text(f"{(project / 'it.yaml').read_text()}{text}\n")
    assert larpo_run("--dry_run") == 2
    assert f"in the YAML file: write it as the flag `{flag}` in the command" in error_of(capsys)


def test_who_reads_a_text_may_leave_early():
    code = "from trl_larpo.cli import _show; _show('line\\n' * 100_000)"
    words = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "line\n", "")
