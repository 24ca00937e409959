"""Is the model as good at a task after Fast Forward as after Adam? Multiple choice by log-likelihood. §5.2.

The model answers with the choice it finds likeliest: by the sum of its tokens' log-probabilities, or by
their mean, which does not favour short choices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ffkernels.analysis.multiple_choice import Question, choice_scores, from_examples, load_benchmark
from ffkernels.analysis.race import race
from ffkernels.analysis.show import Data, Table, Watch
from ffkernels.reporting.plots import LEGEND, STYLES, Figure, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.rules import check, whole
from ffkernels.training.session import Session

SCORES = ("sum", "mean")
MODELS = {"before": "before training", "adam": "after Adam", "ff": "after Fast Forward"}
# The 97.5 % quantile of the normal distribution.
Z95 = 1.959963984540054
# Tokens per question at most where a benchmark is read and the model itself would take more.
LONGEST = 1024


def accuracy(
    config: TrainConfig,
    *,
    benchmark: str | None = None,
    questions: int = 200,
    choices: int = 4,
    opening: float = 0.5,
    max_question_length: int | None = None,
    check_every: int = 3,
    watch: Watch | None = None,
) -> Data:
    """Accuracy on multiple choice before training, after Adam and after Fast Forward (the paper's §5.2).

    Args:
        config: the Adam run; its ``fast_forward`` is when and how the stages search.
        benchmark: a JSONL file, ``"pubmedqa"``, or None for questions made from the task's test examples;
            see ``multiple_choice``.
        questions: how many at most.
        choices, opening: of questions made from test examples; see ``multiple_choice.from_examples``.
        max_question_length: tokens of a prompt and a choice together, where a benchmark is given; None takes
            what the model can, at most 1,024.
        check_every: optimizer steps between test losses of the Fast Forward run.

    Returns:
        ``questions`` (how many), ``choices`` (least, most), ``chance``; ``models``, of "before", "adam" and
        "ff": ``optimizer_steps``, ``test_loss``, and under "sum" and "mean" what ``wilson`` gives;
        ``paired``, under "sum" and "mean" what ``mcnemar`` gives; ``adam`` and ``ff`` (see ``race.outcome``).

    Raises:
        ValueError, RuntimeError: when the benchmark cannot be read; the message names the line.
    """
    check("questions", questions, whole(1))
    asked: list[Question] = []
    answers: dict[str, dict[str, list[bool]]] = {}
    current: list[Session] = []

    def ask(name: str) -> None:
        model, pad = current[0].model, current[0].tokenizer.pad_token_id
        answers[name] = answered(asked, choice_scores(model, asked, pad_token_id=pad))

    def begin(session: Session) -> None:
        current[:] = [session]
        if asked:
            return
        if benchmark is None:
            how = {"choices": choices, "opening": opening, "limit": questions, "seed": config.seed}
            asked.extend(from_examples(session.task.test, **how))
        else:
            limit = getattr(session.model.config, "max_position_embeddings", None) or LONGEST
            length = max_question_length or min(LONGEST, limit)
            if length > limit:
                raise ValueError(f"max_question_length={length}: this model takes {limit} tokens at most")
            how = {"max_length": length, "limit": questions, "seed": config.seed}
            asked.extend(load_benchmark(benchmark, session.tokenizer, **how))
        ask("before")

    def end(name: str) -> None:
        ask(name)
        current.clear()  # the next model may need its memory

    config = config.with_fast_forward()
    stages, watched = {"ff": config.fast_forward}, {"watch": watch, "on_session": begin, "on_end": end}
    trained = race(config, stages, check_every=check_every, **watched)
    counts = [len(question.choices) for question in asked]
    untrained = {"optimizer_steps": 0, "test_loss": None}
    return {
        "benchmark": str(benchmark) if benchmark else f"{config.data or config.task}, held-out examples",
        "questions": len(asked),
        "choices": [min(counts), max(counts)],
        "chance": sum(1 / count for count in counts) / len(counts),
        "config": config.to_dict(),
        "models": [
            {
                "name": name,
                **{key: trained.get(name, untrained)[key] for key in untrained},
                **{score: wilson(sum(answers[name][score]), len(asked)) for score in SCORES},
            }
            for name in MODELS
        ],
        "paired": {score: mcnemar(answers["adam"][score], answers["ff"][score]) for score in SCORES},
        **trained,
    }


def answered(questions: Sequence[Question], scores: Sequence[Sequence[float]]) -> dict[str, list[bool]]:
    """Which questions are answered rightly, by the summed and by the mean log-likelihood per token."""
    right: dict[str, list[bool]] = {"sum": [], "mean": []}
    for question, sums in zip(questions, scores, strict=True):
        means = [total / len(choice) for total, choice in zip(sums, question.choices, strict=True)]
        for name, values in (("sum", sums), ("mean", means)):
            right[name].append(max(range(len(values)), key=values.__getitem__) == question.answer)
    return right


def wilson(correct: int, n: int) -> dict[str, float]:
    """``correct`` of ``n`` as an accuracy with Wilson's 95 % score interval (1927)."""
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"correct={correct!r} of n={n!r}: must be counts, correct <= n and n at least 1")
    share, z2 = correct / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At 0 and n of n the ends are 0 and 1; rounding would leave them beyond by an ulp.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == n else centre + half
    return {"correct": correct, "accuracy": share, "low": low, "high": high}


