"""Captured stages on a stand-in for CUDA: the eager stage, bit for bit, or nothing at all."""

import copy
import math
import signal
import weakref
from functools import partial

import pytest
import torch
from small_loops import descend
from torch import nn

from ffkernels import FastForward, FastForwardConfig, ValidationLoss, ops
from ffkernels.graphs import check as graph_check
from ffkernels.graphs import core as graphs
from ffkernels.graphs import executors as graph_executors
from ffkernels.graphs.executors import GraphUnsafe, StageGraphExecutor, StepGraphExecutor
from ffkernels.ops import condition
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.search.search import make_search
from ffkernels.stage.eager import EagerExecutor
from ffkernels.stage.program import NO_UPDATE, UPDATE_NOT_FINITE, StageProgram

GRAPHS = {"step_graph": StepGraphExecutor, "stage_graph": StageGraphExecutor}
BOTH = pytest.mark.parametrize("name", GRAPHS)
DEVICE = torch.device("cpu")


class Landscape(nn.Module):
    """A bowl with waves on it: where and how often the loss falls depends on the seed."""

    def __init__(self, seed, dtype=torch.float32):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(5, 3, generator=draw).to(dtype))
        self.b = nn.Parameter(torch.randn(7, generator=draw).to(dtype))
        self.register_buffer("target", torch.randn(22, generator=draw))
        self.waves = 10.0 ** (seed % 4 - 2)
        self.drop = nn.Dropout(0.5)
        self.seed = seed

    def forward(self):
        flat = torch.cat([self.a.flatten(), self.b]).float() - self.target
        return (flat**2).sum() + self.waves * torch.sin(40 * flat).sum()

    def update(self, size=1e-2):
        draw = torch.Generator().manual_seed(self.seed + 1)
        with torch.no_grad():
            flat = torch.cat([self.a.flatten(), self.b]).float() - self.target
            step = -size * flat + 0.2 * size * torch.randn(22, generator=draw)
            self.a.add_(step[:15].view(5, 3).to(self.a.dtype))
            self.b.add_(step[15:].to(self.b.dtype))


def call(model):
    return model()


class Setting:
    """One model behind one table; `stage(executor)` is one optimizer step and one stage."""

    def __init__(
        self, seed=0, search="parabolic", max_tau=64, loss=call, dtype=torch.float32, validation=None
    ):
        self.model = Landscape(seed, dtype)
        self.validation = validation(self.model) if validation else ValidationLoss(self.model, loss)
        self.table = ops.TensorTable(dict(self.model.named_parameters()), impl="torch")
        self.search, self.max_tau, self.start = search, max_tau, 1

    def program(self, size=1e-2):
        ops.checkpoint_(self.table)
        self.model.update(size)
        return StageProgram(self.table, self.validation, make_search(self.search, self.max_tau, self.start))

    def stage(self, executor, size=1e-2):
        program = self.program(size)
        executor.run(program)
        return self.outcome(program)

    def weights(self):
        return [weight.detach().clone() for weight in self.table.weights]

    def is_at(self, weights, best=None):
        assert all(map(torch.equal, self.weights(), weights))
        assert best is None or all(map(torch.equal, self.table.best_flats, best))

    def outcome(self, program):
        search = program.search
        found = (repr(search.losses), search.best_tau, search.best_loss, program.reason, program.moves)
        return found, [weight.tolist() for weight in self.table.weights]


@pytest.mark.parametrize("search", ["linear", "parabolic"])
@BOTH
def test_the_eager_stage_bit_for_bit(name, search, fake):
    executors = {"eager": EagerExecutor(), "graph": GRAPHS[name]()}
    taus = set()
    for seed in range(12):
        dtype = torch.bfloat16 if seed % 3 == 2 else torch.float32
        settings = {
            key: Setting(seed, search, max_tau=[1, 7, 64][seed % 3], dtype=dtype) for key in executors
        }
        executors["graph"] = GRAPHS[name]()
        for _ in range(2):
            found = {key: settings[key].stage(executors[key]) for key in executors}
            assert found["graph"] == found["eager"]
            taus.add(found["eager"][0][1])
        executors["graph"].close()
    assert len(taus) > 4 and 0 in taus
    assert fake.alive() == {}


