"""`larpo train`: from YAML and flags to a saved model, and one line for every mistake."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import fields

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from trl_larpo import LarPOConfig, LarPOTrainer, cli, option_help
from trl_larpo.arguments import launch_training, parse_options
from trl_larpo.commands import GenerateConfig, RewardConfig, SelectConfig
from trl_larpo.recall import RecallConfig
from trl_larpo.rewards.options import JudgeOptions
from trl_larpo.run.options import RunConfig, RunTrainingConfig


@pytest.fixture
def lists_file(tmp_path):
    path = tmp_path / "lists.jsonl"
    tiny.lists().to_json(path)
    return path


@pytest.fixture
def yaml_file(tmp_path, tiny_model, lists_file):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""\
model_name_or_path: {tiny_model}
dataset_name: {lists_file}
output_dir: {tmp_path / "out"}
loss_type: listmle
max_steps: 4
save_steps: 2
learning_rate: 1e-3
per_device_train_batch_size: 4
bf16: false
use_cpu: true
report_to: none
disable_tqdm: true
"""
    )
    return path


def log_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_trains_from_yaml_with_flags_that_win(yaml_file, tmp_path, capsys):
    assert cli.main(["train", "--config", str(yaml_file), "--max_steps", "2", "--logging_steps", "1"]) == 0
    output = capsys.readouterr()
    assert "Model saved to" in output.out
    assert "one row for each list" in output.err
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [entry["step"] for entry in log_of(tmp_path / "out" / "checkpoint-2")] == [1, 2]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LLM Alignment as Retriever Optimization" in card
    assert str(tmp_path) not in card.split("model=")[0]  # paths of this machine are no names of data sets


@pytest.mark.slow
def test_resumes_from_the_last_checkpoint(yaml_file, tmp_path, monkeypatch):
    assert cli.main(["train", "--config", str(yaml_file), "--resume_from_checkpoint", "last"]) == 0  # none there yet
    started_at = []
    original = LarPOTrainer.training_step

    def spy(self, *args, **kwargs):
        started_at.append(self.state.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LarPOTrainer, "training_step", spy)
    again = ["train", "--config", str(yaml_file), "--max_steps", "6", "--resume_from_checkpoint", "last"]
    assert cli.main(again) == 0
    assert started_at == [4, 5]
    started_at.clear()
    cut_off = tmp_path / "out" / "checkpoint-6" / "optimizer.pt"  # as by a kill while it is written
    cut_off.write_bytes(cut_off.read_bytes()[:1000])
    assert cli.main(again) == 0
    assert started_at == [4, 5]


@pytest.mark.parametrize("value", ["true", "false", "no", "last"])
def test_a_first_start_has_no_checkpoint(yaml_file, tmp_path, monkeypatch, value):
    resumed = []
    monkeypatch.setattr(
        LarPOTrainer, "train", lambda self, resume_from_checkpoint: resumed.append(resume_from_checkpoint)
    )
    yaml_file.write_text(f"{yaml_file.read_text()}resume_from_checkpoint: {value}\n")
    assert cli.main(["train", "--config", str(yaml_file)]) == 0
    assert cli.main(["train", "--config", str(yaml_file), "--resume_from_checkpoint", value]) == 0
    assert resumed == [None, None]


def test_a_checkpoint_that_is_none_is_named(yaml_file, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, problem in (("nowhere", "there is no such folder"), ("empty", "it has no trainer_state.json")):
        flags = ["--config", str(yaml_file), "--resume_from_checkpoint", str(tmp_path / path)]
        assert cli.main(["train", *flags]) == 2
        assert f"{path}', and {problem}. 'last' resumes" in capsys.readouterr().err


def test_checkpoints_of_weights_alone_are_not_passed_over(yaml_file, tmp_path, capsys):
    """Training would start over, and delete them."""
    path = tmp_path / "out" / "checkpoint-1"
    path.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, path / "model.safetensors")
    (path / "trainer_state.json").write_text("{}")
    assert cli.main(["train", "--config", str(yaml_file), "--resume_from_checkpoint", "last"]) == 2
    assert "hold weights alone" in capsys.readouterr().err


