"""What the metrics of lists count where several processes evaluate."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.state import GradientState
from torch.utils.data import DataLoader

from trl_larpo.training.list_metrics import ListMetrics, Measurements
from trl_larpo.training.objective import RankingObjective
from trl_larpo.training.scorer import CandidateOutputs

NAMES = ["relevance", "mask", "scores", "log_ratios", "logps", "count", "entropy", "mean_logits", "is_top1"]


def accelerator_of(process, num_processes, even_batches=True):
    """As much of it as metrics read. Sums over processes are those of this one."""
    return SimpleNamespace(
        num_processes=num_processes, process_index=process, even_batches=even_batches, device=torch.device("cpu"),
        gradient_state=GradientState(), reduce=lambda tensor, reduction: tensor,
    )  # fmt: skip


def batch_of(lists):
    """Each list has two completions with the log-probability of its number."""
    values = torch.ones(len(NAMES), len(lists), 2)
    values[NAMES.index("relevance"), :, 1] = 0.0
    values[NAMES.index("logps")] = torch.tensor(lists).float()[:, None]
    return Measurements(NAMES, values, torch.tensor(1))


def evaluated(num_lists, batch_size, mode="eval", num_processes=2, group_size=1, even_batches=True):
    """The batches of the processes as accelerate makes them: the metrics that each of them adds."""
    PartialState()
    order = [i for i in range(num_lists) for _ in range(group_size)]
    found = []
    for process in range(num_processes):
        plain = DataLoader(range(num_lists), sampler=order, batch_size=batch_size * group_size)
        batches = prepare_data_loader(
            plain, num_processes=num_processes, process_index=process, put_on_device=False, even_batches=even_batches
        )
        metrics = ListMetrics(accelerator_of(process, num_processes, even_batches), beta=0.1)
        for batch in batches:
            metrics.add(mode, batch_of(batch.tolist()[::group_size]))
        metrics._count(mode)
        found.append(metrics._totals[mode])
    return {name: sum(totals[name] for totals in found if totals) for name in found[0]}


@pytest.mark.parametrize("group_size", [1, 3])  # 3: online, where batches hold the samples of each prompt
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("num_lists", range(1, 10))
def test_each_list_of_an_evaluation_counts_once(num_lists, batch_size, group_size):
    totals = evaluated(num_lists, batch_size, group_size=group_size)
    assert totals["logps/chosen"].tolist() == [sum(range(num_lists)), num_lists]
    assert totals["list_size"].tolist() == [2 * num_lists, num_lists]


@pytest.mark.parametrize("loss_type", ["lambdarank", "pairwise", "listmle", "sft"])
def test_the_loss_of_an_evaluation_leaves_out_the_lists_that_fill_a_batch(config, loss_type):
    torch.manual_seed(0)
    logps, ref_logps = -torch.rand(2, 3, 4)
    batch = {"relevance": torch.rand(3, 4), "candidate_mask": torch.rand(3, 4) < 0.9}
    tokens = {"count": torch.randint(1, 9, (3, 4)).float()}
    objective = RankingObjective([loss_type], None, config())

    def loss(lists, num_counted=None):
        outputs = CandidateOutputs(logps[lists], {name: values[lists] for name, values in tokens.items()})
        of_lists = {name: values[lists] for name, values in batch.items()}
        return objective(outputs, ref_logps[lists], of_lists, num_counted).loss.item()

    everything = slice(None)
    assert loss(everything, 2) == pytest.approx(loss(slice(2))) != pytest.approx(loss(everything))
    assert loss(everything, 0) == loss(everything, 3) == loss(everything)  # of 0, nothing counts, nor is it NaN


def test_lists_count_as_often_as_they_are_used_otherwise():
    assert evaluated(5, 2, num_processes=1)["list_size"].tolist() == [10, 5]
    assert evaluated(5, 2, even_batches=False)["list_size"].tolist() == [10, 5]
    assert evaluated(5, 2, mode="train")["list_size"].tolist() == [16, 8]  # those that fill batches are trained on