@BOTH
def test_one_launch_per_step_or_per_stage(name, fake):
    setting, executor = Setting(), GRAPHS[name]()
    for stage in range(3):
        fake.launches.clear()
        fake.calls.clear()
        program = setting.program()
        executor.run(program)
        evaluations = len(program.search.losses)
        assert evaluations > 3
        if name == "step_graph":
            assert fake.launches == ["replay"] * evaluations
        else:
            assert fake.launches == ["while"]
            assert fake.iterations[-1] == evaluations
        assert executor.captures == 1 and ("begin" in fake.calls) == (stage == 0)


def test_a_step_graph_is_ready_before_its_first_replay_and_that_is_part_of_the_capture(fake, monkeypatch):
    now, ready = [0.0], fake.instantiate

    def takes_seven_seconds(graph):
        now[0] += 7.0
        ready(graph)

    monkeypatch.setattr(graph_executors, "perf_counter", lambda: now[0])
    monkeypatch.setattr(fake, "instantiate", takes_seven_seconds)
    setting, executor = Setting(), StepGraphExecutor()
    for _ in range(2):
        setting.stage(executor)
        assert fake.calls.count("instantiate") == 1
        assert fake.calls.index("instantiate") < fake.calls.index("replay")
    assert executor.capture_seconds == 7.0
    fake.calls.clear()
    setting.stage(StageGraphExecutor())
    assert "instantiate" not in fake.calls, "of a whole stage the parts are copied, not launched"


@BOTH
def test_a_gradient_kept_across_a_captured_stage_is_refused(name, fake, monkeypatch):
    setting, executor = Setting(), GRAPHS[name]()
    run, written = fake.graph_class.run, (*setting.table.weights, *setting.table.best_flats)

    def unseen(graph):  # on a GPU nobody counts what a graph writes
        with torch.autograd._unsafe_preserve_version_counter(written):
            run(graph)

    monkeypatch.setattr(fake.graph_class, "run", unseen)
    setting.stage(executor)
    for size, moved in ((0.0, False), (1e-2, True)):
        program = setting.program(size)
        kept = sum((weight**2).sum() for weight in setting.table.weights)
        best = [flat._version for flat in setting.table.best_flats]
        executor.run(program)
        assert bool(program.search.losses) is moved
        assert all(flat._version > old for flat, old in zip(setting.table.best_flats, best, strict=True))
        if moved:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                kept.backward()
        else:
            kept.backward()


@pytest.mark.parametrize("way", condition.WAYS)
def test_a_stage_is_the_same_in_whatever_way_its_condition_is_set(way, fake, monkeypatch):
    monkeypatch.setattr(condition, "_ways", {0: way})
    eager, captured, executor = Setting(), Setting(), StageGraphExecutor()
    for size in (1e-2, 0.0, 1e-2):
        assert captured.stage(executor, size) == eager.stage(EagerExecutor(), size)
    assert ("add_kernel" in fake.calls) == (way == "behind")
    executor.close()
    assert fake.alive() == {}


@BOTH
def test_another_start_needs_no_other_capture(name, fake):
    eager, captured, executor = Setting(), Setting(), GRAPHS[name]()
    for start in (1, 20, 500, 3, 1):
        eager.start = captured.start = start
        expected = eager.stage(EagerExecutor())
        assert captured.stage(executor) == expected
        assert "(0, " in expected[0][0] and f", ({min(start, 64)}, " in expected[0][0]
    assert executor.captures == 1


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_replays_ahead_of_the_answer_change_nothing(ahead, fake):
    eager, ahead_of_it = Setting(3), Setting(3)
    executor = StepGraphExecutor(ahead=ahead)
    for _ in range(2):
        fake.launches.clear()
        expected = eager.stage(EagerExecutor())
        assert ahead_of_it.stage(executor) == expected
        assert len(fake.launches) == expected[0][4] + ahead


@pytest.mark.parametrize("ahead", [-1, 1.0, True])
def test_ahead_is_a_count(ahead):
    with pytest.raises(ValueError, match=r"ahead=.*: must be an integer of at least 0"):
        StepGraphExecutor(ahead=ahead)


