"""
Stand-ins for the recipes' models: with their chat templates, what is sampled is what is trained on, and ends where
sampling stops; Gemma 3 is loaded with its vision tower.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import trl
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, Gemma3Config

from trl_larpo.generation.in_process import encode_prompt, generate_completions
from trl_larpo.run import training_stages
from trl_larpo.run.small import byte_tokenizer
from trl_larpo.training.tokenization import tokenize_dataset

FOLDER = Path(trl.__file__).with_name("chat_templates")

# Of models whose template TRL does not have: the form that their cards describe
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
GEMMA = ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")

# Model: (template, special tokens, beginning, the tokenizer's end, the token that sampling stops at)
MODELS = {
    "zephyr-7b-sft-full": (ZEPHYR, ("<unk>", "<s>", "</s>"), None, "</s>", "</s>"),
    "Mistral-7B-Instruct-v0.2": (MISTRAL, ("<unk>", "<s>", "</s>"), "<s>", "</s>", "</s>"),
    "gemma-2-2b-it": ("gemma.jinja", GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "gemma-3-4b-it": ("gemma3.jinja", GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "Llama-3.1-8B-Instruct": ("llama3_1.jinja", LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "Qwen3-4B-Instruct-2507": ("qwen3_instruct_2507.jinja", QWEN, None, "<|im_end|>", "<|im_end|>"),
    "Qwen3-0.6B": ("qwen3.jinja", QWEN, None, "<|im_end|>", "<|im_end|>"),
}


@pytest.mark.parametrize("model", MODELS)
def test_what_is_sampled_is_what_is_trained_on(model):
    template, special, begin, end, stop = MODELS[model]
    if template.endswith(".jinja"):
        if not (FOLDER / template).is_file():
            pytest.skip(f"this TRL has no {template}")
        template = (FOLDER / template).read_text(encoding="utf-8")
    roles = {"pad_token": special[0], "eos_token": end} | ({"bos_token": begin} if begin else {})
    tokenizer = byte_tokenizer(template, special, **roles)
    arguments = {"enable_thinking": False} if model == "Qwen3-0.6B" else {}
    system_turn = [{"role": "system", "content": ""}] if model == "zephyr-7b-sft-full" else []
    prompt = [*system_turn, {"role": "user", "content": "Why is the sky blue?"}]
    texts = ["Because of scattering.", "It is not.\n\n- Look again."]
    row = {
        "prompt": prompt,
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "rewards": [1.0, 0.0],
    }
    row |= {"chat_template_kwargs": arguments} if arguments else {}
    data = Dataset.from_list([row])
    options = {"where": "lists", "eos_token": end, "max_length": None, "truncation_mode": "keep_start"}
    [trained] = tokenize_dataset(data, tokenizer, **options)
    sampled = encode_prompt(tokenizer, prompt, arguments)
    assert trained["prompt_ids"] == sampled
    assert begin is None or (sampled.count(tokenizer.bos_token_id) == 1 and sampled[0] == tokenizer.bos_token_id)
    assert tokenizer.decode(sampled).count("system") == (model in ("zephyr-7b-sft-full", "Llama-3.1-8B-Instruct"))
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    for text, ids in zip(texts, trained["completion_ids"], strict=True):
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids[: len(own) + 1] == [*own, stop_id]
        assert tokenizer.decode(ids[len(own) + 1 :]) in ("", "\n"), "what the template puts after a message"


@pytest.mark.parametrize("sees, error", [(True, None), (True, OSError("none there")), (False, None)])
def test_a_model_that_sees_is_saved_with_its_settings_of_images(tmp_path, monkeypatch, caplog, sees, error):
    def load(path, revision):
        assert (path, revision) == ("google/gemma-3-4b-it", "v2")
        if error is not None:
            raise error
        return SimpleNamespace(save_pretrained=lambda folder: (folder / "preprocessor_config.json").write_text("{}"))

    PartialState()  # which logging asks for
    monkeypatch.setattr(training_stages, "AutoProcessor", SimpleNamespace(from_pretrained=load))
    config = Gemma3Config() if sees else Gemma3Config().get_text_config()
    trainer = SimpleNamespace(model=SimpleNamespace(config=config), processing_class=tiny.tiny_tokenizer())
    training_stages.save_processor("google/gemma-3-4b-it", "v2", trainer, tmp_path)
    assert (tmp_path / "preprocessor_config.json").exists() == (sees and error is None)
    assert (tmp_path / "tokenizer.json").exists() == sees
    assert ("Copy `preprocessor_config.json` there" in caplog.text) == (error is not None)


@pytest.mark.slow
def test_gemma_3_is_trained_and_sampled_with_its_vision_tower(tmp_path, trained):
    peft = pytest.importorskip("peft")
    if tiny.TRANSFORMERS_4:
        pytest.skip("transformers 4 asks Gemma 3 for the types of its tokens")
    tokenizer = tiny.tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = sizes | {
        "vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8,
        "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "initializer_range": 0.3,
    }  # fmt: skip
    vision = sizes | {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    trainer = trained(tiny.lists(), model=str(tmp_path), peft_config=settings, processing_class=tokenizer)
    assert "Gemma3ForConditionalGeneration" in str(type(trainer.model.get_base_model()))
    moved = {name: bool(weights.any()) for name, weights in trainer.model.named_parameters() if "lora_B" in name}
    assert {seen for name, seen in moved.items() if "language_model" in name} == {True}
    assert {seen for name, seen in moved.items() if "vision_tower" in name} == {False}, "text has no use for it"
    [samples] = generate_completions(
        trainer.model.get_base_model(), tokenizer, ["Why?"], num_samples=2, max_new_tokens=4
    )
    assert all(sample.num_tokens > 0 for sample in samples)
