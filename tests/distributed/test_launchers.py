"""Two processes train as one does: ragged lists, under DDP, DeepSpeed ZeRO and FSDP2, with gloo on a CPU."""

import importlib.util

import pytest
import torch
from compare_launchers import LAUNCHERS, TORCHRUN, largest_differences, result_of, run, start_processes, steps_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_larpo.training.checkpoints import check_optimizer, last_whole_checkpoint

pytestmark = pytest.mark.slow

# Name: (options of one process, what two processes have in place of them). `like`: the run it must equal
SETS = {
    "lambdarank": {"loss_type": "lambdarank"},
    "listmle-lora": {"loss_type": "listmle", "lora": True},
    "pairwise": {"loss_type": "pairwise"},
    "contrastive": {"loss_type": "contrastive", "sync_ref_model": True, "ref_model_sync_steps": 2},
    "kept-lora": {"loss_type": "listmle", "lora": True, "adapter": "adapter"},  # as in `larpo run`
    "dropped": {"num_rows": 10, "dataloader_drop_last": True},  # two epochs, whose incomplete last batch is left out
    "incomplete evaluation": {"max_steps": 2, "num_eval_rows": 5},  # its last batches are filled with lists it has had
}
VARIANTS = {
    "accumulation": ("lambdarank", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "lora-accumulation": ("listmle-lora", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "precomputed": ("pairwise", {"precompute_ref_log_probs": True}),
    "chunks": ("lambdarank", {"candidate_chunk_size": 2}),
    "checkpointing": ("lambdarank", {"gradient_checkpointing": True}),
    "separate rows": ("lambdarank", {"shared_prompt": "off"}),
    "lora in chunks": ("listmle-lora", {"candidate_chunk_size": 2}),
}
SMALL_SETS = ("lambdarank", "lora-accumulation", "precomputed")
"""What depends on how a launcher is configured. Launchers that differ from another by that alone get no more."""

JSON = ("ZeRO-2 JSON", "ZeRO-3 JSON", "ZeRO-3 offload")

WEIGHTS = "adapter_model.safetensors"

REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}

EXPECTED = {  # kind, stage of ZeRO, share of the weights that a process holds
    "DDP": ("MULTI_CPU", None, 1.0), "ZeRO-1": ("DEEPSPEED", 1, 1.0), "ZeRO-2": ("DEEPSPEED", 2, 1.0),
    "ZeRO-3": ("DEEPSPEED", 3, 0.5), "ZeRO-2 JSON": ("DEEPSPEED", 2, 1.0), "ZeRO-3 JSON": ("DEEPSPEED", 3, 0.5),
    "ZeRO-3 offload": ("DEEPSPEED", 3, 0.5), "FSDP2": ("FSDP", None, 0.5),
}  # fmt: skip


@pytest.fixture(scope="session")
def one_process(tiny_model, tmp_path_factory):
    """Folder with the results of one process."""
    folder = tmp_path_factory.mktemp("one-process")
    save_adapter(tiny_model, folder / "adapter")
    sets = {name: with_adapter(options, folder) for name, options in SETS.items()}
    run(tiny_model, folder, {name: options | {"per_device_train_batch_size": 4} for name, options in sets.items()})
    return folder


def with_adapter(options, folder):
    """The place of the adapter that a training starts from is that of one process."""
    return options | ({"adapter": str(folder / options["adapter"])} if "adapter" in options else {})


def save_adapter(model, folder):
    """A LoRA adapter that changes what the model says, with the tokenizer, as `larpo run` saves it."""
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights, std=0.1)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def needs_deepspeed(launcher):
    if launcher.startswith("ZeRO") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `pip install trl-larpo[deepspeed]`")


def sets_for(launcher) -> dict[str, tuple[str, dict]]:
    """Name: (the run of one process that it must equal, options)."""
    sets = {name: (name, options) for name, options in SETS.items()}
    sets |= {name: (like, SETS[like] | options) for name, (like, options) in VARIANTS.items()}
    if launcher == "ZeRO-1" or launcher in JSON:
        return {name: sets[name] for name in SMALL_SETS}
    if launcher in ("DDP", "ZeRO-2"):
        sets["reentrant"] = ("lambdarank", SETS["lambdarank"] | REENTRANT)
    return sets