@BOTH
def test_a_stage_with_nothing_to_search(name, fake):
    setting, executor = Setting(), GRAPHS[name]()
    program = setting.program(size=0.0)
    before = setting.weights()
    executor.run(program)
    assert (program.reason, program.search.losses, program.moves) == (NO_UPDATE, [], 0)
    setting.is_at(before)
    # It proved nothing: the next stage is checked, and with it the graph goes on.
    assert not executor._proved
    twin = Setting()
    twin.program(size=0.0)
    assert setting.stage(executor) == twin.stage(EagerExecutor())
    assert executor._proved and executor.captures == 1
    setting.model.update = lambda size: setting.model.a.data.fill_(math.nan)
    program = setting.program()
    executor.run(program)
    assert (program.reason, program.search.losses) == (UPDATE_NOT_FINITE, [])


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_baseline_that_is_not_finite(name, bad, fake):
    settings = [Setting(loss=lambda model: model() * bad) for _ in range(2)]
    assert repr(settings[0].stage(GRAPHS[name]())) == repr(settings[1].stage(EagerExecutor()))


@BOTH
def test_modes_random_numbers_and_gradients_stay_as_they_were(name, fake):
    modes = []

    def loss(model):
        # A loop holds no random numbers; and what stands for a replay calls this again, in training mode.
        if fake.capturing is None and not model.training:
            torch.rand(3)
        modes.append((fake.capturing is not None, model.training, torch.is_grad_enabled()))
        return model()

    setting, executor = Setting(loss=loss), GRAPHS[name]()
    setting.model.train()
    setting.model.drop.eval()
    setting.model().backward()
    gradient, random = setting.model.b.grad.clone(), torch.get_rng_state()
    setting.stage(executor)
    assert setting.model.training and not setting.model.drop.training
    assert torch.equal(setting.model.b.grad, gradient)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert (True, False, False) in modes, "captured as an evaluation"


ALWAYS = "new_stream new_pool claim_workspaces in_pool new_graph begin work end"
CALLS = {
    "step_graph": "instantiate",
    "stage_graph": "graph_create handle_create node_types raw add_child add_while exec_create",
}
FAULTS = [(name, which) for name in GRAPHS for which in f"{ALWAYS} {CALLS[name]}".split()]


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(("name", "which"), dict.fromkeys(FAULTS))
def test_a_capture_that_fails_anywhere_has_not_happened(name, which, after, fake):
    setting, executor = Setting(), GRAPHS[name]()
    program = setting.program()
    before = setting.weights(), [flat.clone() for flat in setting.table.best_flats]
    random = torch.get_rng_state()
    fake.fail(which, after=after)
    try:
        executor.run(program)
    except graphs.CaptureFailed as failure:
        assert "PLANTED" in str(failure)
        setting.is_at(*before)
        assert program.search.losses == [] and setting.model.training
        assert torch.equal(torch.get_rng_state(), random)
        assert fake.alive() == {}
        EagerExecutor().run(program)
    else:
        assert after and which not in fake.calls[fake.calls.index(which) + 1 :], "a call that is made once"
    assert setting.outcome(program) == Setting().stage(EagerExecutor())


@BOTH
@pytest.mark.parametrize("where", ["launch", "read"])
def test_a_first_stage_that_fails_is_undone(name, where, fake, monkeypatch):
    setting, executor = Setting(), GRAPHS[name]()
    program = setting.program()
    before = setting.weights()
    if where == "launch":
        fake.fail("replay" if name == "step_graph" else "exec_launch", after=2 if name == "step_graph" else 0)
    else:
        monkeypatch.setattr(fake.decide.DecideState, "read", lambda state: 1 / 0)
    with pytest.raises(GraphUnsafe, match=r"in its first stage: .*(PLANTED|division)"):
        executor.run(program)
    setting.is_at(before)
    assert fake.alive() == {}
    EagerExecutor().run(program)
    assert setting.outcome(program) == Setting().stage(EagerExecutor())


class Lying(ValidationLoss):
    """What is captured is not what is called."""

    def evaluate(self):
        return super().evaluate() * 1.001


FAULTY_MOVES = {
    "frozen": lambda real, table, accept, k: None,
    "too far": lambda real, table, accept, k: real(table, accept, k * 1.5),
    "too far in the end": lambda real, table, accept, k: real(table, accept, k + (k == 0)),
}


