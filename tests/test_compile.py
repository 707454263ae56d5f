"""torch.compile: the numbers of eager mode, and no compiling once a few batches of other sizes have passed."""

import pytest
import tiny
import torch._dynamo
from torch._dynamo.utils import counters
from trajectories import assert_close
from transformers import TrainerCallback

pytestmark = pytest.mark.slow

STEADY = 4  # steps, after which nothing is compiled any more


class GraphsCompiled(TrainerCallback):
    def __init__(self):
        self.after_step = []

    def on_step_end(self, args, state, control, **kwargs):
        self.after_step.append(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_compiled_lists(trained, chunk_size):
    torch._dynamo.reset()
    counters.clear()
    graphs = GraphsCompiled()
    options = {"max_steps": 8, "per_device_train_batch_size": 2, "candidate_chunk_size": chunk_size}
    lists = tiny.lists(long_prompts=True)
    eager = trained(lists, options)
    # Not the default backend, which makes and compiles C++ for half a minute a graph
    compiled = trained(
        lists, options | {"torch_compile": True, "torch_compile_backend": "aot_eager"}, callbacks=[graphs]
    )
    assert_close(compiled, eager, ("loss", "grad_norm"), rtol=1e-4, atol=1e-5)
    assert graphs.after_step[0] > 0  # something is compiled
    assert graphs.after_step[STEADY - 1] == graphs.after_step[-1], graphs.after_step