@pytest.mark.slow
def test_trains_with_lora_and_evaluates(yaml_file, tmp_path, tiny_model):
    pytest.importorskip("peft")
    from datasets import DatasetDict

    DatasetDict({"train": tiny.lists(), "test": tiny.pairs(num_rows=4)}).save_to_disk(tmp_path / "splits")
    flags = ["--use_peft", "--lora_r", "4", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--dataset_name", str(tmp_path / "splits")]
    assert cli.main(["train", "--config", str(yaml_file), *flags]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert any("eval_loss" in entry for entry in log_of(tmp_path / "out" / "checkpoint-4"))


def test_dataset_mixture_of_the_yaml_file(yaml_file, lists_file, tmp_path):
    text = yaml_file.read_text().replace(f"dataset_name: {lists_file}\n", "")
    yaml_file.write_text(text + f"datasets:\n  - path: json\n    data_files: {lists_file}\n")
    assert cli.main(["train", "--config", str(yaml_file)]) == 0


def help_of(capsys, command, flag):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, flag])
    assert exit_.value.code == 0
    return capsys.readouterr().out


OPTIONS = {
    "run": (RunConfig, RunTrainingConfig, ModelConfig),
    "train": (ScriptArguments, LarPOConfig, ModelConfig, DatasetMixtureConfig),
    "generate": (GenerateConfig, ModelConfig),
    "reward": (RewardConfig,),
    "select": (SelectConfig,),
    "recall": (RecallConfig, ModelConfig),
}
if tiny.HAS_ONLINE:
    from trl_larpo import OnlineLarPOConfig

    OPTIONS["online"] = (ScriptArguments, JudgeOptions, OnlineLarPOConfig, ModelConfig, DatasetMixtureConfig)


NOT_IN_A_RUN = {"eval_strategy", "resume_from_checkpoint"}  # a run evaluates and resumes on its own

OF_A_TRAINING = {"dtype", "use_peft", "use_rslora", "use_dora", *(
    each.name for each in fields(ModelConfig) if each.name.startswith("lora_")
)}  # fmt: skip
"""Where nothing is trained, they have no meaning."""

HIDDEN = {"run": NOT_IN_A_RUN, "generate": OF_A_TRAINING, "recall": OF_A_TRAINING}

OPTION = re.compile(r"^  --(\w+)(?: \{(.*)\})?$")


