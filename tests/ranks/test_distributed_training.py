"""Fast Forward in several processes, for real over gloo: as one process, or an error on all of them."""

import math
import re

import pytest
import torch

WAYS = {
    "ddp": dict(how="ddp"),
    "fsdp2": dict(how="fsdp"),
    "fsdp2, full fine-tuning": dict(how="fsdp", family="llama", adapters=False),
    "fsdp2, adapters whole": dict(how="fsdp_mixed"),
    "hybrid fsdp2": dict(how="fsdp_hybrid"),
    "ddp, batches as given": dict(how="ddp", validation="generic"),
    "fsdp2, batches as given": dict(how="fsdp", validation="generic"),
    "ddp, a loss function": dict(how="ddp", validation="callable"),
}
QUICK = ["ddp", "fsdp2, full fine-tuning", "fsdp2, adapters whole", "fsdp2, batches as given"]


def cases():
    for size in (2, 4):
        for way in WAYS:
            if way == "hybrid fsdp2" and size == 2:
                continue
            for search in ("parabolic", "linear") if way == "ddp" else ("parabolic",):
                quick = size == 2 and way in QUICK and search == "parabolic"
                marks = () if quick else pytest.mark.slow
                yield pytest.param(size, way, search, marks=marks, id=f"{size} ranks, {way}, {search}")


def values(answers):
    assert all("value" in answer for answer in answers), [a.get("trace", a) for a in answers]
    return [answer["value"] for answer in answers]


@pytest.mark.parametrize("way", ["ddp", "fsdp2, full fine-tuning", "fsdp2, adapters whole"])
def test_several_ranks_find_the_learning_rate_of_one_process(in_ranks, way):
    settings = {**WAYS[way], "learning_rate": "auto", "interval": None, "steps": 22}
    alone = values(in_ranks(1, "train_lm", seconds=90, **{**settings, "how": "plain"}))[0]
    ranks = values(in_ranks(2, "train_lm", seconds=90, **settings))
    for rank in ranks:
        assert rank["rates"] == ranks[0]["rates"] and rank["weights"] == ranks[0]["weights"], "the same bits"
        assert rank["rates"] == pytest.approx(alone["rates"], rel=2e-3)
    assert alone["rates"][:4] == pytest.approx([1e-5, 4e-5, 16e-5, 64e-5]) and alone["rates"][-1] > 1e-4
    jump = 4 * math.log2(alone["rates"][-1] / alone["rates"][-2])
    assert abs(jump - round(jump)) > 1e-6, "trims have begun"


@pytest.mark.parametrize("cut", [3, 17])
def test_a_rate_that_ranks_move_is_resumed_bit_for_bit(in_ranks, cut):
    settings = {"learning_rate": "auto", "interval": None, "steps": 30}
    whole = values(in_ranks(2, "slope", **settings))
    assert values(in_ranks(2, "slope_resumed", cut=cut, **settings)) == whole and whole[0]["rate"] > 1e-3


def test_an_optimizer_that_is_spread_over_ranks_finds_the_same_rate(in_ranks):
    settings = {"learning_rate": "auto", "interval": None, "steps": 20}
    whole, spread = (values(in_ranks(2, "slope", zero=zero, **settings)) for zero in (False, True))
    for rank in spread:
        assert rank["weights"] == whole[0]["weights"] and rank["rate"] == whole[0]["rate"] > 1e-3


