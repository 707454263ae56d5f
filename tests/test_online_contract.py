"""
What OnlineLarPOTrainer relies on in TRL's GRPOTrainer, and what happens with another TRL.
"""

import inspect
import sys

import pytest
import tiny
import trl
from datasets import Dataset

import trl_larpo
from trl_larpo import cli

ATTRIBUTES_OF_GRPO = [
    "_buffered_inputs", "_get_per_token_logps_and_entropies", "_metrics", "_step", "_tokenizer", "aux_loss_enabled",
    "eos_token_ids", "is_deepspeed_enabled", "is_fsdp_enabled", "multi_objective_aggregation", "num_generations",
    "num_generations_eval", "num_iterations", "ref_model", "reward_func_names", "reward_weights",
    "router_aux_loss_coef",
]  # fmt: skip


@pytest.mark.skipif(not tiny.HAS_ONLINE, reason="OnlineLarPOTrainer needs TRL 1.16")
def test_attributes_of_a_grpo_trainer(tiny_model, config):
    from trl_larpo import OnlineLarPOTrainer
    from trl_larpo.training.online_config import _OF_GRPO_LOSS

    def reward(completions, **columns):
        return [0.0] * len(completions)

    args = config(trl.GRPOConfig, num_generations=2)
    prompts = Dataset.from_dict({"prompt": ["why"] * 2})
    trainer = trl.GRPOTrainer(model=tiny_model, reward_funcs=reward, args=args, train_dataset=prompts)
    missing = [name for name in ATTRIBUTES_OF_GRPO if not hasattr(trainer, name)]
    assert not missing, f"GRPOTrainer no longer has {missing}"
    sampler = trainer._get_train_sampler()
    assert sampler.shuffle is True and sampler.generator.initial_seed() == args.seed
    found = list(inspect.signature(trl.GRPOTrainer.__init__).parameters)
    ours = inspect.signature(OnlineLarPOTrainer.__init__).parameters.values()
    assert found == [each.name for each in ours if each.kind is not each.KEYWORD_ONLY]
    batch = trainer._generate_and_score_completions([{"prompt": "why"}] * 2)
    assert batch["prompt_ids"].shape == batch["prompt_mask"].shape and len(batch["completion_mask"]) == 2
    options = inspect.signature(trl.GRPOConfig).parameters
    assert set(_OF_GRPO_LOSS) <= set(options), "GRPOConfig no longer has some options of its loss"


@pytest.mark.parametrize(
    "version, method, reason",
    [
        ("1.15.0", None, "its GRPOTrainer is another one"),
        ("1.17.2", None, "its GRPOTrainer is another one"),
        ("1.16.0", "_calculate_rewards", "`GRPOTrainer._calculate_rewards` is missing"),
    ],
)
def test_only_online_training_needs_the_newest_trl(version, method, reason, monkeypatch):
    monkeypatch.setattr(trl, "__version__", version)
    if method is not None:
        monkeypatch.delattr(trl.GRPOTrainer, method)
    for module in ("online_config", "online_trainer"):
        monkeypatch.delitem(sys.modules, f"trl_larpo.training.{module}", raising=False)
    for name in ("OnlineLarPOConfig", "OnlineLarPOTrainer"):
        with pytest.raises(ImportError) as error:
            getattr(trl_larpo, name)
        for part in (f"TRL {version} is installed", reason, "pip install 'trl>=1.16,<1.17'", "Everything else works"):
            assert part in str(error.value)
    assert cli.main(["online", "--help"]) == 2
    for name in trl_larpo.__all__:
        assert getattr(trl_larpo, name) is not None