def entries(text):
    """What the help says of each option: its choices, and its explanation without line breaks."""
    found, name = {}, None
    for line in text.splitlines():
        if match := OPTION.match(line):
            name = match[1]
            assert name not in found, f"{name} is explained twice"
            found[name] = (match[2] and match[2].split(", "), [])
        elif line.startswith("      ") and name:
            found[name][1].append(line.strip())
        else:  # a heading
            name = None
    return {name: (choices, " ".join(lines)) for name, (choices, lines) in found.items()}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_all_explains_every_option(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    explained = entries(help_of(capsys, command, "--help-all"))
    expected = {each.name: (kind, each) for kind in OPTIONS[command] for each in fields(kind) if each.init}
    for name in HIDDEN.get(command, ()):
        expected.pop(name)
    assert explained.keys() == expected.keys()
    for name, (kind, each) in expected.items():
        choices, said = explained[name]
        of_ours = [base for base in kind.__mro__ if base.__module__.startswith("trl_larpo")]
        if any(name in vars(base).get("__annotations__", ()) for base in of_ours):
            # Under its own name, its own text, and behind it nothing but the default
            ours = " ".join(each.metadata["help"].replace("%%", "%").split())
            assert len(ours) > 10 and re.fullmatch(re.escape(ours) + r"( \[.+\])?", said), name
            if isinstance(each.default, int | float | str) and not isinstance(each.default, bool) and each.default:
                assert said.endswith(f" [{each.default}]"), name
            assert choices == (each.metadata.get("choices") and [*map(str, each.metadata["choices"])]), name
        else:
            assert len(said) > 10, name


@pytest.mark.parametrize("command", OPTIONS)
def test_help_fits_two_screens(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    short, full = help_of(capsys, command, "--help"), help_of(capsys, command, "--help-all")
    assert short.count("\n") <= 100 and max(map(len, short.splitlines())) <= 100
    assert "…" not in short and short.startswith(f"usage: larpo {command} [--config FILE.yaml]")
    lines = re.findall(r"^  --(\w+)(.*)", short, re.MULTILINE)
    assert {name for name, _ in lines} <= entries(full).keys()
    assert all(len(line.strip()) > 3 for _, line in lines)


def test_help_needs_no_yaml_file_and_is_not_changed_by_one(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    expected = help_of(capsys, "run", "--help")
    assert max(map(len, expected.splitlines())) <= 80
    (tmp_path / "run.yaml").write_text(f"server_command: vllm serve {'x' * 80}\nreward_funcs: [a:b, c:d]\n")
    for words in (["--config", str(tmp_path / "run.yaml")], ["--config", "nowhere.yaml"], ["--small"]):
        with pytest.raises(SystemExit):
            cli.main(["run", *words, "--help"])
        assert capsys.readouterr().out == expected
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert help_of(capsys, "run", "--help") == ""


def test_an_option_in_place_of_a_command(capsys):
    assert cli.main(["--help-all"]) == 2
    assert "a command comes first" in capsys.readouterr().err
    assert cli.main(["report"]) == 2
    assert "(`larpo report --help` explains" in capsys.readouterr().err


@pytest.mark.skipif(not tiny.HAS_ONLINE, reason="some are of `larpo online`, which needs TRL 1.16")
def test_lines_of_the_help_are_of_options_that_exist():
    known = {each.name for kinds in OPTIONS.values() for kind in kinds for each in fields(kind)}
    lines = [name for group in option_help.GROUPS.values() for name in group]
    further = [name for group in option_help.FURTHER.values() for name in group]
    assert len(set(lines + further)) == len(lines + further) and set(lines + further) <= known
    assert option_help.FURTHER.keys() <= option_help.GROUPS.keys()


def test_commands_are_listed(capsys):
    assert cli.main([]) == 0
    assert "train" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("trl-larpo 0.")


BAD_COMMANDS = {
    "unknown flag": (["--loss_tpye", "listmle"], "Unknown option `--loss_tpye`. Did you mean `--loss_type`?"),
    "unknown loss": (["--loss_type", "listml"], "Did you mean 'listmle'?"),
    "wrong type": (["--beta", "strong"], "argument --beta: invalid float value: 'strong'"),
    "missing file": (["--dataset_name", "nowhere.jsonl"], "There is no file or folder 'nowhere.jsonl'"),
    "missing model": (["--model_name_or_path", "./nowhere"], "`model_name_or_path` is './nowhere'"),
    "missing split": (
        ["--dataset_train_split", "best"],
        "`dataset_train_split` is 'best', but the data has only: train",
    ),
    "no test split": (["--eval_strategy", "steps"], "`dataset_test_split` is 'test', but the data has only: train"),
    "option of pairs": (["--ld_alpha", "0.5"], "`ld_alpha=0.5` has no meaning on lists"),
    "stray word": (["listmle"], "Unexpected argument 'listmle'"),
    "weights": (["--loss_weights", "1", "2"], "`loss_weights` must have the same length as `loss_type`"),
    "accelerate config": (["--accelerate_config", "zero9"], "Accelerate config zero9 is neither a file"),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_mistakes_are_one_line(yaml_file, capsys, name):
    flags, message = BAD_COMMANDS[name]
    assert cli.main(["train", "--config", str(yaml_file), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("larpo: error: ")
    assert message in error


@pytest.mark.parametrize(
    "text, message",
    [
        ("loss_tpye: listmle\n", "Unknown option `loss_tpye` in the YAML file. Did you mean `--loss_type`?"),
        ("- a\n- b\n", "must contain a YAML mapping"),
        ("a: [1\n", "while parsing a flow sequence"),
        ("model_name_or_path: m\noutput_dir: o\nuse_cpu: true\n", "No data: give `dataset_name`"),
        ("output_dir: o\nuse_cpu: true\n", "No model: give `model_name_or_path`"),
    ],
)
def test_mistakes_in_yaml_are_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert cli.main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_missing_yaml(capsys):
    assert cli.main(["train", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert cli.main(["train", "--config"]) == 2
    assert "`--config` needs the path of a YAML file" in capsys.readouterr().err


def run(*command, **variables):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


LAUNCHES = "num_processes: 1\nnum_machines: 1\nmixed_precision: no\ndynamo_backend: no\ncpu: true\n"


@pytest.mark.slow
def test_options_of_accelerate_in_the_yaml_file_launch_once(yaml_file, tmp_path):
    yaml_file.write_text(f"{yaml_file.read_text()}max_steps: 1\n{LAUNCHES}".replace("max_steps: 4\n", ""))
    (tmp_path / "sitecustomize.py").write_text(  # else a process that launches itself would do so without end
        "import os\ndepth = os.environ['DEPTH'] = os.environ.get('DEPTH', '') + 'x'\n"
        f"open({str(tmp_path / 'starts')!r}, 'a').write(depth + '\\n')\nif len(depth) > 2: os._exit(99)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = run(sys.executable, "-m", "trl_larpo", "train", "--config", str(yaml_file), PYTHONPATH=path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert max((tmp_path / "starts").read_text().split()) == "xx"
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", None])
def test_a_launched_process_leaves_what_launched_it_out(tmp_path, monkeypatch, variable):
    (tmp_path / "a.yaml").write_text(f"use_fsdp: false\n{LAUNCHES}")
    words = ["--config", str(tmp_path / "a.yaml"), "--dynamo_mode", "default"]
    options = (words, (ScriptArguments,))
    _, from_config, from_flags = parse_options(*options, command="train", description="", launchable=True)
    expected = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu"
    assert (" ".join(from_config), from_flags) == (expected, ["--dynamo_mode", "default"])
    if variable:
        monkeypatch.setenv(variable, "0")
    else:
        monkeypatch.setenv("LARPO_LAUNCHER", f"{os.getppid()}@{socket.gethostname()}")
    _, from_config, from_flags = parse_options(*options, command="train", description="", launchable=True)
    assert (from_config, from_flags) == ([], ["--dynamo_mode", "default"])


def test_each_option_goes_to_the_one_it_belongs_to(monkeypatch):
    started = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", started.append)
    monkeypatch.setattr("trl_larpo.arguments.mark_launcher", lambda: None)
    argv = ["--config", "a.yaml", "--num_processes", "2", "--max_steps", "2"]
    assert launch_training("train", argv, ["--num_processes", "1", "--cpu"], ["--num_processes", "2"]) == 0
    [options] = started
    assert options.num_processes == 2 and options.cpu is True
    assert options.training_script_args == ["train", "--config", "a.yaml", "--max_steps", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("through", ["accelerate launch", "larpo train"])
def test_launches_through_accelerate(yaml_file, tmp_path, through):
    launch = [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--cpu",
    ]
    train = ["train", "--config", str(yaml_file), "--max_steps", "1"]
    if through == "accelerate launch":
        result = run(sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "trl_larpo", *train)
    else:
        result = run(sys.executable, "-m", "trl_larpo", *train, *launch)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").exists()
