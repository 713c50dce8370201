"""Processes that are forked after the kernels have used threads."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch
from support.backends import needs_cpu

import rbm_kernels as rk


def work() -> tuple[int, int, float]:
    """Threads that torch and the kernels use, and what chains large enough for several give."""
    g = torch.Generator().manual_seed(0)
    W = 0.05 * torch.randn(784, 500, generator=g)
    v = (torch.rand(512, 784, generator=g) < 0.5).float()
    states = rk.gibbs_sample(v, W, torch.zeros(784), torch.zeros(500), 2, seed=0)
    return torch.get_num_threads(), rk.backends.cpu._threads(), states.sum().item()


def report(queue: Queue[tuple[int, int, float]], threads: int) -> None:
    if threads:  # as one who does not know might ask for
        v, W, c = torch.ones(512, 784), torch.zeros(784, 500), torch.zeros(500)
        torch.set_num_threads(threads)
        rk.sample_hidden(v, W, c, seed=0)
        torch.set_num_threads(1)
    queue.put(work())


def in_a_child(threads: int = 0) -> tuple[int, int, float]:
    context = multiprocessing.get_context("fork")
    queue: Queue[tuple[int, int, float]] = context.Queue()
    child = context.Process(target=report, args=(queue, threads))
    child.start()
    try:
        found = queue.get(timeout=60)  # or queue.Empty, where the child hangs
        child.join(60)
        return found
    finally:
        child.kill()


def main() -> None:
    """Run in a process of its own, whose threads no other test has used."""
    torch.set_num_threads(2)
    assert in_a_child()[:2] == (2, 2), "a child is free as long as no threads were used"
    threads, ours, expected = work()
    assert (threads, ours) == (2, 2)
    assert in_a_child() == in_a_child(threads=2) == (1, 1, expected)
    assert work() == (2, 2, expected)


@needs_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_neither_hangs_nor_draws_otherwise() -> None:
    folders = (Path(rk.__file__).parents[1], Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main()