@BOTH
@pytest.mark.parametrize("fault", [*FAULTY_MOVES, "lying"])
@pytest.mark.parametrize("search", ["linear", "parabolic"])
def test_the_check_finds_a_graph_that_does_something_else(name, fault, search, fake, monkeypatch):
    lying = (lambda model: Lying(model, call)) if fault == "lying" else None
    setting = Setting(search=search, validation=lying)
    if fault != "lying":  # only while replayed
        real, run = ops.step_, fake.graph_class.run

        def wrong(graph):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ops, "step_", partial(FAULTY_MOVES[fault], real))
                run(graph)

        monkeypatch.setattr(fake.graph_class, "run", wrong)
    program = setting.program()
    before = setting.weights(), [flat.clone() for flat in setting.table.best_flats]
    executor = GRAPHS[name]()
    with pytest.raises(GraphUnsafe):
        executor.run(program)
    setting.is_at(*before)
    program.restart()
    EagerExecutor().run(program)
    assert setting.outcome(program) == Setting(search=search).stage(EagerExecutor())


def test_the_check_allows_what_another_order_of_sums_may_change(fake):
    class Close(ValidationLoss):
        def evaluate(self):
            return super().evaluate() * (1 + 3e-6)

    StageGraphExecutor().run(Setting(validation=lambda model: Close(model, call)).program())


@pytest.mark.parametrize(
    ("dtypes", "allowed"),
    [((torch.float32,), 1e-5), ((torch.float32, torch.bfloat16), 5e-3), ((torch.float16,), 1e-3)],
)
def test_the_coarsest_precision_sets_the_tolerance(dtypes, allowed):
    model = nn.ParameterList(torch.zeros(2, dtype=dtype) for dtype in dtypes)
    validation = ValidationLoss(model, lambda model: 0.0)
    assert graph_check.loss_tolerance(validation, DEVICE) == allowed
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert graph_check.loss_tolerance(validation, DEVICE) == 5e-3


def test_the_autocast_of_trainings_forward_sets_the_tolerance_too():
    model = nn.Linear(2, 1)
    validation = ValidationLoss(model, lambda model: 0.0)
    handles = validation.evaluator.listen(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.zeros(1, 2))
    assert graph_check.loss_tolerance(validation, DEVICE) == 5e-3
    for handle in handles:
        handle.remove()


def tampered(fake, monkeypatch, change):
    real = fake.decide.DecideState.read

    def read(state):
        decided = real(state)
        return type(decided)(**{**vars(decided), **change(decided)})

    monkeypatch.setattr(fake.decide.DecideState, "read", read)


CHANGES = {
    "another τ": lambda decided: {"losses": [(0, decided.losses[0][1]), (2, 1.0)]},
    "went on": lambda decided: {"losses": [*decided.losses, (9, 1.0)]},
    "stopped early": lambda decided: {"losses": decided.losses[:-1]},
    "another best τ": lambda decided: {"best_tau": decided.best_tau + 1},
    "no record": lambda decided: {"losses": [], "stopped_because": None},
}


@BOTH
@pytest.mark.parametrize("change", CHANGES)
def test_a_record_that_the_host_would_not_have_made(name, change, fake, monkeypatch):
    setting, executor = Setting(), GRAPHS[name]()
    with monkeypatch.context() as patch:
        tampered(fake, patch, CHANGES[change])
        with pytest.raises(GraphUnsafe):
            executor.run(setting.program())
    # Later there is no copy to go back to: the device's result stays, and the fault is told.
    setting, executor = Setting(), GRAPHS[name]()
    setting.stage(executor)
    tampered(fake, monkeypatch, CHANGES[change])
    program = setting.program()
    executor.run(program)
    assert executor.fault and program.reason
    assert all(map(torch.equal, setting.table.weights, setting.table.best))


def interrupt():
    signal.raise_signal(signal.SIGINT)


def interrupted_after(runs, fake, monkeypatch):
    """A graph's run number ``runs`` ends in a Ctrl-C."""
    run, count = fake.graph_class.run, iter(range(100))

    def interrupted(graph):
        run(graph)
        if next(count) == runs:
            interrupt()

    monkeypatch.setattr(fake.graph_class, "run", interrupted)


