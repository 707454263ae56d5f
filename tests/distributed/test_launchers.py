"""Two processes train as one does: ragged lists, under DDP, DeepSpeed ZeRO and FSDP2, with gloo on a CPU."""

import importlib.util

import pytest
from compare_launchers import LAUNCHERS, TORCHRUN, largest_differences, result_of, run, start_processes, steps_of

pytestmark = pytest.mark.slow

# Name: (options of one process, what two processes have in place of them). `like`: the run it must equal
SETS = {
    "lambdarank": {"loss_type": "lambdarank"},
    "listmle-lora": {"loss_type": "listmle", "lora": True},
    "pairwise": {"loss_type": "pairwise"},
    "contrastive": {"loss_type": "contrastive", "sync_ref_model": True, "ref_model_sync_steps": 2},
    "dropped": {"num_rows": 10, "dataloader_drop_last": True},  # two epochs, whose incomplete last batch is left out
}
VARIANTS = {
    "accumulation": ("lambdarank", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "lora-accumulation": ("listmle-lora", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "precomputed": ("pairwise", {"precompute_ref_log_probs": True}),
    "chunks": ("lambdarank", {"candidate_chunk_size": 2}),
    "checkpointing": ("lambdarank", {"gradient_checkpointing": True}),
    "separate rows": ("lambdarank", {"shared_prompt": "off"}),
}
SMALL_SETS = ("lambdarank", "lora-accumulation", "precomputed")
"""What depends on how a launcher is configured. Launchers that differ from another by that alone get no more."""

JSON = ("ZeRO-2 JSON", "ZeRO-3 JSON", "ZeRO-3 offload")

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
    run(tiny_model, folder, {name: options | {"per_device_train_batch_size": 4} for name, options in SETS.items()})
    return folder


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
    options = {name: of_set for name, (_, of_set) in sets.items()} | alone
    run(tiny_model, tmp_path, {name: BATCH | of_set for name, of_set in options.items()}, launcher)
    for name, (like, _) in sets.items():
        check(launcher, one_process, tmp_path, like, name)
    if "odd" in alone:  # its incomplete batches stop nobody
        steps = steps_of(tmp_path, "odd")
        assert len(steps) == 6 and all(0 < step["loss"] < 20 for step in steps)
    if "saved" in alone:  # a checkpoint continues the same trajectory, in new processes
        resumed = SAVED | {"resume_from_checkpoint": str(tmp_path / "saved" / "checkpoint-3"), "save_strategy": "no"}
        run(tiny_model, tmp_path, {"resumed": BATCH | resumed}, launcher)
        differences = largest_differences(tmp_path, tmp_path, "saved", "resumed")
        assert all(x <= 1e-5 for x in differences.values()), differences


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
    for key in ("eval_loss", "eval_ranking/ndcg", "eval_list_size", "eval_rewards/margins"):
        assert evaluations[1][key] == pytest.approx(evaluations[0][key], rel=1e-3, abs=1e-5), f"{name}: {key}"
