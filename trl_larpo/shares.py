"""Which process does which part of a step."""

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .waiting import wait_for_all


def share_of(remaining: list[int]) -> list[int]:
    """
    The parts of a step that this process does. All processes call it.

    Args:
        remaining: Numbers of the parts that are not done yet. The list of the first process counts in all of them, so
            that each part has one process also where files of other machines appear late.
    """
    wait_for_all()  # what is done already is read before, by one process faster than by another
    [agreed] = broadcast_object_list([remaining], from_process=0)
    state = PartialState()
    return agreed[state.process_index :: state.num_processes]
