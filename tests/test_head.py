"""Log-probabilities from hidden states: values and gradients of a plain log-softmax, for every form of linear head."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_larpo.training import head as head_module
from trl_larpo.training.head import OutputHead, TiledLogProbs, score_logits, score_tokens

FORMS = {"plain": (1.0, None), "scaled": (0.3, None), "capped": (1.0, 3.0), "scaled and capped": (2.0, 5.0)}


def head_inputs(num_tokens, vocabulary, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 8).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 8).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary).to(dtype).requires_grad_()
    with torch.no_grad():
        weight[3], bias[3] = weight[5], bias[5]  # equal logits: the earlier one is the most likely token
    targets = torch.randint(vocabulary, (num_tokens,))
    targets[: num_tokens // 2] = (hidden @ weight.t() + bias).argmax(dim=1)[: num_tokens // 2]
    return hidden, weight, bias, targets


def plain(hidden, weight, bias, targets, scale, softcap):
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    logits = logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_probs = logits.log_softmax(dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    return log_probs[range(len(targets)), targets], entropy, logits.mean(dim=1), logits.argmax(dim=1) == targets


def with_gradients(values, inputs):
    weights = torch.linspace(-1, 1, len(values[0]))
    inputs = [x for x in inputs if x is not None]
    return [*values, *torch.autograd.grad((values[0] * weights).sum(), inputs)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens, vocabulary", [(1, 7), (5, 100), (700, 2500), (512, 2048), (513, 4097)])
def test_equals_log_softmax(num_tokens, vocabulary, has_bias, form):
    hidden, weight, bias, targets = head_inputs(num_tokens, vocabulary)
    inputs = hidden, weight, bias if has_bias else None
    found = with_gradients(TiledLogProbs.apply(*inputs, targets, *FORMS[form], True), inputs)
    expected = with_gradients(plain(*inputs, targets, *FORMS[form]), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_half_precision():
    hidden, weight, bias, targets = head_inputs(300, 2500, torch.bfloat16)
    found = with_gradients(TiledLogProbs.apply(hidden, weight, bias, targets, 1.0, None, True), (hidden, weight, bias))
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    expected = with_gradients(plain(*wide, targets, 1.0, None), wide)
    for a, b in list(zip(found, expected, strict=True))[:2] + list(zip(found, expected, strict=True))[4:]:
        torch.testing.assert_close(a.float(), b, rtol=3e-2, atol=3e-2 * b.abs().max().item())


def test_statistics_are_worked_out_only_where_wanted():
    hidden, weight, _, targets = head_inputs(10, 50)
    log_probs, *others = TiledLogProbs.apply(hidden, weight, None, targets, 1.0, None, False)
    assert others == [None, None, None]
    torch.testing.assert_close(log_probs, plain(hidden, weight, None, targets, 1.0, None)[0])


def test_no_tokens():
    hidden, weight, bias, targets = head_inputs(4, 50)
    log_probs = TiledLogProbs.apply(hidden[:0], weight, bias, targets[:0], 1.0, None, True)[0]
    gradients = torch.autograd.grad(log_probs.sum(), [weight, bias])
    assert all((gradient == 0).all() for gradient in gradients)


class OnlyAHead:
    def __init__(self, weight, bias):
        self.layer = SimpleNamespace(weight=weight, bias=bias)

    def get_output_embeddings(self):
        return self.layer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_few_logits_are_kept_and_say_the_same(form, has_bias, monkeypatch):
    hidden, weight, bias, targets = head_inputs(20, 50)
    inputs = hidden, weight, bias if has_bias else None
    scale, softcap = FORMS[form]
    monkeypatch.setattr(TiledLogProbs, "apply", lambda *_: pytest.fail("worked out in tiles"))
    head = OutputHead(scale=scale, softcap=softcap, max_kept_logits=20 * 50)
    values = score_tokens(OnlyAHead(*inputs[1:]), head, hidden, targets, True)
    found, expected = (
        with_gradients(each, inputs) for each in (list(values.values()), plain(*inputs, targets, *FORMS[form]))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_more_logits_are_worked_out_again(is_sharded):
    hidden, weight, _, targets = head_inputs(20, 50)
    if is_sharded:  # its values are gone in the backward pass
        weight.ds_status = None
    head = OutputHead(max_kept_logits=20 * 50 - (0 if is_sharded else 1))
    log_probs = score_tokens(OnlyAHead(weight, None), head, hidden, targets, False)["log_probs"]
    assert type(log_probs.grad_fn).__name__ == "TiledLogProbsBackward"


@pytest.mark.parametrize("with_statistics", [False, True])
def test_logits_of_a_model_say_the_same(with_statistics):
    hidden, weight, bias, targets = head_inputs(1100, 60)
    names = ["log_probs", "entropy", "mean_logits", "is_top1"]
    values = score_logits(hidden @ weight.t() + bias, targets, with_statistics)
    assert list(values) == (names if with_statistics else names[:1])
    for name, expected in zip(values, plain(hidden, weight, bias, targets, 1.0, None), strict=False):
        torch.testing.assert_close(values[name], expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_has_more_to_train_is_left_to_the_model(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert OutputHead.from_config(model).linear
    model.lm_head.register_parameter("logit_scale", torch.nn.Parameter(torch.ones(model.config.vocab_size)))
    assert not OutputHead.from_config(model).linear


def test_triton_is_used_where_there_is_one(monkeypatch):
    hidden, weight, bias, targets = head_inputs(6, 50)
    layer = torch.nn.Linear(8, 50)
    layer.weight, layer.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())

    class Model:
        def get_output_embeddings(self):
            return layer

    given = []

    def on_triton(*arguments):
        given.append(arguments[4:])
        return TiledLogProbs.apply(*arguments)

    monkeypatch.setattr(head_module, "triton_log_probs", on_triton)
    values = score_tokens(Model(), OutputHead(True, 2.0, 5.0), hidden, targets, True)
    assert given == [(2.0, 5.0, True)]
    monkeypatch.setattr(head_module, "triton_log_probs", lambda *arguments: None)
    for name, value in score_tokens(Model(), OutputHead(True, 2.0, 5.0), hidden, targets, True).items():
        torch.testing.assert_close(value, values[name])