@BOTH
def test_ctrl_c_leaves_the_best_weights_and_the_record_so_far(name, fake, monkeypatch):
    setting, executor = Setting(search="linear"), GRAPHS[name]()
    setting.stage(executor)
    expected = Setting(search="linear")
    expected.stage(EagerExecutor())
    whole = expected.program()
    EagerExecutor().run(whole)
    losses = whole.search.losses
    interrupted_after(3, fake, monkeypatch)
    program = setting.program()
    with pytest.raises(KeyboardInterrupt):
        executor.run(program)
    seen = 4 if name == "step_graph" else len(losses)
    assert program.search.losses == losses[:seen]
    assert all(map(torch.equal, setting.table.weights, setting.table.best))
    assert setting.validation().item() == min(losses[:seen], key=lambda pair: pair[1])[1]


@BOTH
def test_ctrl_c_in_a_stage_that_is_not_proved_leaves_the_optimizers_weights(name, fake, monkeypatch):
    setting, executor = Setting(), GRAPHS[name]()
    program = setting.program()
    before = setting.weights()
    interrupted_after(0, fake, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        executor.run(program)
    setting.is_at(before)
    assert program.search.losses == [] and fake.alive() == {}


@BOTH
def test_ctrl_c_during_a_capture_waits_for_its_end(name, fake):
    setting, executor = Setting(loss=lambda model: interrupt() or model()), GRAPHS[name]()
    program = setting.program()
    before = setting.weights()
    with pytest.raises(KeyboardInterrupt):
        executor.run(program)
    assert all(map(torch.equal, setting.weights(), before)) and setting.model.training
    executor.close()
    assert fake.alive() == {}


@BOTH
def test_another_table_search_or_precision_is_captured_again(name, fake):
    setting, executor = Setting(), GRAPHS[name]()
    setting.stage(executor)

    def again(told):
        with pytest.warns(FFKernelsNotice, match=f"captured again: {told}"):
            setting.stage(executor)

    setting.table = ops.TensorTable(dict(setting.model.named_parameters()), impl="torch")
    again("the table of the weights")
    setting.model.a.data = setting.model.a.data.clone()
    setting.table = ops.TensorTable(dict(setting.model.named_parameters()), impl="torch")
    again(r"the address of Landscape\.a")
    setting.search = "linear"
    again("the search")
    assert executor.captures == 4 == graph_executors.MAX_CAPTURES
    setting.max_tau = 5
    program = setting.program()
    before = setting.weights()
    with pytest.raises(GraphUnsafe, match="went out of date 4 times"):
        executor.run(program)
    setting.is_at(before)
    executor.close()
    assert fake.alive() == {}


@BOTH
def test_a_table_that_followed_its_weights_is_captured_again(name, fake):
    found = {}
    for key, executor in (("eager", EagerExecutor()), ("graph", GRAPHS[name]())):
        setting = Setting()
        setting.stage(executor)
        program = setting.program()
        for parameter in setting.model.parameters():
            parameter.data = parameter.data.clone()
        assert setting.table.is_stale() and setting.table.follow() and not setting.table.is_stale()
        executor.run(program)
        found[key] = setting.outcome(program)
    assert found["graph"] == found["eager"]
    assert executor.captures == 2
    executor.close()
    assert fake.alive() == {}


@BOTH
def test_what_is_compared_by_id_lives_as_long_as_the_graphs(name, fake):
    """Else another forward may get the id of the one that was captured, and pass for it."""
    setting, executor = Setting(), GRAPHS[name]()
    model = setting.model
    model.forward = lambda: Landscape.forward(model)
    captured = weakref.ref(model.forward)
    setting.stage(executor)
    del model.forward
    assert captured() is not None
    executor.close()
    assert captured() is None


@BOTH
def test_another_validation_loss_of_the_same_model_is_captured_again(name, fake):
    setting, twin, executor = Setting(), Setting(), GRAPHS[name]()
    assert setting.stage(executor) == twin.stage(EagerExecutor())
    for each in (setting, twin):
        each.validation = ValidationLoss(each.model, lambda model: 2 * model())
    with pytest.warns(FFKernelsNotice, match="captured again: the validation loss"):
        found = setting.stage(executor)
    assert found == twin.stage(EagerExecutor())
    assert executor.captures == 2
    executor.close()


@BOTH
def test_what_is_captured_is_given_back_and_may_be_captured_again(name, fake):
    setting, twin, executor = Setting(), Setting(), GRAPHS[name]()
    for _ in range(2):
        assert setting.stage(executor) == twin.stage(EagerExecutor())
        assert fake.alive()
        executor.close()
        executor.close()
        assert fake.alive() == {}


# ---- behind FastForward, on a transformers model with an adapter ----


def lora_model(tiny_model, dora=False, dtype=torch.float32):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", attention_dropout=0.0).to(dtype)
    torch.manual_seed(0)
    adapter = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=dora, init_lora_weights=False
    )
    return peft.get_peft_model(model, adapter)


