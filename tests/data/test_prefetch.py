"""Batches built ahead are the batches; an error in the thread is the caller's; nothing is left running."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tidar_megatron.data.doubled import Batch, make_batch
from tidar_megatron.data.packing import fill_sequence
from tidar_megatron.data.prefetch import Overdue, Prefetcher
from tidar_megatron.errors import UserError
from tidar_megatron.models.attention.flex import FlexPlan

CPU = torch.device("cpu")


def batch_of(number: int, doubled: bool) -> list[Batch]:
    batch = make_batch([fill_sequence(8, 256)], 4, 300, doubled, np.array([[number % 2]]) if doubled else None)
    batch.num_tokens = number
    return [batch]


@pytest.fixture
def log() -> list[tuple[int, bool, str]]:
    return []


@pytest.fixture
def prefetcher(log: list) -> Iterator[Prefetcher]:
    def build(number: int, doubled: bool) -> list[Batch]:
        log.append((number, doubled, threading.current_thread().name))
        if number == 13:
            raise UserError("shard 13: is damaged")
        return batch_of(number, doubled)

    made = Prefetcher(build, CPU)
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_what_was_foreseen_is_built_once_and_in_the_thread(prefetcher: Prefetcher, log: list) -> None:
    for number in range(5):
        (batch,) = prefetcher.get(number, number >= 2)
        prefetcher.expect([(number + 1, number + 1 >= 2)])
        (expected,) = batch_of(number, number >= 2)
        assert (batch.num_tokens, batch.doubled) == (number, number >= 2)
        assert torch.equal(batch.visibility, expected.visibility)
    prefetcher.settle()
    assert [entry[:2] for entry in log] == [(0, False), (1, False), *((n, True) for n in range(2, 6))]
    assert [name for *_, name in log] == ["MainThread"] + 5 * ["prefetch_0"]


def test_what_was_not_foreseen_is_built_all_the_same(prefetcher: Prefetcher) -> None:
    """What nobody takes, the same step asked for twice, another phase than expected."""
    prefetcher.expect([(3, True)])
    assert prefetcher.get(7, True)[0].num_tokens == 7
    assert prefetcher.get(7, True)[0].num_tokens == 7
    prefetcher.expect([(8, True)])
    assert not prefetcher.get(8, False)[0].doubled
    prefetcher.expect([(9, True)])
    prefetcher.expect([(10, True)])
    assert prefetcher.get(10, True)[0].num_tokens == 10


def test_an_error_reaches_whoever_needs_the_batches(prefetcher: Prefetcher) -> None:
    prefetcher.expect([(13, True)])
    prefetcher.settle()  # raised by now, but not to somebody who wants something else
    assert prefetcher.get(12, True)[0].num_tokens == 12
    prefetcher.expect([(13, True)])
    for _ in range(2):
        with pytest.raises(UserError, match=r"^shard 13: is damaged$"):
            prefetcher.get(13, True)
    assert prefetcher.get(14, True)[0].num_tokens == 14


class Held:
    """Builds nothing, and not before it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.ended: list[int] = []

    def __call__(self, number: int) -> list[Batch]:
        self.begun.set()
        assert self.go.wait(60)
        self.ended.append(number)
        return []


def test_closing_waits_for_what_is_being_built() -> None:
    held = Held()
    prefetcher = Prefetcher(held, CPU)
    prefetcher.expect([(1,)])
    assert held.begun.wait(60)
    prefetcher.expect([(2,)])
    threading.Timer(0.05, held.go.set).start()
    prefetcher.close()
    assert held.ended == [1]  # what had not begun is not begun any more


def test_many_workers_build_the_same_and_keep_the_order() -> None:
    """As many ahead as there are threads, a later one done while the first waits; each gets what it asked for."""
    first, built = threading.Event(), []

    def build(number: int) -> list[Batch]:
        if number == 0:
            assert first.wait(60)
        built.append(number)
        return batch_of(number, True)

    prefetcher = Prefetcher(build, CPU, workers=3)
    prefetcher.expect([(n,) for n in range(6)])
    assert prefetcher.get(2)[0].num_tokens == 2
    first.set()
    for number in (0, 1, 3):
        assert prefetcher.get(number)[0].num_tokens == number
    prefetcher.close()
    assert sorted(built) == [0, 1, 2, 3]  # no more ahead than there are threads


def test_without_workers_the_caller_builds() -> None:
    threads = []

    def build(number: int) -> list[Batch]:
        threads.append(threading.current_thread())
        return batch_of(number, True)

    prefetcher = Prefetcher(build, CPU, workers=0)
    prefetcher.expect([(1,), (2,)])
    assert threads == []
    assert prefetcher.get(1)[0].num_tokens == 1
    prefetcher.settle()
    prefetcher.close()
    assert threads == [threading.current_thread()]


def test_settling_waits_for_what_was_forgotten_too() -> None:
    """A process is forked after it: no thread may hold a lock then."""
    held = Held()
    prefetcher = Prefetcher(held, CPU, workers=2)
    prefetcher.expect([(1,)])
    assert held.begun.wait(60)
    prefetcher.expect([])
    threading.Timer(0.05, held.go.set).start()
    prefetcher.settle()
    assert held.ended == [1]
    prefetcher.close()


def test_nothing_is_started_for_nothing() -> None:
    before = threading.active_count()
    Prefetcher(batch_of, CPU).close()
    assert threading.active_count() == before


def test_page_locked_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: that every tensor is asked for, positions as the one row they are, and the thread's device set.

    Once each: the metadata that stay on the host are the same as those that go.
    """
    devices, pinned = [], []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor.clone())
    prefetcher = Prefetcher(lambda: [make_batch([fill_sequence(8, 256)] * 3, 4, 300)], torch.device("cuda", 5))
    prefetcher.expect([()])
    (batch,) = prefetcher.get()
    prefetcher.close()
    assert devices == [torch.device("cuda", 5)]
    tensors = [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    assert len(pinned) == len(tensors) - 1 == 10 and "visibility_on_host" in tensors
    assert torch.Size((1, 16)) in pinned
    assert batch.position_ids.stride() == (0, 1)


def test_a_plan_of_attention_goes_where_its_batch_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked in the thread, then to the device."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    plan = FlexPlan(*((torch.zeros(2),),) * 4)
    batch = make_batch([fill_sequence(8, 256)], 4, 300)
    assert batch.pinned().attention_plan is None
    batch.attention_plan = plan
    pinned = batch.pinned().attention_plan
    assert all(tensor.tolist() == [1, 1] for part in vars(pinned).values() for tensor in part)
    moved = batch.to("meta").attention_plan
    assert all(tensor.device.type == "meta" for part in vars(moved).values() for tensor in part)


def test_what_does_not_come_in_time_is_not_waited_for() -> None:
    """Foreseen or not, and at the end; what comes in time is as ever."""
    release = threading.Event()

    def build(number: int) -> list[Batch]:
        assert number == 1 or release.wait(60)
        return batch_of(number, True)

    for foreseen in ([], [(2,)]):
        prefetcher = Prefetcher(build, CPU, workers=len(foreseen), timeout=5)
        assert prefetcher.get(1)[0].num_tokens == 1
        prefetcher.expect(foreseen)
        prefetcher._timeout = 0.01
        with pytest.raises(Overdue):
            prefetcher.get(2)
        prefetcher.expect([(3,)])
        if foreseen:
            with pytest.raises(Overdue):
                prefetcher.settle()
        prefetcher.close()  # at once
        assert [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    release.set()
