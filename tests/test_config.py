"""LarPOConfig: defaults, refusals, and the way in from YAML and flags."""

import pytest
from transformers import HfArgumentParser
from trl import DPOConfig, TrlParser

from trl_larpo import ConfigError, LarPOConfig
from trl_larpo.losses import RANKING_LOSSES
from trl_larpo.run.options import RunTrainingConfig
from trl_larpo.training.ranking_options import DPO_LOSSES


def test_defaults_are_those_of_dpo_config_but_for_the_loss(tmp_path):
    ours, theirs = (cls(str(tmp_path), use_cpu=True) for cls in (LarPOConfig, DPOConfig))
    own = {
        "loss_type", "lambda_weight", "listnet_temperature", "shared_prompt", "candidate_chunk_size", "logging_dir",
        "truncated_completions", "per_token_scores", "reference_free", "target_margin", "normalize_comparisons",
        "listmle_top_k", "contrastive_positives",
    }  # fmt: skip
    names = set(LarPOConfig.__dataclass_fields__) - own
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert ours.loss_type == ["lambdarank"]
    assert ours.truncated_completions == "rank_last" and ours.per_token_scores is False


def test_defaults_of_a_run(tmp_path):
    args = RunTrainingConfig(str(tmp_path), use_cpu=True)
    assert args.per_token_scores is True and args.beta == 2.0
    assert RunTrainingConfig(str(tmp_path), use_cpu=True, per_token_scores=False).beta == 0.1
    assert RunTrainingConfig(str(tmp_path), use_cpu=True, beta=0.5).beta == 0.5


def test_shared_prompt_as_yaml_reads_it(tmp_path):
    for value, meaning in ((True, "on"), (False, "off"), ("on", "on"), ("auto", "auto")):
        assert LarPOConfig(str(tmp_path), use_cpu=True, shared_prompt=value).shared_prompt == meaning


def test_default_precision_suits_the_machine(tmp_path, monkeypatch):
    for available, expected in ((True, True), (False, False)):
        monkeypatch.setattr(
            "trl_larpo.training.ranking_options.is_torch_bf16_gpu_available", lambda value=available: value
        )
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda value=available: value)
        assert LarPOConfig(str(tmp_path)).bf16 is expected
    assert LarPOConfig(str(tmp_path), use_cpu=True).bf16 is True  # as DPOConfig


@pytest.mark.parametrize("name", [*RANKING_LOSSES, *sorted(DPO_LOSSES)])
def test_every_known_loss_is_accepted(tmp_path, name):
    assert LarPOConfig(str(tmp_path), loss_type=name, label_smoothing=0.1).loss_type == [name]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "lambdrank"}, r"'lambdrank', which is unknown. Did you mean 'lambdarank'\?"),
        ({"loss_type": ["listmle", "nonsense"]}, "'nonsense', which is unknown. Ranking losses: pairwise"),
        ({"loss_type": []}, "`loss_type` is empty"),
        ({"lambda_weight": "mrr"}, "`lambda_weight` is 'mrr'; it must be one of"),
        (
            {"lambda_weight": "ndcg", "loss_type": "listmle"},
            "`lambda_weight='ndcg'` belongs to 'lambdarank'",
        ),
        (
            {"listnet_temperature": 0.0, "loss_type": "listnet"},
            "`listnet_temperature` is 0.0; it must be greater than 0",
        ),
        ({"listnet_temperature": 0.5}, "`listnet_temperature=0.5` belongs to 'listnet'"),
        ({"f_divergence_type": "kl"}, "`f_divergence_type` is 'kl'; it must be 'reverse_kl'"),
        ({"candidate_chunk_size": 1, "neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` scales its noise by"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        LarPOConfig(str(tmp_path), **options)


def test_weights_must_match_losses(tmp_path):
    with pytest.raises(ValueError, match="loss_weights"):
        LarPOConfig(str(tmp_path), loss_type=["listmle", "sft"], loss_weights=[1.0])


@pytest.mark.parametrize("parser_cls", [HfArgumentParser, TrlParser])
def test_flags(tmp_path, parser_cls):
    flags = [
        "--output_dir",
        str(tmp_path),
        "--loss_type",
        "listmle",
        "sft",
        "--loss_weights",
        "1",
        "0.1",
        "--beta",
        "0.2",
    ]
    [config] = parser_cls(LarPOConfig).parse_args_into_dataclasses(flags)
    assert (config.loss_type, config.loss_weights, config.beta) == (["listmle", "sft"], [1.0, 0.1], 0.2)


def test_a_dictionary_on_the_command_line_beside_chunks(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--candidate_chunk_size", "1"]
    flags += ["--gradient_checkpointing_kwargs", '{"use_reentrant": false}']
    [config] = TrlParser(LarPOConfig).parse_args_into_dataclasses(flags)
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_yaml_and_flags_that_win_over_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nloss_type: lambdarank\nlambda_weight: ndcg\nlearning_rate: 5e-7\nbeta: 0.3\n"
    )
    [config] = TrlParser(LarPOConfig).parse_args_and_config(["--config", str(path), "--beta", "0.4"])
    assert (config.loss_type, config.lambda_weight, config.learning_rate, config.beta) == (
        ["lambdarank"],
        "ndcg",
        5e-7,
        0.4,
    )
