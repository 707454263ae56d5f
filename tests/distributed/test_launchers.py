"""Two processes train as one does: ragged lists, under DDP, DeepSpeed ZeRO and FSDP2, with gloo on a CPU."""

import importlib.util

import pytest
from compare_launchers import LAUNCHERS, largest_differences, result_of, run, steps_of

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
SECONDARY = ("ZeRO-1", "ZeRO-2 JSON", "ZeRO-3 JSON", "ZeRO-3 offload")
"""Launchers that differ from another by how they are configured: what depends on that is tested with them."""

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


def sets_for(launcher) -> dict:
    sets = {name: (name, options) for name, options in SETS.items()}
    sets |= {name: (like, SETS[like] | options) for name, (like, options) in VARIANTS.items()}
    if launcher in SECONDARY:
        return {name: sets[name] for name in ("lambdarank", "lora-accumulation", "precomputed")}
    if launcher in ("DDP", "ZeRO-2"):
        sets["reentrant"] = ("lambdarank", SETS["lambdarank"] | REENTRANT)
    return sets


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one(tiny_model, tmp_path, one_process, launcher):
    needs_deepspeed(launcher)
    sets = sets_for(launcher)
    batch = {"per_device_train_batch_size": 2}
    run(tiny_model, tmp_path, {name: batch | options for name, (_, options) in sets.items()}, launcher)
    kind, stage, share = EXPECTED[launcher]
    ran = result_of(tmp_path, "lambdarank")["distributed"]
    assert (ran["kind"], ran["zero_stage"], ran["processes"]) == (kind, stage, 2)
    assert ran["share"] == pytest.approx(share, abs=0.05)
    for name, (like, _) in sets.items():
        differences = largest_differences(one_process, tmp_path, like, name)
        limits = {"rewards/margins": 1e-3}  # differences of nearly equal numbers
        if "accumulation" in name:  # logs are means over micro-batches, as TRL's, which differ in candidates
            limits["completions/mean_length"] = 0.1
        assert all(x <= limits.get(key, 1e-4) for key, x in differences.items()), f"{name}: {differences}"
        evaluations = [result_of(*where)["evaluation"] for where in ((one_process, like), (tmp_path, name))]
        for key in ("eval_loss", "eval_ranking/ndcg", "eval_list_size", "eval_rewards/margins"):
            assert evaluations[1][key] == pytest.approx(evaluations[0][key], rel=1e-3, abs=1e-5), f"{name}: {key}"


@pytest.mark.parametrize("launcher", ["DDP", "ZeRO-3"])
def test_an_incomplete_last_batch_does_not_stop_anyone(tiny_model, tmp_path, launcher):
    needs_deepspeed(launcher)
    # 9 lists in batches of 4: the last batch of an epoch has one list for two processes
    run(tiny_model, tmp_path, {"odd": {"num_rows": 9, "per_device_train_batch_size": 2, "max_steps": 6}}, launcher)
    steps = steps_of(tmp_path, "odd")
    assert len(steps) == 6 and all(0 < step["loss"] < 20 for step in steps)


@pytest.mark.parametrize("launcher", ["ZeRO-3", "FSDP2"])
def test_a_checkpoint_continues_the_same_trajectory(tiny_model, tmp_path, launcher):
    needs_deepspeed(launcher)
    options = {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    resumed = options | {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-3"), "save_strategy": "no"}
    run(tiny_model, tmp_path, {"whole": options}, launcher)
    run(tiny_model, tmp_path, {"resumed": resumed}, launcher)
    differences = largest_differences(tmp_path, tmp_path, "whole", "resumed")
    assert all(x <= 1e-5 for x in differences.values()), differences
