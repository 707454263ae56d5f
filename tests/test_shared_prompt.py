"""Shared prompts and chunks give what separate rows give, in every kind of model; some models cannot share prompts."""

import pytest
import tiny
import torch
import torch._dynamo
from flash_stand_in import FLASH, flash_attention
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from trajectories import trajectory
from transformers import AutoConfig, AutoModelForCausalLM

from trl_larpo import ConfigError, DataCollatorForCandidateLists, LarPOTrainer
from trl_larpo.training import scorer
from trl_larpo.training.attention import sharing_obstacle
from trl_larpo.training.passes import Layout, passes_in_chunks, whole_pass

WINDOW = {"sliding_window": 5}
SHARING = {
    "llama": {},
    "llama-eager": {"attn_implementation": "eager"},
    "llama-flash": {"attn_implementation": FLASH},
    "mistral-window-flash": WINDOW | {"attn_implementation": FLASH},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "mistral-window": WINDOW,
    "mistral-window-eager": WINDOW | {"attn_implementation": "eager"},
    "gpt_neox": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512},
    "phi3": {"head_dim": 8},
    "phi3-window": WINDOW,
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "attn_implementation": "eager"} | WINDOW,
    "gemma3_text": {"head_dim": 8} | WINDOW,
    "olmo2": {},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "attn_implementation": "eager"}
    | WINDOW,
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
FALLING_BACK = {
    "mamba": {"state_size": 4},
    "bloom": {"n_layer": 2, "n_head": 2},
    "falcon": {"alibi": True, "multi_query": False},
}
LISTS = tiny.lists(num_rows=3, max_size=4, long_prompts=True)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Folder of a tiny model, made once for each name in the tables above."""
    folders = {}

    def make(name):
        if name not in folders:
            options = {k: v for k, v in (SHARING | FALLING_BACK)[name].items() if k != "attn_implementation"}
            folders[name] = tiny.save_tiny_model(tmp_path_factory.mktemp(name), name.split("-")[0], **options)
        return folders[name]

    return make


@pytest.fixture
def first_step(model_of, config):
    """Loss, scores and gradients of a model on one batch of lists, with some options."""

    @flash_attention()
    def run(name, dataset=LISTS, reference=None, **options):
        implementation = (SHARING | FALLING_BACK)[name].get("attn_implementation")
        kwargs = {"attn_implementation": implementation} if implementation else {}
        trainer = LarPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_of(name), dtype=torch.float32, **kwargs),
            # A reference that differs, so that scores are not all zero
            ref_model=AutoModelForCausalLM.from_pretrained(reference or model_of(name), dtype=torch.float32, **kwargs),
            args=config(**({"beta": 0.5, "loss_type": "lambdarank", "router_aux_loss_coef": 0.0} | options)),
            train_dataset=dataset,
        )
        with torch.no_grad():
            for parameter in trainer.ref_model.parameters():
                parameter.mul_(1.1)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
        trainer.model.train()
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        loss.backward()
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        return loss.detach(), outputs["scores"], gradients

    return run


def assert_same(found, expected, rtol):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=rtol, atol=rtol * expected[1].abs().max().item())
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        error = (found[2][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < rtol, f"gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("name", ["llama", *(pytest.param(x, marks=pytest.mark.slow) for x in SHARING if x != "llama")])
def test_sharing_equals_separate_rows(first_step, name):
    if name == "gemma3_text" and tiny.TRANSFORMERS_4:
        pytest.skip("TRL's fused head does not find the backbone of this model in transformers 4")
    separate = first_step(name, shared_prompt="off")
    assert separate[1].abs().max() > 0.1
    shared = first_step(name, shared_prompt="on")
    assert_same(shared, separate, 1e-4)
    for size in (1, 2, 100):
        assert_same(first_step(name, shared_prompt="on", candidate_chunk_size=size), shared, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_flex_attention_over_packed_lists(model_of, config, name, monkeypatch):
    # Forward alone and not compiled: on a CPU FlexAttention has no backward pass, and such masks do not compile
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda query, key, value, training=False, **kwargs: flex_attention(query, key, value, **kwargs),
    )
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask",
        lambda *args, **kwargs: create_block_mask(*args, **kwargs | {"_compile": False}),
    )
    logps = []
    for implementation, options in (
        ("sdpa", {"shared_prompt": "off"}),
        ("flex_attention", {"shared_prompt": "on"}),
        ("flex_attention", {"shared_prompt": "on", "candidate_chunk_size": 2}),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            model_of(name), dtype=torch.float32, attn_implementation=implementation
        )
        trainer = LarPOTrainer(model=model, args=config(**options), train_dataset=LISTS)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
        with torch.no_grad():
            logps.append(trainer._policy_scorer(trainer.model, batch).logps)
    for found in logps[1:]:
        torch.testing.assert_close(found, logps[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_flex_attention_is_not_compiled_for_each_length(model_of, monkeypatch):
    compiled = torch.compile(flex_attention, backend="eager")  # as transformers compiles it, but for the machine code
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda query, key, value, training=False, **kwargs: compiled(query, key, value, **kwargs),
    )
    torch._dynamo.reset()
    counters.clear()
    model = AutoModelForCausalLM.from_pretrained(model_of("llama"), attn_implementation="flex_attention")
    graphs = []
    for lengths in ([40, 30], [100, 100], [150, 120, 99], [300, 10], [700, 50, 50]):  # packed: 128 to 896 tokens
        prompt, *completions = lengths
        example = {"prompt_ids": [5] * prompt, "completion_ids": [[6] * n for n in completions]}
        batch = DataCollatorForCandidateLists(pad_token_id=0)([example | {"relevance": [0.0] * len(completions)}])
        [of_pass] = whole_pass(model, batch, Layout.SHARED)
        [call] = of_pass.calls
        with torch.no_grad():
            model(call.rows.input_ids, attention_mask=call.mask, position_ids=call.rows.positions, use_cache=False)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 1 and graphs[-1] == graphs[1], graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", FALLING_BACK)
def test_other_models_fall_back_and_stay_right(first_step, name, caplog):
    with caplog.at_level("INFO", logger="trl_larpo"):
        found = first_step(name)
    assert [record.levelname for record in caplog.records if "a row for each completion" in record.message] == [
        "WARNING"
    ] * 2
    assert_same(found, first_step(name, shared_prompt="off"), 1e-6)
    with pytest.raises(ConfigError, match="`shared_prompt='on'` is not possible, because"):
        first_step(name, shared_prompt="on")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("shared_prompt", ["on", "off"])
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {}], ids=["checkpointed", "plain"])
def test_chunks_equal_the_whole(first_step, name, shared_prompt, options):
    whole = first_step(name, shared_prompt=shared_prompt)
    for size in (1, 3, 8):
        found = first_step(name, shared_prompt=shared_prompt, candidate_chunk_size=size, **options)
        assert_same(found, whole, 1e-5)


@pytest.mark.parametrize("shared_prompt", ["on", "off"])
def test_chunks_are_padded_to_a_multiple(first_step, monkeypatch, shared_prompt):
    whole, lengths = first_step("llama", shared_prompt=shared_prompt), []

    def recorded(*args, **kwargs):
        passes = passes_in_chunks(*args, **kwargs)
        for of_pass in passes:
            lengths.extend(call.rows.input_ids.size(1) for call in of_pass.calls)
            lengths.extend([] if of_pass.prompts is None else [of_pass.prompts.input_ids.size(1)])
        return passes

    monkeypatch.setattr(scorer, "passes_in_chunks", recorded)
    found = first_step("llama", shared_prompt=shared_prompt, candidate_chunk_size=2, pad_to_multiple_of=16)
    assert lengths and all(length % 16 == 0 for length in lengths)
    assert_same(found, whole, 1e-5)


@pytest.mark.slow
def test_long_prompts_are_shared_after_truncation(first_step):
    separate = first_step("llama", shared_prompt="off", max_length=30)
    assert_same(first_step("llama", shared_prompt="on", max_length=30), separate, 1e-4)
    assert not torch.equal(separate[1], first_step("llama", shared_prompt="off")[1])


def test_what_a_mask_cannot_do_is_not_shared(model_of):
    model = AutoModelForCausalLM.from_pretrained(model_of("llama"))
    assert sharing_obstacle(model) is None
    model.config._attn_implementation = "flash_attention_2"
    assert sharing_obstacle(model) is None  # variable lengths in place of a mask
    model.config._attn_implementation = "paged|eager"
    assert "takes neither a mask nor variable lengths" in sharing_obstacle(model)
    model.config._attn_implementation = "sdpa"
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in sharing_obstacle(model)


@pytest.mark.slow
def test_prompts_cut_at_the_start_are_not_shared(first_step, config):
    with pytest.raises(ConfigError, match="keep_end"):
        first_step("llama", shared_prompt="on", max_length=40, truncation_mode="keep_end")
    cut = {"max_length": 30, "truncation_mode": "keep_end"}
    assert_same(first_step("llama", **cut), first_step("llama", **cut, candidate_chunk_size=1), 1e-5)


def test_noise_that_depends_on_the_length_of_rows_is_that_of_separate_ones(trained, tiny_model, config):
    noisy = {"neftune_noise_alpha": 5.0}
    automatic, separate, quiet = (
        [loss for [loss] in trajectory(trained(LISTS, {"shared_prompt": "off"} | options), "loss")]
        for options in (noisy | {"shared_prompt": "auto"}, noisy, {})
    )
    assert automatic == pytest.approx(separate, rel=1e-5) and separate[2] != pytest.approx(quiet[2], rel=1e-3)
    with pytest.raises(ConfigError, match="`shared_prompt='on'` is not possible, because `neftune_noise_alpha`"):
        LarPOTrainer(model=tiny_model, args=config(shared_prompt="on", **noisy), train_dataset=LISTS)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"shared_prompt": "off"}, {"candidate_chunk_size": 2}])
def test_lora_and_load_balancing(trained, model_of, options):
    from peft import LoraConfig

    runs = [
        trained(
            LISTS,
            {"per_device_train_batch_size": 2, "router_aux_loss_coef": 0.01} | more,
            model=model_of("qwen3_moe"),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )
        for more in ({"shared_prompt": "off"}, options)
    ]
    for expected, found in zip(*(run.state.log_history[:3] for run in runs), strict=True):
        # Every token counts once in the load, the prompt's too, so shared prompts weigh less in it
        assert found["aux_loss"] == pytest.approx(expected["aux_loss"], rel=0.05)
        assert found["rewards/margins"] == pytest.approx(expected["rewards/margins"], rel=0.05, abs=1e-4)


def test_which_way_was_taken_is_logged_once(first_step, caplog):
    with caplog.at_level("INFO", logger="trl_larpo"):
        first_step("llama")
    said = [record.message for record in caplog.records if "one row for each list" in record.message]
    assert ["Policy" in said[0], "Reference" in said[1], len(said)] == [True, True, 2]


@pytest.mark.slow
def test_a_trained_model_can_be_saved_and_trained_again(trained, tmp_path):
    first = trained(LISTS)
    first.save_model(str(tmp_path / "saved"))
    assert "larpo" not in (tmp_path / "saved" / "config.json").read_text()
    again = trained(LISTS, model=first.model)
    assert again.model is first.model
    loaded = trained(LISTS, model=str(tmp_path / "saved"))
    # The reference of a model in memory is what its path holds, so only the policy is the same
    for a, b in zip(*(run.state.log_history for run in (again, loaded)), strict=True):
        if "entropy" in a:
            assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-2)


def test_running_out_of_memory_names_the_option(tiny_model, config, monkeypatch):
    trainer = LarPOTrainer(model=tiny_model, args=config(candidate_chunk_size=3), train_dataset=LISTS)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer, "compute_loss", fail)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.train()
    assert "`candidate_chunk_size` is 3: as many candidates are in memory" in error.value.__notes__[0]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_list(tiny_model, config):
    def saved_bytes(size, chunk_size):
        """Bytes of what autograd keeps for the backward pass of a list, weights aside, and the most kept in it."""
        rows = [{"prompt": "why " * 20, "completions": [f" {i} blue {'dog ' * 20}" for i in range(size)]}]
        args = config(candidate_chunk_size=chunk_size, router_aux_loss_coef=0.0)
        trainer = LarPOTrainer(model=tiny_model, args=args, train_dataset=tiny.Dataset.from_list(rows))
        weights = {parameter.data_ptr() for parameter in trainer.model.parameters()}
        batch = trainer.data_collator([trainer.train_dataset[0]])
        kept, alive, most = {}, 0, 0

        class Kept:
            """Counts a storage for as long as autograd holds on to it."""

            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
                self.counts = tensor.data_ptr() not in weights and self.key not in kept
                if self.counts:
                    kept[self.key] = tensor.untyped_storage().nbytes()
                    alive += kept[self.key]
                    most = max(most, alive)

            def __del__(self):
                nonlocal alive
                if self.counts:
                    alive -= kept.pop(self.key)

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda entry: entry.tensor):
            trainer.compute_loss(trainer.model.train(), batch).backward()
        return most

    # The hidden states that the head reads stay: a layer's worth where there are only two
    hidden_states = 32 * 22 * AutoConfig.from_pretrained(tiny_model).hidden_size * 4
    assert saved_bytes(32, 2) - hidden_states <= 1.25 * saved_bytes(2, None)
    assert saved_bytes(32, None) > 8 * saved_bytes(2, None)
