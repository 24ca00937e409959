"""What the ranks tell each other: real processes over gloo, real failures, bounded time."""

import math
import subprocess
import sys

import pytest
import torch

from ffkernels.ranks.digests import checksum, digest
from ffkernels.ranks.ranks import ROOM, ROW_BYTES, Ranks


def values(answers):
    assert all("value" in answer for answer in answers), answers
    return [answer["value"] for answer in answers]


def test_without_a_process_group_there_are_no_ranks():
    assert Ranks.present(torch.device("cpu")) is None


def test_every_rank_gets_the_rows_of_all_in_rank_order(in_ranks):
    expected = [[4, False, 0.1 * rank, "nan", -(2**62) - rank] for rank in range(3)]
    assert values(in_ranks(3, "exchange_rows")) == [expected] * 3
    assert ROW_BYTES == 32 + 8 * ROOM == 288


def test_the_mean_is_correctly_rounded_and_the_same_bits_on_every_rank(in_ranks):
    # 1e16 + 1 − 1e16 + 1 is 2 exactly; float64 in rank order gives 1.
    assert values(in_ranks(4, "mean_loss")) == [[(2.0 / 10).hex(), "nan"]] * 4


def test_sums_by_example_come_to_every_rank_in_one_order(in_ranks):
    all_of_them = [i / 3 + rank for rank, share in enumerate([2, 40, 0]) for i in range(share)]
    for mean, sums, few, some, without, after in values(in_ranks(3, "sums_by_example")):
        assert sums == [x.hex() for x in all_of_them]
        assert float.fromhex(mean) == pytest.approx(math.fsum(all_of_them) / 30, rel=1e-15)
        assert (few, some) == (1.0, [0.0, 1 / 7, 2 / 7])
        assert without == [float.fromhex(mean), None], "all go without what one of them lacks"
        assert after == 1.0, "still in step afterwards"


@pytest.mark.parametrize("kind", ["RuntimeError", "KeyboardInterrupt"])
def test_a_rank_that_raises_is_an_error_on_every_rank_and_no_hang(in_ranks, kind):
    one, two, three = in_ranks(3, "one_raises", who=[1], kind=kind)
    assert one["value"][0] == three["value"][0] == "RankFailed"
    assert one["value"][1] == (
        f"Fast Forward ends on rank 0, since others failed. rank 1: {kind}: rank 1 stumbles"
    )
    assert two["value"][:2] == [kind, "rank 1 stumbles"]
    assert [answer["value"][2] for answer in (one, two, three)] == [1.0] * 3, "still in step afterwards"


def test_several_ranks_may_raise_at_once(in_ranks):
    one, two = in_ranks(2, "one_raises", who=[0, 1], kind="RuntimeError")
    assert one["value"] == ["RuntimeError", "rank 0 stumbles", 0.5]
    assert two["value"] == ["RuntimeError", "rank 1 stumbles", 0.5]


def test_what_fails_to_be_made_on_one_rank_is_made_on_none(in_ranks):
    one, two = in_ranks(2, "one_raises_while_made")
    assert one["error"] == "RankFailed"
    assert "rank 1: ValueError: no labels here" in one["message"]
    assert (two["error"], two["message"]) == ("ValueError", "no labels here")


def test_ranks_that_are_at_different_places_say_where(in_ranks):
    for answer in in_ranks(3, "different_places"):
        assert answer["error"] == "RanksDisagree"
        places = "rank 0: 'the update of a Fast Forward stage'; rank 1, 2: 'a validation loss'"
        assert places in answer["message"]


def test_different_settings_are_named_with_their_ranks(in_ranks):
    for answer in in_ranks(3, "different_facts"):
        assert answer["error"] == "RanksDisagree"
        assert answer["message"] == (
            "the ranks differ in interval: rank 0, 2: 6; rank 1: 8; give all ranks the same config"
        )


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_rank_that_dies_ends_the_others(in_ranks, how):
    one, two = in_ranks(2, "one_dies", how=how)
    assert one["error"] == "RankFailed"
    assert "rank 0 of 2 lost the others during Fast Forward" in one["message"]
    assert two.get("died") == -9 if how == "kill" else two["error"] == "SystemExit"
    assert one["seconds"] < 10


def test_a_process_group_of_some_of_the_ranks(in_ranks):
    one, two, three = values(in_ranks(3, "a_group_of_some"))
    assert one == two == 0.5
    assert three.startswith("this process is not in process_group")


def test_checksums_see_every_bit_and_no_order():
    flat = torch.tensor([1.0, -0.0, math.nan, 3.0])
    other = torch.tensor([1, 2, 3, 4], dtype=torch.bfloat16)
    same = checksum([flat.clone(), other.clone()])
    assert checksum([flat, other]) == same
    flipped = flat.clone()
    flipped.view(torch.int32)[3] ^= 1
    assert checksum([flipped, other]) != same
    assert checksum([torch.zeros(4), other]) != same
    odd = torch.arange(7, dtype=torch.float16)
    assert checksum([odd]) == checksum([odd[1:]]) != checksum([odd + 1]), "zero has no bits"
    assert checksum([]) == 0
    assert checksum([torch.full((1 << 12,), -(2.0**120))] * 64) == checksum(
        [torch.full((1 << 12,), -(2.0**120))] * 64
    )
    assert -(2**63) <= checksum([torch.full((1 << 16,), -math.inf)] * 40) < 2**63


def test_digests_tell_data_apart():
    batch = {"input_ids": torch.arange(6).reshape(2, 3), "labels": torch.ones(2, 3), "name": "x", "n": None}
    assert digest([batch]) == digest([dict(reversed(batch.items()))])
    for changed in (
        {"input_ids": torch.arange(6).reshape(3, 2)},
        {"input_ids": torch.arange(6, dtype=torch.int32).reshape(2, 3)},
        {"labels": torch.zeros(2, 3)},
        {"name": "y"},
        {"n": 0},
    ):
        assert digest([batch | changed]) != digest([batch])
    assert digest([batch, batch]) != digest([batch])
    assert digest(lambda: 1) == digest(lambda: 2), "an address is not a difference"


def test_a_process_that_ends_after_an_exchange_waits_once_for_the_backends_threads():
    script = """
import atexit, time
def ended():
    print(time.perf_counter() - at_the_end)
atexit.register(ended)  # called last: the pause was registered after it
import torch, torch.distributed as dist
from ffkernels.ranks.ranks import PRICE, Ranks
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(9):
    Ranks(torch.device("cpu")).exchange(PRICE)
at_the_end = time.perf_counter()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.05 <= float(ended.stdout) < 9 * 0.05
