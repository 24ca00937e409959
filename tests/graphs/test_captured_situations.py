"""What users bring captured stages into, over a stand-in for CUDA; `tests/gpu` has the same on a GPU."""

import threading

import pytest
import torch
from torch.utils.data import DataLoader

from ffkernels import ValidationLoss
from ffkernels.graphs import check as graph_check
from ffkernels.graphs.driver import Cuda

NAMES = ["step_graph", "stage_graph"]
BOTH = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def place(fake, situations, tiny_model, padded_batch, monkeypatch):
    def build():
        model = tiny_model("llama", num_hidden_layers=1, attention_dropout=0.0)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name)
        return model

    return situations.Place(torch.device("cpu"), build, padded_batch, monkeypatch, exact=True)


SITUATIONS = [
    *((what, name) for what in ("other_examples_for_every_stage", "exchanged_examples") for name in NAMES),
    *(("autocast_between_stages", name) for name in NAMES),
    ("autocast_around_the_forward", "step_graph"),
    ("mixed_precision_of_accelerate", "stage_graph"),
]


@pytest.mark.parametrize(("what", "name"), SITUATIONS)
def test_situation(what, name, situations, place):
    getattr(situations, what)(place, name)


@BOTH
def test_training_on_another_stream(name, situations, place, fake, monkeypatch):
    """The launches are on it; what is recorded beside it waits for it, and it for that."""
    launched, recorded = [], []

    def watch(call, note):
        real = getattr(fake, call)
        monkeypatch.setattr(fake, call, lambda *given: (note(*given), real(*given))[1])

    watch("replay", lambda graph: launched.append(fake.stream))
    watch("exec_launch", lambda executable, stream: launched.append(stream))
    watch("work", lambda *_: recorded.append((fake.stream, list(fake.stream.waited_for))))
    outer = fake.stream
    user = situations.training_on_another_stream(place, name)
    assert len(launched) >= 3 and set(launched) == {user}
    for stream, waited_for in recorded:
        assert stream not in (user, outer)
        assert waited_for[-1] is user and stream in user.waited_for


@BOTH
def test_another_thread_during_a_capture(name, situations, place, fake, monkeypatch):
    modes, threads = [], []
    begin = fake.begin

    class Recorder:
        def capture_begin(self, pool, capture_error_mode):
            modes.append(capture_error_mode)

    def real_begin(graph, pool):
        Cuda.begin(fake, Recorder(), pool)
        begin(graph, pool)

    def work():
        threads.append(threading.get_ident())
        return float(torch.arange(5.0).sum())  # the host waits for a value, which the recording must not

    monkeypatch.setattr(fake, "begin", real_begin)
    loader = DataLoader([place.batch(4, 12, seed=seed) for seed in range(4)], batch_size=None)
    situations.another_thread_during_a_capture(place, name, work, 10.0, loader)
    assert set(modes) == {"thread_local"}
    assert threading.get_ident() not in threads


@pytest.mark.parametrize(("rows", "name"), [(33, "step_graph"), (70, "stage_graph")])
def test_many_examples(rows, name, situations, place):
    situations.many_examples(place, name, rows)
    verdicts = [sure for captured, _ in place.pairs for sure in captured["verdicts"]]
    assert verdicts.count(True) and verdicts.count(False)


@pytest.mark.parametrize(("switch", "name"), [("allow_tf32", "step_graph"), ("all", "stage_graph")])
def test_tf32_between_stages(switch, name, situations, place, default_precision):
    situations.tf32_between_stages(place, name, situations.TF32[switch])


@pytest.mark.parametrize("switch", [None, "high", "products"])
def test_with_tf32_a_stage_may_be_as_far_off_as_it_makes_them(
    switch, situations, place, default_precision, monkeypatch
):
    """A replay off by 5e-5, which another order of sums explains in TF32 and does not in float32."""

    class Apart(ValidationLoss):
        def evaluate_with_sums(self):
            loss, sums = super().evaluate_with_sums()
            return loss * (1 + 5e-5), sums

    def on_a_gpu(validation, device, allowed=graph_check.loss_tolerance):
        return allowed(validation, torch.device("cuda"))

    monkeypatch.setattr(graph_check, "loss_tolerance", on_a_gpu)
    if switch is not None:
        situations.TF32[switch]()
    place.exact = False
    model = place.build()
    validation = Apart(model, [place.batch(6, 16, seed=1)])
    with situations.Training(place, "stage_graph", model, validation) as training:
        if switch is None:
            with pytest.warns(UserWarning, match="given up and run again eagerly: at τ = 0 the graph"):
                training.step()
                training.step()
            assert training.ff.stages[0].executor == "eager"
        else:
            with situations.nothing_said():
                training.stage()


def test_two_models(situations, place, fake):
    situations.two_models(place)
    assert fake.alive() == {}
