"""Sampling in little memory: layer by layer, few prompts at a time, and with half the batch when there is no more."""

import gc
import weakref

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from trl_larpo import LarPOError
from trl_larpo.generation import batch_memory, continuous_batching
from trl_larpo.generation.in_process import generate_completions

PROMPTS = ["a", "the dog runs", "is", "a much longer prompt than the others", "why", "so"]


@pytest.fixture
def sample(tmp_path):
    """Samples with a new tiny model (`sample.model`), also with one that is taken for one without a cache."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny.save_tiny_model(tmp_path, initializer_range=1.0))

    def run(**options):
        options = {"num_samples": 3, "max_new_tokens": 12, "batch_size": 8} | options
        return generate_completions(model, tiny.tiny_tokenizer(), PROMPTS, **options)

    run.model = model
    return run


@pytest.fixture
def memory_for(sample, monkeypatch):
    """Lets the model run out of memory with more rows than this; returns how many rows its calls had."""

    def limit(num_rows):
        forward, sizes = sample.model.forward, []

        def limited(input_ids=None, **arguments):
            sizes.append(len(input_ids))
            if len(input_ids) > num_rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(input_ids=input_ids, **arguments)

        monkeypatch.setattr(sample.model, "forward", limited)
        return sizes

    return limit


@pytest.mark.parametrize("obstacle", [None, "it keeps a state"])
def test_out_of_memory_it_goes_on_with_half_the_batch(sample, memory_for, monkeypatch, caplog, obstacle):
    monkeypatch.setattr(continuous_batching, "layer_obstacle", lambda model: obstacle)
    expected = sample(batch_size=2)
    sizes, ended = memory_for(3), []
    monkeypatch.setattr(continuous_batching, "_PREFILL_TOKENS", 20)  # so that it is not the prompts

    class Bar:
        format_dict = {"elapsed": 1.0}  # noqa: RUF012

        def update(self):
            ended.append(1)

        def set_postfix_str(self, *arguments, **named):
            pass

    assert sample(progress=Bar()) == expected
    assert max(sizes) > 3 and len(ended) == len(PROMPTS) * 3  # none is counted twice
    lowered = 4 if obstacle is None else 2  # of 4, the 3 of one prompt are in the batch
    assert f"Completions are sampled {lowered} at a time, fewer than `generation_batch_size`: memory" in caplog.text
    sizes.clear()
    assert sample() == expected and max(sizes) <= 3  # it is remembered


def test_memory_that_is_too_small_for_one_ends_it(sample, memory_for):
    memory_for(0)
    with pytest.raises(LarPOError, match=r"too small to sample one completion at a time: CUDA out of memory.* Lower"):
        sample()


def test_the_batch_is_lowered_to_what_fits(sample, memory_for, monkeypatch, caplog):
    expected, sizes = sample(batch_size=2), memory_for(1000)
    config = sample.model.config
    of_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    longest = len(tiny.tiny_tokenizer()(PROMPTS[3])["input_ids"]) + 12 + continuous_batching._ROOM
    monkeypatch.setattr(batch_memory, "_free_memory", lambda device: int(5.2 * of_token * longest / 0.8))
    assert sample() == expected
    assert max(sizes) == 5
    assert f"Completions of up to {longest} tokens, prompts included, are sampled 5 at a time" in caplog.text
    caplog.clear()
    assert sample() == expected and not caplog.text  # said once
    monkeypatch.setattr(batch_memory, "_free_memory", lambda device: 2**40)
    assert sample() == expected and max(sizes) == 8 and not caplog.text


def test_few_tokens_of_prompts_run_through_the_model_at_a_time(sample, monkeypatch):
    expected, shapes, forward = sample(batch_size=64), [], sample.model.forward

    def watched(input_ids=None, **arguments):
        shapes.append(input_ids.shape)
        return forward(input_ids=input_ids, **arguments)

    monkeypatch.setattr(sample.model, "forward", watched)
    assert sample(batch_size=64) == expected
    assert shapes[0][0] == len(PROMPTS)
    shapes.clear()
    monkeypatch.setattr(continuous_batching, "_PREFILL_TOKENS", 16)
    assert sample(batch_size=64) == expected
    of_prompts = [rows * length for rows, length in shapes if length > 1]
    assert len(of_prompts) > 2 and max(of_prompts[1:]) <= 16  # the longest prompt alone may have more


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made while it is on, now and at most; tensors that share memory count once."""

    def __init__(self):
        super().__init__()
        self.owners, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                if address not in self.owners:
                    self.owners[address], self.now = 0, self.now + size
                    self.most = max(self.most, self.now)
                self.owners[address] += 1
                weakref.finalize(tensor, self.release, address, size)
        return result

    def release(self, address, size):
        self.owners[address] -= 1
        if not self.owners[address]:
            del self.owners[address]
            self.now -= size


@pytest.mark.parametrize("leaving", [1, 6])
def test_rows_enter_and_leave_one_layer_at_a_time(leaving):
    # Keys and values of 8 layers: with all copied at once, twice as many bytes as they take
    layers, rows, length = 8, 12, 4000

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, past_key_values, **arguments):
            states = torch.zeros(len(input_ids), 1, input_ids.size(1), 2)
            for number in range(layers):
                past_key_values.update(states.clone(), states.clone(), number)
            logits = torch.zeros(len(input_ids), 1, 5)
            logits[:, :, 3] = 1.0
            return type("Output", (), {"logits": logits})

    settings = continuous_batching._Settings(max_new_tokens=4, end_ids={4}, pad_id=0, top_p=1.0)
    jobs = [continuous_batching.Job([1] * length, [0.0], torch.zeros(1, 4).numpy()) for _ in range(rows)]
    batch = continuous_batching._Batch(Model(), settings)
    of_layer = rows * length * 2 * 2 * 4
    with LiveMemory() as memory:
        for job in jobs:
            batch.enter([(job, [0])])
        gc.collect()
        assert memory.now < 1.1 * layers * of_layer
        assert memory.most < memory.now + 1.5 * of_layer
        for _, _, ids in batch.rows[:leaving]:
            ids.append(4)
        before, memory.most = memory.now, memory.now
        assert len(batch.leave()) == leaving
        assert memory.most < before + 1.0 * of_layer
        assert memory.now < before * (1 - leaving / rows) + 0.1 * of_layer