# More of two processes, compared with nothing. 9 lists in batches of 4: the last batch of an epoch has one for two
ODD = {"num_rows": 9, "max_steps": 6}
SAVED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
ALONE = {"DDP": {"odd": ODD}, "ZeRO-3": {"odd": ODD, "saved": SAVED}, "FSDP2": {"saved": SAVED}}
BATCH = {"per_device_train_batch_size": 2}


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name not in JSON])
def test_two_processes_train_as_one(tiny_model, tmp_path, one_process, launcher):
    needs_deepspeed(launcher)
    sets, alone = sets_for(launcher), ALONE.get(launcher, {})
    options = {name: with_adapter(of_set, one_process) for name, (_, of_set) in sets.items()} | alone
    run(tiny_model, tmp_path, {name: BATCH | of_set for name, of_set in options.items()}, launcher)
    for name, (like, _) in sets.items():
        check(launcher, one_process, tmp_path, like, name)
    if "kept-lora" in sets:
        check_kept_adapter(one_process, tmp_path)
    if "odd" in alone:  # its incomplete batches stop nobody
        steps = steps_of(tmp_path, "odd")
        assert len(steps) == 6 and all(0 < step["loss"] < 20 for step in steps)
    if "saved" in alone:
        last = last_whole_checkpoint(tmp_path / "saved")
        assert last == str(tmp_path / "saved" / "checkpoint-6")
        check_optimizer(last, "FSDP" if launcher == "FSDP2" else "DeepSpeed")
        # It continues the same trajectory, in new processes
        resumed = SAVED | {"resume_from_checkpoint": str(tmp_path / "saved" / "checkpoint-3"), "save_strategy": "no"}
        run(tiny_model, tmp_path, {"resumed": BATCH | resumed}, launcher)
        differences = largest_differences(tmp_path, tmp_path, "saved", "resumed")
        assert all(x <= 1e-5 for x in differences.values()), differences


def check_kept_adapter(one_process, folder):
    """What `larpo run` does with an adapter that it keeps: scores with it, starts from it, and saves it alone."""
    logps = [result_of(where, "kept-lora")["logps"] for where in (one_process, folder)]
    assert logps[0].keys() == logps[1].keys()
    for name, expected in logps[0].items():
        assert logps[1][name] == pytest.approx(expected, rel=1e-5)
    start, before = (load_file(where / WEIGHTS) for where in (folder / "kept-lora-start", one_process / "adapter"))
    assert start.keys() == before.keys() and all(torch.equal(start[name], before[name]) for name in before)
    ends = [load_file(where / "kept-lora-end" / WEIGHTS) for where in (one_process, folder)]
    assert ends[0].keys() == ends[1].keys() == before.keys()
    for name, expected in ends[0].items():
        torch.testing.assert_close(ends[1][name], expected, rtol=1e-3, atol=1e-5)
        assert not torch.equal(expected, before[name])


def test_configurations_of_deepspeed_in_json(tiny_model, tmp_path, one_process):
    needs_deepspeed("ZeRO")
    cases = {f"{launcher} {name}": (launcher, *case) for launcher in JSON for name, case in sets_for(launcher).items()}
    options = {name: BATCH | of_set | LAUNCHERS[launcher][1] for name, (launcher, _, of_set) in cases.items()}
    start_processes(tiny_model, tmp_path, options, TORCHRUN)
    for name, (launcher, like, _) in cases.items():
        check(launcher, one_process, tmp_path, like, name)


def check(launcher, one_process, folder, like, name):
    """The launcher did what it is for, and two processes trained as one did."""
    kind, stage, share = EXPECTED[launcher]
    ran = result_of(folder, name)["distributed"]
    assert (ran["kind"], ran["zero_stage"], ran["processes"]) == (kind, stage, 2)
    if "lora" not in name:
        assert ran["share"] == pytest.approx(share, abs=0.05)
    differences = largest_differences(one_process, folder, like, name)
    limits = {"rewards/margins": 1e-3}  # differences of nearly equal numbers
    if "accumulation" in name:  # logs are means over micro-batches, as TRL's, which differ in candidates
        limits["completions/mean_length"] = 0.1
    assert all(x <= limits.get(key, 1e-4) for key, x in differences.items()), f"{name}: {differences}"
    evaluations = [result_of(*where)["evaluation"] for where in ((one_process, like), (folder, name))]
    of_lists = ("ranking/ndcg", "list_size", "rewards/margins", "completions/mean_length")
    for key in ("eval_loss", *(f"eval_{name}" for name in of_lists)):
        assert evaluations[1][key] == pytest.approx(evaluations[0][key], rel=1e-3, abs=1e-5), f"{name}: {key}"
