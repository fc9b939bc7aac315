"""Host buffers made ready ahead: in order, no more of them than allowed, none left behind."""

import threading
import time
from contextlib import closing

import pytest
import torch
from torch import nn

from superpipeline import ready
from superpipeline.host import HostBuffer
from superpipeline.ready import ready_ahead
from superpipeline.weights import find_weights

ELSEWHERE = torch.device("meta")  # no CPU, and nothing that pins


def groups_of(*num_rows):
    model = nn.Sequential(*[nn.Linear(1024, rows, bias=False) for rows in num_rows])
    return [[weight] for weight in find_weights(model, torch.device("cpu"))]


@pytest.mark.parametrize("device", [torch.device("cpu"), ELSEWHERE])
def test_one_empty_buffer_for_each_group_in_order(device):
    groups = groups_of(3, 50, 1, 20)
    buffers = list(ready_ahead(groups, device))
    assert [list(buffer.starts) for buffer in buffers] == groups
    assert not any(buffer.bytes.any() for buffer in buffers)


def test_no_more_are_ready_than_allowed(monkeypatch):
    made = []

    def make(group, device):
        made.append(group)
        return HostBuffer(group)

    monkeypatch.setattr(ready, "_ready", make)
    monkeypatch.setattr(ready, "_MOST_READY", 4096 * 4 * 3)
    groups = groups_of(*[4] * 10)  # 16 KiB each
    with closing(ready_ahead(groups, ELSEWHERE)) as buffers:
        for taken in range(1, 8):
            next(buffers)
            time.sleep(0.01)
            assert len(made) <= taken + 3
    assert len(made) <= 10


def test_a_buffer_larger_than_allowed_comes_alone(monkeypatch):
    monkeypatch.setattr(ready, "_MOST_READY", 1)
    groups = groups_of(4, 4, 4)
    assert [list(b.starts) for b in ready_ahead(groups, ELSEWHERE)] == groups


def test_what_fails_is_raised_and_no_thread_stays(monkeypatch):
    def fail(group, device):
        raise MemoryError("no memory")

    monkeypatch.setattr(ready, "_ready", fail)
    with pytest.raises(MemoryError, match="no memory"):
        list(ready_ahead(groups_of(4, 4), ELSEWHERE))
    assert not any("superpipeline-ready" in t.name for t in threading.enumerate())