@pytest.mark.parametrize(("size", "way", "search"), list(cases()))
def test_several_ranks_do_what_one_process_does(in_ranks, size, way, search):
    settings = {**WAYS[way], "search": search}
    alone = values(in_ranks(1, "train_lm", seconds=90, **{**settings, "how": "plain"}))[0]
    ranks = values(in_ranks(size, "train_lm", seconds=90, **settings))
    first = ranks[0]
    for rank in ranks:
        assert rank["taus"] == alone["taus"] and max(alone["taus"]) > 3
        assert rank["steps"] == alone["steps"] == [2, 4]
        assert rank["prices"] == alone["prices"]
        assert rank["losses"] == first["losses"], "the same bits on every rank"
        assert rank["weights"] == first["weights"], "the same bits on every rank"
        assert (rank["path"], rank["examples"]) == (alone["path"], alone["examples"])
        assert rank["training"]
    assert torch.allclose(
        torch.tensor(first["weights"]), torch.tensor(alone["weights"]), rtol=2e-5, atol=2e-6
    )
    for ours, theirs in zip(first["losses"], alone["losses"], strict=True):
        assert [float.fromhex(x) for x in ours] == pytest.approx([float.fromhex(x) for x in theirs], rel=1e-6)
    assert first["measured"] == pytest.approx(alone["measured"], rel=1e-6)
    if "validation" in settings:
        assert first["by_example"] is alone["by_example"] is None
    else:
        assert all(rank["by_example"] == first["by_example"] for rank in ranks), "the same bits on every rank"
        for ours, theirs in zip(first["by_example"], alone["by_example"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    if way == "ddp":  # the work is divided, not repeated
        assert max(rank["flops"] for rank in ranks) < 0.62 * alone["flops"]
    if way == "fsdp2":
        assert first["kinds"] == ["DTensor"]


@pytest.mark.parametrize("how", ["compile", "module"])
def test_ddp_inside_of_another_module_broadcasts_nothing_in_a_validation(in_ranks, how):
    zero, one = values(in_ranks(2, "ddp_inside", seconds=60, how=how))
    assert zero["taus"] == one["taus"] and min(one["taus"]) > 3
    assert zero["weights"] == one["weights"]
    # Training broadcasts rank 0's count before each of the 4 forwards, and nothing does after the last.
    assert (zero["own"], one["own"]) == (4.0, 5.0)
    assert zero["syncs"] and one["syncs"], "the next forward of training broadcasts, as without Fast Forward"


def test_without_an_accepted_step_the_run_is_the_plain_one_bit_for_bit(in_ranks):
    frozen = values(in_ranks(2, "slope", lr=0.0))
    assert [rank["stopped"] for rank in frozen] == [["the optimizer did not change the weights"] * 3] * 2
    assert frozen[0]["active"]


@pytest.mark.parametrize("cut", [1, 2])
def test_a_resumed_run_continues_bit_identically(in_ranks, cut):
    whole = values(in_ranks(2, "slope"))
    resumed = values(in_ranks(2, "slope_resumed", cut=cut))
    assert whole[0] == whole[1] == resumed[0] == resumed[1]
    assert max(whole[0]["taus"]) > 3


@pytest.mark.parametrize("how", ["raise", "interrupt"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_rank_that_raises_in_a_stage_stops_it_on_all(in_ranks, how, at):
    zero, one = values(in_ranks(2, "slope_fails", who=1, at=at, how=how))
    name = "OutOfMemoryError" if how == "raise" else "KeyboardInterrupt"
    assert one["error"] == name
    assert zero["error"] == "RankFailed"
    assert f"rank 1: {name}" in zero["message"]
    assert zero["weights"] == one["weights"]
    assert zero["losses"] == one["losses"] and len(one["losses"]) == at - 1
    assert zero["taus"] == one["taus"]
    after = [{**rank["after"], "stopped": rank["after"]["stopped"][1]} for rank in (zero, one)]
    assert after[0] == after[1] and len(after[0]["taus"]) == 2, "and training could go on"


def test_ctrl_c_on_one_rank_while_weights_move(in_ranks):
    zero, one = values(in_ranks(2, "slope_interrupted_between_exchanges"))
    assert (zero["error"], one["error"]) == ("RankFailed", "KeyboardInterrupt")
    assert zero["weights"] == one["weights"]
    assert zero["losses"] == one["losses"] and len(one["losses"]) == 3


def test_a_rank_that_dies_in_a_stage_ends_the_job(in_ranks):
    zero, one = in_ranks(2, "slope_fails", who=1, at=2, how="die")
    assert one["died"] == -9
    assert zero["value"]["error"] == "RankFailed"
    assert "lost the others during Fast Forward" in zero["value"]["message"]
    assert zero["seconds"] < 15


@pytest.mark.parametrize("how", ["raise", "die"])
def test_a_rank_that_ends_in_a_forward_of_fsdp_ends_the_job(in_ranks, how):
    zero, one = in_ranks(2, "fsdp_fails", how=how)
    assert one.get("died") == -9 if how == "die" else one["error"] == "OutOfMemoryError"
    assert zero["error"] in ("RuntimeError", "DistNetworkError", "DistBackendError", "RankFailed"), zero
    assert zero["seconds"] < 15


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("interval", "FastForwardConfig.interval: rank 0: 2; rank 1: 3; make the same FastForward on every"),
        ("names", r"the trainable parameters \(number, hash of names and shapes\): rank 0: \[1, '"),
        (
            "examples",
            r"(number of validation examples|validation examples \(their hash\)).*give every rank the",
        ),
        ("unsynchronised", r"max \|Δ\| of the optimizer's update.*wrap the model in DistributedDataParallel"),
        ("unaligned", "alignment of their gradients with the last update: rank 0.*with the same gradients"),
        ("unaligned, no stages", "alignment of their gradients with the last update: rank 0.*with the same"),
        ("rate", r'the learning rate that "auto" came to: rank 0: \d.*; every rank must train'),
        ("rate of a state", 'the learning rate that "auto" came to: rank 0: 1e-05; rank 1: 0.00016'),
        ("initial weights", "the bits of the weights and the update"),
        ("search", "not at the same place: rank 0: 'a validation loss'; rank 1: 'the end of a Fast"),
        (
            "optimizer_steps",
            "the optimizer steps they have taken: rank 0: 0.0; rank 1: -1.0; load the same checkpoint",
        ),
        ("failures", r"what their earlier stages came to \(a hash\).*load the same checkpoint"),
    ],
)
def test_ranks_that_differ_are_told_how(in_ranks, what, message):
    answers = in_ranks(2, "slope_differs", seconds=8, what=what)
    for answer in answers:
        assert answer["error"] in ("RanksDisagree", "RankFailed", "RuntimeError"), answer
    assert any(re.search(message, answer["message"]) for answer in answers), answers
    assert answers[0]["seconds"] < 20


def test_what_one_rank_cannot_make_no_rank_makes(in_ranks):
    zero, one = in_ranks(2, "slope_differs", what="no optimizer")
    assert one["error"] == "ValueError" and "param_groups" in one["message"]
    assert zero["error"] == "RankFailed" and "rank 1: ValueError" in zero["message"]
    zero, one = in_ranks(2, "slope_differs", what="empty")
    assert one["error"] == "ValueError" and "validation set is empty" in one["message"]
    assert zero["error"] == "RankFailed"


def test_graphs_are_refused_in_several_processes(in_ranks):
    for answer in in_ranks(2, "slope_differs", what="executor"):
        assert answer["error"] == "RuntimeError"
        assert 'executor="step_graph" cannot run here: training runs in 2 processes' in answer["message"]


@pytest.mark.parametrize("config", [{}, {"learning_rate": "auto", "interval": None}], ids=["stages", "rate"])
def test_a_fast_forward_made_before_the_process_group_is_refused(in_ranks, config):
    for answer in in_ranks(2, "late_process_group", **config):
        assert answer["error"] == "RuntimeError"
        assert "became one of several processes after" in answer["message"]


def test_ranks_that_train_models_of_their_own_search_alone(in_ranks):
    zero, one = values(in_ranks(2, "alone_among_others"))
    assert zero[:2] == [True, 1] and one[:2] == [True, 2]
    assert zero[2] > one[2] > 3 and zero[3] == pytest.approx(4e-5) and one[3] == pytest.approx(16e-5)


@pytest.mark.slow
def test_the_group_of_a_ddp_model_is_the_one_that_searches(in_ranks):
    assert values(in_ranks(4, "group_of_ddp")) == [[2, 0, 0.5], [2, 1, 0.5], [2, 0, 2.5], [2, 1, 2.5]]


def test_how_a_model_is_spread_decides_whether_it_can_be_moved(in_ranks):
    split, both, hybrid, plain, old = values(in_ranks(2, "tensor_parallel"))[0]
    assert "0.weight is sharded by tensor parallelism (S(0))" in split
    assert "is sharded by tensor parallelism" in both
    assert hybrid is None and plain is None
    assert "FullyShardedDataParallel (FSDP1)" in old


def test_a_stage_looks_at_all_shards_of_an_update(in_ranks):
    zero, one = values(in_ranks(2, "slope_fsdp", case="zero"))
    assert zero[0] == one[0] > 100, "one rank's shard did not change, the other's is worth repeating"
    assert [zero[2], one[2]] == [3, 2]
    assert zero[3] == one[3] and zero[3][3:] == [0.0, 0.0] and min(zero[3][:3]) > 0.1
    for rank in values(in_ranks(2, "slope_fsdp", case="nan")):
        assert rank[:2] == [0, "the optimizer's update is not finite"]
    zero, one = values(in_ranks(2, "slope_fsdp", case="empty"))
    assert [zero[2], one[2]] == [1, 0]
    assert zero[0] == one[0] and zero[3] == one[3] == [pytest.approx(1.0, abs=5e-3)]
    assert zero[4], "gradients stay the loop's"


@pytest.mark.slow
def test_an_optimizer_whose_state_is_sharded_is_moved_like_any_other(in_ranks):
    assert values(in_ranks(2, "slope", zero=True)) == values(in_ranks(2, "slope"))


def test_other_examples_are_shared_anew(in_ranks):
    for kept, same, examples, error in values(in_ranks(2, "swapped_examples")):
        assert (kept, same, examples) == (False, True, 5)
        assert "the ranks differ in" in error and "give every rank the same, whole validation set" in error


def test_a_pool_draws_the_same_examples_on_every_rank(in_ranks):
    alone = values(in_ranks(1, "pooled_examples"))[0][0]
    zero, one = values(in_ranks(2, "pooled_examples"))
    assert zero == one and zero[1] == 4 and len(set(alone)) == 3
    assert zero[0] == pytest.approx(alone, rel=1e-6)
    assert "the ranks differ in the validation examples" in zero[2]


@pytest.mark.slow
def test_the_trainer_of_transformers_in_two_processes(in_ranks):
    zero, one = values(in_ranks(2, "hugging_face_trainer", seconds=120))
    assert zero == one
    assert zero["wrapped"] == "DistributedDataParallel"
    assert [tau for tau, _ in zero["stages"]] == [16, 16, 16]
    alone = values(in_ranks(1, "hugging_face_trainer", seconds=120))[0]
    assert [loss for _, loss in zero["stages"]] == pytest.approx(
        [loss for _, loss in alone["stages"]], rel=1e-4
    )
