"""The CPU's head gives the values and gradients of TRL's, and of a plain log-softmax."""

import pytest
import torch
from trl.trainer.utils import _ChunkedLogProbFunction

from trl_larpo.training.cpu_head import CPULogProbs

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def head_inputs(num_tokens, vocabulary, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 8).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 8).to(dtype).requires_grad_()
    with torch.no_grad():
        weight[3] = weight[5]  # equal logits: the earlier one is the most likely token
    targets = torch.randint(vocabulary, (num_tokens,))
    targets[: num_tokens // 2] = (hidden @ weight.t()).argmax(dim=1)[: num_tokens // 2]
    return hidden, weight, targets


def run(function, hidden, weight, targets, with_entropy, outputs=OUTPUTS):
    log_probs, entropy, _, mean_logits, is_top1 = function.apply(
        hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs
    )
    weights = torch.linspace(-1, 1, len(targets))
    loss = (log_probs * weights).sum() + ((entropy * weights.square()).sum() if with_entropy else 0)
    gradients = torch.autograd.grad(loss, [hidden, weight])
    return [log_probs, entropy, mean_logits, is_top1, *gradients]


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("num_tokens, vocabulary", [(1, 7), (5, 100), (700, 2500), (512, 2048), (513, 4097)])
def test_equals_trl(num_tokens, vocabulary, with_entropy):
    inputs = head_inputs(num_tokens, vocabulary)
    for found, expected in zip(
        run(CPULogProbs, *inputs, with_entropy), run(_ChunkedLogProbFunction, *inputs, with_entropy), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_equals_log_softmax():
    hidden, weight, targets = head_inputs(40, 3000)
    found = run(CPULogProbs, hidden, weight, targets, with_entropy=True)
    log_probs = (hidden @ weight.t()).log_softmax(dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    of_targets = log_probs[range(40), targets]
    weights = torch.linspace(-1, 1, 40)
    gradients = torch.autograd.grad((of_targets * weights + entropy * weights.square()).sum(), [hidden, weight])
    for a, b in zip([found[0], found[1], *found[4:]], [of_targets, entropy, *gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_half_precision_is_as_good_as_trl():
    inputs = head_inputs(300, 2500, torch.bfloat16)
    for found, expected in zip(
        run(CPULogProbs, *inputs, False), run(_ChunkedLogProbFunction, *inputs, False), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_only_what_is_asked_for():
    hidden, weight, targets = head_inputs(4, 10)
    results = CPULogProbs.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs",))
    assert [x is None for x in results] == [False, True, True, True, True]


def test_nothing_to_score_still_reaches_the_model():
    hidden, weight, targets = head_inputs(4, 10)
    log_probs = CPULogProbs.apply(hidden[:0], weight, None, targets[:0], 1.0, 32768, None, 1.0, ("log_probs",))[0]
    assert torch.autograd.grad(log_probs.sum(), [weight])[0].equal(torch.zeros_like(weight))


@pytest.mark.parametrize(
    "options",
    [
        (torch.zeros(3), 1.0, None, 1.0, ("log_probs",)),
        (None, 0.7, None, 1.0, ("log_probs",)),
        (None, 1.0, 30.0, 1.0, ("log_probs",)),
        (None, 1.0, None, 0.1, ("log_probs",)),
        (None, 1.0, None, 1.0, ("log_probs", "log_sum_sq_probs")),
    ],
)
def test_other_heads_are_left_to_trl(options):
    assert not CPULogProbs.fits(*options)
    assert CPULogProbs.fits(None, 1.0, None, 1.0, OUTPUTS)
