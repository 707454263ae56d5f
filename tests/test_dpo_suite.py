"""
What TRL checks of DPOTrainer on text models, with LarPOTrainer and LarPOConfig in its place and the default loss.

Loss types, data formats, precomputed references, synchronised references, evaluation and the numbers themselves are
compared with DPOTrainer in test_trainer_pairs.py.
"""

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from trajectories import trajectory, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_larpo import LarPOConfig, LarPOTrainer

pytestmark = pytest.mark.slow


def assert_every_weight_moved(trainer, before):
    for name, old in before.items():
        assert not torch.equal(old, trainer.model.get_parameter(name)), name


def train_from(model, args, **kwargs):
    kwargs = {"train_dataset": tiny.pairs()} | kwargs
    trainer = LarPOTrainer(model=model, args=args, **kwargs)
    before = weights_of(trainer.model)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None
    return trainer, before


def test_without_args(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = LarPOTrainer(model=tiny_model, train_dataset=tiny.pairs())
    assert isinstance(trainer.args, LarPOConfig)
    assert trainer.args.output_dir.endswith("-LarPO")


@pytest.mark.parametrize(
    "dataset",
    [
        tiny.pairs(),
        tiny.pairs(conversational=True),
        tiny.pairs(implicit_prompt=True),
        tiny.lists(),
        tiny.lists(conversational=True),
        tiny.lists(with_rewards=False),
    ],
    ids=["pairs", "conversations", "implicit prompt", "lists", "lists of conversations", "lists best first"],
)
def test_data_formats(tiny_model, config, dataset):
    assert_every_weight_moved(*train_from(tiny_model, config(), train_dataset=dataset))


def test_model_and_reference_as_objects(tiny_model, config):
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    trainer, before = train_from(model, config(), ref_model=reference)
    assert trainer.ref_model is reference
    assert_every_weight_moved(trainer, before)
    with pytest.raises(ValueError, match="cannot be the same object"):
        LarPOTrainer(model=model, ref_model=model, args=config(), train_dataset=tiny.pairs())


def test_model_init_kwargs(tiny_model, config):
    trainer, _ = train_from(tiny_model, config(model_init_kwargs={"dtype": "bfloat16"}))
    assert trainer.model.dtype == torch.bfloat16


@pytest.mark.parametrize("dataset", [tiny.pairs(), tiny.lists()], ids=["pairs", "lists"])
def test_bfloat16_weights(tiny_model, config, dataset):
    trainer, _ = train_from(tiny_model, config(model_init_kwargs={"dtype": "bfloat16"}), train_dataset=dataset)
    assert all(loss > 0 for [loss] in trajectory(trainer, "loss"))


@pytest.mark.parametrize("dataset", [tiny.pairs(), tiny.lists()], ids=["pairs", "lists"])
def test_tools(tiny_model, config, dataset):
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
    rows = [row | {"tools": tools} for row in (tiny.pairs(conversational=True) if "chosen" in dataset.column_names
                                              else tiny.lists(conversational=True))]  # fmt: skip
    assert_every_weight_moved(*train_from(tiny_model, config(), train_dataset=Dataset.from_list(rows)))


@pytest.mark.parametrize("dataset", [tiny.pairs(), tiny.lists()], ids=["pairs", "lists"])
def test_padding_token_other_than_the_models(tiny_model, config, dataset):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = None
    trainer, _ = train_from(tiny_model, config(), train_dataset=dataset, processing_class=tokenizer)
    assert trainer.data_collator.pad_token_id == tokenizer.eos_token_id == trainer.model.config.pad_token_id


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated")
def test_pad_token_option(tiny_model, config):
    trainer, _ = train_from(tiny_model, config(pad_token=tiny.BOS), train_dataset=tiny.lists())
    assert trainer.data_collator.pad_token_id == trainer.processing_class.bos_token_id
    with pytest.raises(ValueError, match="not found in the vocabulary"):
        LarPOTrainer(model=tiny_model, args=config(pad_token="<nope>"), train_dataset=tiny.lists())


def test_padding_free_falls_back_as_in_trl(tiny_model, config, caplog):
    train_from(tiny_model, config(padding_free=True), train_dataset=tiny.lists())
    assert "`padding_free=True` is temporarily unavailable" in caplog.text


def test_compute_metrics_on_pairs_gets_logits(tiny_model, config):
    def compute_metrics(prediction):
        assert prediction.predictions.ndim == 3  # sequences, positions, vocabulary
        return {"my_metric": 0.123}

    trainer, _ = train_from(
        tiny_model,
        config(eval_strategy="steps", eval_steps=2),
        eval_dataset=tiny.pairs(num_rows=4),
        compute_metrics=compute_metrics,
    )
    assert any(entry.get("eval_my_metric") == 0.123 for entry in trainer.state.log_history)


def test_callbacks_and_optimizers(tiny_model, config):
    steps = []

    class Counter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer, _ = train_from(model, config(), callbacks=[Counter()], optimizers=(optimizer, None))
    assert steps == [1, 2, 3]
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_several_evaluation_sets(tiny_model, config, kind):
    sets = kind({"one": tiny.pairs(num_rows=4), "two": tiny.pairs(num_rows=6, seed=1)})
    trainer, _ = train_from(tiny_model, config(eval_strategy="steps", eval_steps=3), eval_dataset=sets)
    keys = set().union(*trainer.state.log_history)
    assert {"eval_one_loss", "eval_two_loss"} <= keys


@pytest.mark.parametrize("peft_kind", ["new adapter", "existing adapter"])
@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}], ids=str)
def test_peft_on_pairs(tiny_model, config, peft_kind, options):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    if peft_kind == "new adapter":
        trainer, before = train_from(tiny_model, config(learning_rate=0.1, **options), peft_config=lora)
    else:
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora)
        trainer, before = train_from(model, config(learning_rate=0.1, **options))
    for name, old in before.items():
        moved = not torch.equal(old, trainer.model.get_parameter(name))
        assert moved == ("lora" in name and ".ref." not in name), name


def test_sync_with_peft_is_refused_as_in_trl(tiny_model, config):
    peft = pytest.importorskip("peft")
    with pytest.raises(NotImplementedError, match="sync_ref_model"):
        LarPOTrainer(
            model=tiny_model,
            args=config(sync_ref_model=True),
            train_dataset=tiny.lists(),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM"),
        )


def test_streamed_pairs(tiny_model, config):
    assert_every_weight_moved(*train_from(tiny_model, config(), train_dataset=tiny.pairs().to_iterable_dataset()))


def test_evaluate_on_a_new_set_with_precomputed_reference_before_training(tiny_model, config):
    trainer = LarPOTrainer(
        model=tiny_model,
        args=config(precompute_ref_log_probs=True),
        train_dataset=tiny.lists(),
        eval_dataset=tiny.lists(),
    )
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.evaluate(tiny.pairs(seed=3))["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_tags(tiny_model, config):
    trainer = LarPOTrainer(model=tiny_model, args=config(), train_dataset=tiny.pairs())
    assert {"trl", "dpo"} <= set(trainer.model.model_tags)
