from dataclasses import replace

import pytest

from ffkernels.engine.config import FastForwardConfig
from ffkernels.reporting.recorder import read_run
from ffkernels.reporting.report import build_report
from ffkernels.training import compare as module
from ffkernels.training.compare import Comparison, Interrupted, compare
from ffkernels.training.config import TrainConfig

MEASURED_AT = {"batch_size": 64, "max_length": 64}


@pytest.fixture
def comparison(small, tmp_path):
    base = TrainConfig(**{**small, "steps": 24, "evaluate_every": 8, "lr": 3e-4}, out=str(tmp_path))
    return Comparison(base, fast_forward=FastForwardConfig(interval=4), tuned_lr=3e-3)


def test_the_protocol(comparison):
    told = []
    results, protocol = compare(replace(comparison, seeds=(0, 2)), on_run=told.append)
    assert [r.name for r in results] == [
        f"{name}-s{seed}" for seed in (0, 2) for name in ("adam", "linear", "parabolic", "auto", "adam-tuned")
    ]
    assert [c.name for c in told] == [r.name for r in results]
    assert len(told) == replace(comparison, seeds=(0, 2)).runs
    assert protocol["tuned_lr"] == 3e-3 and protocol["tuned_lr_source"] == "option"
    for config, result in zip(told, results, strict=True):
        adam = results[0] if config.seed == 0 else results[5]
        assert result.log.name == f"{config.name}.jsonl" and result.log.is_file()
        assert config.lr == (3e-3 if config.name.startswith("adam-tuned") else 3e-4)
        if result is adam:
            assert result.optimizer_steps == 24 and result.reached_target is None and not result.stages
            continue
        assert config.target_loss == adam.test_loss + 1e-4
        assert config.steps == 24
        assert result.reached_target == (result.test_loss <= config.target_loss)
        assert result.reached_target or result.optimizer_steps == 24
        forward = config.fast_forward
        if forward is not None and forward.interval is None:
            assert (config.name, forward.learning_rate) == (f"auto-s{config.seed}", "auto")
            assert not result.stages and result.validation_forwards == 0
        else:
            assert config.name == f"{forward.search if forward else 'adam-tuned'}-s{config.seed}"
    parabolic = results[2]
    assert parabolic.reached_target and parabolic.optimizer_steps < 24 and parabolic.stages[0].tau > 0
    assert results[0].test_loss != results[5].test_loss


def test_the_sweep_takes_the_rate_that_gets_there_first(comparison, monkeypatch):
    monkeypatch.setattr(module, "SWEEP", (3e-4, 1e-3, 1e-2))
    told = []
    results, protocol = compare(
        replace(comparison, tuned_lr=None, sweep=True, searches=("parabolic",)), on_run=told.append
    )
    names = "adam-s0 parabolic-s0 auto-s0 sweep-0.0003-s0 sweep-0.001-s0 sweep-0.01-s0 adam-tuned-s0".split()
    assert [c.name for c in told] == names
    assert [r.name for r in results] == [name for name in names if not name.startswith("sweep")]
    assert protocol["tuned_lr_source"] == "sweep" and protocol["tuned_lr"] > 3e-4
    assert results[-1].optimizer_steps < 24


def test_the_sweep_runs_no_longer_than_its_best_so_far(comparison, monkeypatch):
    assert set(module.SWEEP) >= {1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2}
    assert module.SWEEP[0] == 1e-2 and list(module.SWEEP)[-4:] == sorted(module.SWEEP)[:4][::-1]
    monkeypatch.setattr(module, "SWEEP", (3e-3, 1e-4, 1e-5))
    adam, told = module.train(comparison.adam(0), save=False), []

    def run(config):
        told.append(config)
        return module.train(config, save=False)

    assert module.sweep(comparison, adam, 0, run) == 3e-3
    assert told[0].steps == 24 and told[1].steps == told[2].steps < 24


def test_peers_run_until_the_same_loss_and_are_judged(comparison, tmp_path):
    told = []
    comparison = replace(comparison, searches=("linear",), peers=("authors", "lora-plus"))
    results, protocol = compare(comparison, on_run=told.append)
    names = ["adam-s0", "linear-s0", "authors-s0", "lora-plus-s0", "auto-s0", "adam-tuned-s0"]
    assert [r.name for r in results] == names and protocol["peers"] == ["authors", "lora-plus"]
    authors, plus = told[2], told[3]
    assert authors.fast_forward is None and plus.fast_forward is None
    assert (authors.optimizer, plus.optimizer) == ("adamw", "lora-plus")
    assert authors.lr == plus.lr == 3e-4
    assert authors.target_loss == plus.target_loss == results[0].test_loss + 1e-4
    assert [stage.optimizer_step % 4 for stage in results[2].stages] == [0] * len(results[2].stages)
    assert results[2].stages[0].executor == "authors" and not results[3].stages

    report = build_report([read_run(str(r.log)) for r in results], tmp_path / "report", config=protocol)
    assert [run["name"] for run in report.data["runs"]] == names
    savings = {entry["name"]: entry for entry in report.data["savings"]}
    assert set(savings) == set(names[1:])
    for result in results[1:]:
        assert (savings[result.name]["flops_measured"] is not None) == result.reached_target
    assert savings["lora-plus-s0"]["flops_measured"] > 0
    (line,) = (caveat for caveat in report.caveats if caveat.startswith("Adam at a tuned learning rate"))
    assert "; Fast Forward linear " in line and "; lora-plus " in line
    assert ("; Adam with no learning rate given " in line) == results[4].reached_target


