"""What trainings logged and the weights they ended with, and comparisons of them."""

import tiny
import torch


def trajectory(trainer, *names):
    """Logged values of each optimizer step."""
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


def assert_close(ours, theirs, names, rtol, atol):
    for name in names:
        values = [torch.tensor(trajectory(trainer, name), dtype=torch.float64) for trainer in (ours, theirs)]
        atol_of_name = max(atol, tiny.LOSS_ROUNDING) if name == "loss" else atol
        torch.testing.assert_close(*values, rtol=rtol, atol=atol_of_name, msg=lambda text, name=name: f"{name}: {text}")


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model, other, **tolerance):
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