def mcnemar(adam: Sequence[bool], ff: Sequence[bool]) -> dict[str, float]:
    """The two trainings on the same questions; ``p`` of McNemar's exact two-sided test (1947).

    Under equal accuracy, who is right where only one is, is a fair coin; ``p`` is how often it would be at
    least as one-sided.
    """
    pairs = Counter(zip(map(bool, adam), map(bool, ff), strict=True))
    adam_only, ff_only = pairs[True, False], pairs[False, True]
    n = adam_only + ff_only
    tail = sum(math.comb(n, k) for k in range(min(adam_only, ff_only) + 1))
    counts = {"adam_only": adam_only, "ff_only": ff_only, "both": pairs[True, True]}
    return {**counts, "neither": pairs[False, False], "p": min(1.0, 2 * tail / 2**n)}


def table(data: Data) -> Table:
    header = ["model", "optimizer steps", "test loss", "accuracy, sum", "95 %", "accuracy, mean", "95 %"]
    rows = []
    for model in data["models"]:
        cells = []
        for one in (model[score] for score in SCORES):
            cells.append(f"{100 * one['accuracy']:.1f} %")
            cells.append(f"{100 * one['low']:.1f} – {100 * one['high']:.1f}")
        rows.append([MODELS[model["name"]], model["optimizer_steps"], model["test_loss"], *cells])
    return header, rows


def what_was_seen(data: Data) -> list[str]:
    seen = []
    for score, words in (("sum", "By summed log-likelihood"), ("mean", "By the mean per token")):
        pair = data["paired"][score]
        seen.append(
            f"{words}, Adam alone is right on {pair['adam_only']} of {data['questions']} questions and Fast "
            f"Forward alone on {pair['ff_only']} (McNemar's exact test: p = {pair['p']:.2g})."
        )
    if not data["ff"]["reached"]:
        seen.append("Fast Forward did not reach Adam's test loss in Adam's number of steps.")
    return seen


def draw(figure: Figure, data: Data) -> None:
    """Accuracies with their 95 % intervals, and chance."""
    figure.set_size_inches(6.4, 4.0)
    axes = figure.add_subplot()
    clean_axes(axes, y=f"accuracy (%), {data['questions']} questions, 95 % intervals")
    scores = {"sum": ("summed log-likelihood", "parabolic"), "mean": ("mean per token", "linear")}
    places = range(len(data["models"]))
    for shift, (score, (label, kind)) in zip((-0.1, 0.1), scores.items(), strict=True):
        found = [model[score] for model in data["models"]]
        middle = [100 * one["accuracy"] for one in found]
        ends = [
            [100 * (one["accuracy"] - one["low"]) for one in found],
            [100 * (one["high"] - one["accuracy"]) for one in found],
        ]
        style = {"color": STYLES[kind]["color"], "fmt": STYLES[kind]["marker"], "markersize": 7, "capsize": 4}
        axes.errorbar([x + shift for x in places], middle, yerr=ends, **style, label=label)
    chance = 100 * data["chance"]
    axes.axhline(chance, color=STYLES["adam"]["color"], linewidth=1, linestyle=":")
    place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 4), "textcoords": "offset points"}
    axes.annotate("chance", (1, chance), **place, ha="right", fontsize=9)
    axes.set_xticks(places, labels=[MODELS[model["name"]] for model in data["models"]])
    axes.set_xlim(-0.5, len(places) - 0.5)
    highest = max(model[score]["high"] for model in data["models"] for score in SCORES)
    axes.set_ylim(0, min(100, 125 * highest))  # room for the legend
    axes.legend(loc="upper left", **LEGEND)