@pytest.mark.filterwarnings("error::ffkernels.ops.notices.FFKernelsNotice")
def test_the_warm_up_goes_every_way_that_is_measured(comparison, monkeypatch):
    seen, run = [], module.train

    def watched(config, **options):
        seen.append((config, run(config, **options)))
        return seen[-1][1]

    monkeypatch.setattr(module, "train", watched)
    module.warm_up(replace(comparison, peers=("authors", "peft-prototype", "lora-plus")))
    searches = [config.fast_forward and config.fast_forward.search for config, _ in seen]
    assert searches == ["linear", "parabolic", None, None, None, "parabolic"]
    assert [config.optimizer for config, _ in seen] == ["adamw"] * 4 + ["lora-plus", "adamw"]
    config, result = seen.pop()
    assert config.fast_forward == FastForwardConfig(interval=None, learning_rate="auto")
    assert result.optimizer_steps == 2 and not result.stages and not result.log.exists()
    stages = [result.stages for _, result in seen]
    assert [len(of) for of in stages] == [1, 1, 1, 1, 0]
    assert [of[0].executor for of in stages[2:4]] == ["authors", "peft-prototype"]
    assert all(1 < of[0].evaluations <= 5 for of in stages[:4])
    assert not any(result.log.exists() for _, result in seen)


def test_a_peer_has_to_be_one(comparison, monkeypatch):
    with pytest.raises(ValueError, match=r"peers=\('golden',\): must be of 'lora-plus', 'authors'"):
        replace(comparison, peers=("golden",))
    with pytest.raises(ValueError, match="each at most once"):
        replace(comparison, peers=("authors", "authors"))
    with pytest.raises(ValueError, match="the base run is 'lora-plus' itself"):
        replace(comparison, peers=("lora-plus",), base=replace(comparison.base, optimizer="lora-plus"))
    with pytest.raises(ValueError, match="optimizer='lora-plus': must be 'adamw' with method='full'"):
        replace(comparison, peers=("lora-plus",), base=replace(comparison.base, method="full"))
    with monkeypatch.context() as patch:

        def missing(name):
            raise ImportError("the peer 'authors' needs the package so-and-so")

        patch.setattr(module, "load_peer", missing)
        with pytest.raises(RuntimeError, match="needs the package so-and-so"):
            replace(comparison, peers=("authors",))
    monkeypatch.setattr(module, "peer_names", lambda: [])
    monkeypatch.setattr("ffkernels.training.peers.peer_names", lambda: [])
    with pytest.raises(RuntimeError, match="clone the repository"):
        replace(comparison, peers=("authors",))


def test_where_the_tuned_rate_comes_from(comparison):
    base = replace(comparison.base, model="tiny", data=None, rank=8, **MEASURED_AT)
    table = replace(comparison, tuned_lr=None, base=base)
    assert module._tuned_lr(table) == (1e-2, "table")
    assert module._tuned_lr(replace(table, base=replace(base, task="chat"))) == (2e-2, "table")
    untuned = (3e-3, "a usual value, not measured for this model and task")
    assert module._tuned_lr(replace(comparison, tuned_lr=None)) == untuned
    for other in ({"source": "hub"}, {"rank": 64}, {"method": "dora"}, {"optimizer": "lora-plus"}):
        assert module._tuned_lr(replace(table, base=replace(base, **other))) == untuned
    for other in ({"batch_size": 16}, {"max_length": 256}, {"schedule": "linear"}, {"dtype": "bfloat16"}):
        rate, source = module._tuned_lr(replace(table, base=replace(base, **other)))
        assert rate == 1e-2 and source.startswith("measured for this model and task, but not at")
    full = replace(table, base=replace(base, method="full"))
    wider = replace(table, seeds=(0, 1), peers=("lora-plus",))
    assert (table.runs, full.runs, wider.runs) == (5, 15, 12)
    assert module._tuned_lr(full) == (None, "sweep")


@pytest.mark.parametrize("step", [3, 24])
def test_ctrl_c_in_the_last_step_too_and_in_the_warm_up_is_not_lost(comparison, monkeypatch, step):
    def stop(event):
        if event["event"] == "step" and event["optimizer_step"] == step:
            raise KeyboardInterrupt

    told = []
    with pytest.raises(Interrupted, match="adam-s0"):
        compare(comparison, on_run=told.append, on_event=stop)
    assert [c.name for c in told] == ["adam-s0"]

    def interrupted(config, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", interrupted)
    with pytest.raises(Interrupted, match="warm-up"):
        compare(comparison)


def test_an_adam_run_that_diverged_sets_no_target(comparison):
    base = replace(comparison.base, lr=1e30, warmup_steps=0)
    with pytest.raises(ValueError, match=r"lr=1e\+30: adam-s0 diverged after \d+ steps"):
        compare(replace(comparison, base=base))


def test_the_sweep_does_not_take_a_run_that_diverged(comparison, monkeypatch):
    monkeypatch.setattr(module, "SWEEP", (1e-6, 1e30))
    adam = module.train(replace(comparison.adam(0), lr=3e-4), save=False)
    assert module.sweep(comparison, adam, 0, lambda config: module.train(config, save=False)) == 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": ()}, "seeds"),
        ({"seeds": (0, 0)}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"searches": ("golden",)}, "searches"),
        ({"tuned_lr": 0.0}, "tuned_lr"),
        ({"tuned_lr": float("inf")}, "tuned_lr"),
        ({"check_every": 0}, "check_every"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"sweep": True}, "one of them"),  # beside the tuned_lr that is there
    ],
)
def test_a_bad_setting_is_named(comparison, given, message):
    with pytest.raises(ValueError, match=message):
        replace(comparison, **given)