def train(model, batch, executor, steps=4, change=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    validation = ValidationLoss(model, [batch(4, 16, seed=1)])
    config = FastForwardConfig(interval=2, executor=executor, max_tau=16, patience=None)
    ff = FastForward(model, optimizer, validation, config)
    for step in range(steps):
        if change is not None and step == steps // 2:
            change(model)
        descend(optimizer, model(**batch(4, 16, seed=2 + step)).loss)
    return ff


def results(ff, model):
    stages = [(s.optimizer_step, s.tau, repr(s.losses), s.stopped_because) for s in ff.stages]
    return stages, [p.tolist() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_end_with_the_same_weights_and_records(dora, dtype, fake, tiny_model, padded_batch):
    found = {}
    for name in ("eager", *GRAPHS):
        model = lora_model(tiny_model, dora, dtype)
        with train(model, padded_batch, name) as ff:
            found[name] = results(ff, model)
            assert [stage.executor for stage in ff.stages] == [name] * 2
            assert ff.stages[0].executor_reason == "asked for"
            assert ff.stages[1].evaluations > 1
            assert all(s.validate_seconds + s.move_seconds <= s.seconds for s in ff.stages)
        assert fake.alive() == {}
    assert found["step_graph"] == found["stage_graph"] == found["eager"]


def second_adapter(model):
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))


def rescale(model):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2


def reload(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def move(model, trainable):
    for parameter in model.parameters():
        if parameter.requires_grad == trainable:
            parameter.data = parameter.data.clone()


@BOTH
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (rescale, "scaling"),
        (partial(move, trainable=False), "address"),
        (partial(move, trainable=True), "address"),
        (second_adapter, "adapter layer|modules|tensors"),
    ],
    ids=["scale", "frozen moved", "trainable moved", "second adapter"],
)
def test_a_changed_model_is_captured_again(name, change, told, fake, tiny_model, padded_batch):
    model, twin = lora_model(tiny_model), lora_model(tiny_model)
    with pytest.warns(FFKernelsNotice, match=f"captured again: .*({told})") as said:
        ff = train(model, padded_batch, name, change=change)
    assert [stage.executor for stage in ff.stages] == [name] * 2
    assert not any("the trainable parameters changed" in str(w.message) for w in said)
    assert results(ff, model) == results(train(twin, padded_batch, "eager", change=change), twin)
    assert fake.alive()["pools"] == 1
    ff.detach()
    assert fake.alive() == {}


@BOTH
def test_weights_that_were_replaced_are_captured_again(name, fake, tiny_model, padded_batch):
    """A loaded state with tensors of its own leaves the optimizer without weights: the loop makes anew."""
    found = {}
    for executor in ("eager", name):
        model = lora_model(tiny_model)
        with train(model, padded_batch, executor, steps=2) as ff:
            first = results(ff, model)
        reload(model)
        with train(model, padded_batch, executor, steps=2) as ff:
            found[executor] = (first, results(ff, model))
    assert found[name] == found["eager"]
    assert fake.alive() == {}


def test_a_stage_switched_off_by_patience_gives_the_graph_back(fake):
    model = Landscape(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    config = FastForwardConfig(interval=1, executor="stage_graph", patience=2)
    ff = FastForward(model, optimizer, lambda model: -(model.a**2).sum() * 0 + model.a.sum() * 0, config)
    for _ in range(3):
        model.a.grad = torch.ones_like(model.a)
        optimizer.step()
        model.a.grad = None
    assert [stage.tau for stage in ff.stages] == [0, 0] and not ff.active
    assert fake.alive() == {}
