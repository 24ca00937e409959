"""What people train with: each row of the table in docs/integrations.md, on a model of a few hundred weights.

In a Trainer the loss that a stage ends with is what the Trainer reports next as ``eval_loss``.
"""

import copy
import functools
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from ffkernels import FastForward, FastForwardCallback, FastForwardConfig, ValidationLoss
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.training.step_flops import StepFlops
from ffkernels.validation.flops import count_flops

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

DOC = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
EVERY_2 = FastForwardConfig(interval=2, patience=None, max_tau=8)
WORKS, LINE, REFUSED = "as it is", "with this line", "refused"
ROWS = {}
LAYER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def row(name, verdict):
    def keep(function):
        ROWS[name] = (verdict, function)
        return function

    return keep


@pytest.fixture
def options(arguments):
    steps = {"max_steps": 2, "lr_scheduler_type": "linear"}
    return {**arguments, **steps, "per_device_eval_batch_size": 4}


def numbers(seed, *shape, high=None):
    generator = torch.Generator().manual_seed(seed)
    if high is None:
        return torch.randn(*shape, generator=generator)
    return torch.randint(3, high, shape, generator=generator)


def small(name, **changes):
    """A model of transformers with one layer of width 16, without dropout."""
    sizes = {**LAYER, **SPECIAL, "vocab_size": 40, "num_key_value_heads": 2, **changes}
    sizes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **sizes}
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**sizes))


def train(model, data, options, cls=Trainer, callback=None, weighed_by_examples=True, **given):
    """Train two steps with a stage after the second, which ends with the Trainer's eval_loss."""
    names = {k: given.pop(k) for k in list(given) if k in ("data_collator", "compute_loss_func")}
    callback = callback or FastForwardCallback(config=EVERY_2)
    args = given.pop("args", TrainingArguments)(**{**options, **given})
    data = data if isinstance(data, tuple) else (data[:8], data[8:])
    trainer = cls(model, args, train_dataset=data[0], eval_dataset=data[1], callbacks=[callback], **names)
    trainer.train()
    (stage,) = callback.stages
    if weighed_by_examples:
        assert stage.loss_after == pytest.approx(trainer.evaluate()["eval_loss"], rel=2e-5)
    return trainer, stage


def texts(count=16, labels=lambda i: None):
    rows = [
        {"input_ids": numbers(i, 7, high=40), "attention_mask": torch.ones(7).long()} for i in range(count)
    ]
    return [{**r, "labels": r["input_ids"] if labels(i) is None else labels(i)} for i, r in enumerate(rows)]


@row("`Trainer`, a causal language model", WORKS)
def causal(options):
    train(small("LlamaForCausalLM"), texts(), options)


@row("an `IterableDataset`, a dict of evaluation sets", WORKS)
def streams(options):
    class Stream(IterableDataset):
        def __len__(self):
            return 16

        def __iter__(self):
            return iter(texts())

    train(small("LlamaForCausalLM"), (Stream(), Stream()), options)
    train(small("LlamaForCausalLM"), (texts(), {"a": texts()}), options, weighed_by_examples=False)


@row("classification of texts, tokens, choices", WORKS)
def classification(options):
    def choices(i):
        return {"input_ids": numbers(i, 4, 5, high=40), "labels": torch.tensor(i % 4)}

    train(small("BertForSequenceClassification"), texts(labels=lambda i: torch.tensor(i % 2)), options)
    train(small("BertForTokenClassification"), texts(labels=lambda i: torch.arange(7) % 2), options)
    train(small("BertForMultipleChoice"), [choices(i) for i in range(16)], options)


@row("vision", WORKS)
def vision(options):
    def example(i):
        return {"pixel_values": numbers(i, 3, 8, 8), "labels": (numbers(i, 3) > 0).float()}

    sizes = {"image_size": 8, "patch_size": 4, "num_labels": 3, "problem_type": "multi_label_classification"}
    train(small("ViTForImageClassification", **sizes), [example(i) for i in range(16)], options)


class Detector(nn.Module):
    """Labels are a list of dicts, as transformers' detectors take them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 4)

    def forward(self, pixel_values, labels=None):
        found = self.head(pixel_values)
        pairs = zip(found, labels, strict=True)
        return {"loss": torch.stack([F.mse_loss(f, label["boxes"].mean(0)) for f, label in pairs]).mean()}


@row("detection: `labels` is a list of dicts", WORKS)
def detection(options):
    def example(i):
        return {"pixel_values": numbers(i, 4), "labels": {"boxes": numbers(i, 1 + i % 3, 4)}}

    def collate(items):
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "labels": [item["labels"] for item in items],
        }

    data = [example(i) for i in range(16)]
    train(Detector(), data, options, data_collator=collate, prediction_loss_only=True)


@row("seq2seq (`Seq2SeqTrainer`)", WORKS)
def seq2seq(options):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "dropout": 0.0}
    sizes |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = small("BartForConditionalGeneration", decoder_start_token_id=2, **sizes)
    seq2seq = {"cls": transformers.Seq2SeqTrainer, "args": transformers.Seq2SeqTrainingArguments}
    train(model, texts(labels=lambda i: numbers(i, 5, high=40)), options, **seq2seq)


@row("speech with CTC", WORKS)
def speech(options):
    def example(i):
        labels = numbers(i, 4, high=40)
        labels[2 + i % 3 :] = -100
        return {"input_values": numbers(i, 200), "labels": labels}

    sizes = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (4,), "num_feat_extract_layers": 1}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    sizes |= {"hidden_dropout": 0.0, "layerdrop": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0}
    model = small("Wav2Vec2ForCTC", ctc_loss_reduction="mean", **sizes)
    train(model, [example(i) for i in range(16)], options)


@row("in-batch negatives (CLIP)", WORKS)
def contrastive(options):
    def example(i):
        return {"input_ids": numbers(i, 6, high=40), "pixel_values": numbers(i, 3, 8, 8)}

    def collate(items):
        return {k: torch.stack([item[k] for item in items]) for k in items[0]} | {"return_loss": True}

    text = {**LAYER, "vocab_size": 40, "eos_token_id": 2, "max_position_embeddings": 8}
    vision = {**LAYER, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    data = [example(i) for i in range(17)]  # the last evaluation batch is smaller
    train(model, data, options, data_collator=collate)


@row("vision and language (Qwen2-VL): all images' patches in one tensor", WORKS)
def vision_and_language(options):
    text = {**LAYER, **SPECIAL, "vocab_size": 64, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    special = {"image_token_id": 60, "vision_start_token_id": 61, "vision_end_token_id": 62}
    special["video_token_id"] = 63
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **special)
    )

    def collate(items):
        ids = torch.stack([torch.cat([torch.tensor([61, 60, 60, 60, 60, 62]), item]) for item in items])
        grid = torch.tensor([[1, 4, 4]] * len(items))
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.where(ids < 60, ids, -100),
            "pixel_values": numbers(int(ids.sum()), 16 * len(items), 96),
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == 60).int(),
        }

    data = [numbers(i, 6, high=60) for i in range(16)]
    train(model, data, options, data_collator=collate, remove_unused_columns=False, prediction_loss_only=True)


@row("mixtures of experts", WORKS)
def experts(options):
    """Where the model adds the routers' loss, so does the validation."""
    losses = []
    for added in (False, True):
        router = {"output_router_logits": added, "router_aux_loss_coef": 0.5}
        model = small("MixtralForCausalLM", num_local_experts=3, **router)
        losses.append(train(model, texts(), options)[1].loss_before)
    assert losses[1] - losses[0] > 0.5


class Weighted(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 20.0]))
        return (loss, outputs) if return_outputs else loss


@row("`compute_loss` overridden, `compute_loss_func`, label smoothing", WORKS)
def own_loss(options):
    def focal(outputs, labels, num_items_in_batch=None):
        probability = outputs["logits"].softmax(-1).gather(1, labels[:, None])
        return -((1 - probability) ** 2 * probability.log()).mean()

    data = texts(labels=lambda i: torch.tensor(int(i % 3 > 0)))
    for given, said in (
        ({"cls": Weighted}, r"Weighted\.compute_loss computes it"),
        ({"compute_loss_func": focal}, "compute_loss_func is set"),
        ({"label_smoothing_factor": 0.3}, "label_smoothing_factor is set"),
    ):
        model = small("BertForSequenceClassification")
        with pytest.warns(FFKernelsNotice, match=f"own eval_loss, as .* not its model's: {said}"):
            trainer, stage = train(model, data, options, **given)
        batch = trainer.data_collator(data[8:])
        assert abs(stage.loss_after - float(ValidationLoss(model, [batch])())) > 1e-4
        callback = FastForwardCallback(loss="model", config=EVERY_2)
        trainer, stage = train(model, data, options, callback=callback, weighed_by_examples=False, **given)
        assert stage.loss_after == pytest.approx(float(ValidationLoss(model, [batch])()), rel=1e-6)


@pytest.fixture(scope="module")
def words():
    """A tokenizer of the letters, in transformers' form."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {w: i for i, w in enumerate("<pad> <s> </s> <unk> a b c d e f g h i j k l".split())}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


PAIRS = [{"prompt": "a b ", "chosen": "c d e f"[: 1 + 2 * (i % 4)], "rejected": "g h"} for i in range(16)]


def of_trl(name, words, options, rows, callback, model="LlamaForCausalLM", **given):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    options = {**options, "bf16": False, "gradient_checkpointing": False, **given.pop("args", {})}
    data = datasets.Dataset.from_list(rows)
    return getattr(trl, f"{name}Trainer")(
        model=small(model, **given.pop("config", {})),
        args=getattr(trl, f"{name}Config")(**options),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=words,
        callbacks=[callback],
        **given,
    )


@row("TRL's `SFTTrainer`", WORKS)
def sft(options, words):
    rows = [{"prompt": "a b ", "completion": pair["chosen"]} for pair in PAIRS]
    callback = FastForwardCallback(config=EVERY_2)
    trainer = of_trl("SFT", words, {**options, "per_device_eval_batch_size": 8}, rows, callback)
    trainer.train()
    assert callback.stages[0].loss_after == pytest.approx(trainer.evaluate()["eval_loss"], rel=2e-5)
    callback = FastForwardCallback(config=EVERY_2)
    trainer = of_trl("SFT", words, options, rows, callback, args={"loss_type": "dft"})
    with pytest.warns(FFKernelsNotice, match="own eval_loss, as .* not its model's: loss_type='dft'"):
        trainer.train()
    assert callback.stages[0].loss_after == pytest.approx(trainer.evaluate()["eval_loss"], rel=2e-5)


def told_and_cured(make, **expected):
    """Refused before the first step with the line that cures it, which does."""
    trainer = make(FastForwardCallback(config=EVERY_2))
    with pytest.raises(ValueError, match=r"(?s)loss='trainer'.*loss_fn\(model\)"):
        trainer.train()
    assert trainer.state.global_step == 0
    callback = FastForwardCallback(config=EVERY_2, loss="trainer")
    trainer = make(callback)
    trainer.train()
    evaluated = trainer.evaluate()
    assert callback.stages[0].loss_after == pytest.approx(evaluated["eval_loss"], rel=2e-5)
    assert callback.stages[0].evaluations > 1
    return trainer, evaluated


@row("TRL's `DPOTrainer`", LINE)
def dpo(options, words):
    def make(callback):
        return of_trl("DPO", words, options, PAIRS, callback, ref_model=small("LlamaForCausalLM"))

    trainer, evaluated = told_and_cured(make)
    again = trainer.evaluate()  # nothing of the stages' losses was left in the averages of the first
    margins = [metrics["eval_rewards/margins"] for metrics in (evaluated, again)]
    assert margins[0] == margins[1] != 0


@row("TRL's `RewardTrainer`", LINE)
def reward(options, words):
    def make(callback):
        model = {"model": "LlamaForSequenceClassification", "config": {"num_labels": 1}}
        return of_trl("Reward", words, options, PAIRS, callback, **model)

    told_and_cured(make)


@row("TRL's `GRPOTrainer`", LINE)
def grpo(options, words):
    def make(callback):
        def rewards(completions, **others):
            return [float(i % 2) for i in range(len(completions))]

        args = {"num_generations": 2, "max_completion_length": 3}
        rows = [{"prompt": "a b c"}] * 8
        return of_trl("GRPO", words, options, rows, callback, args=args, reward_funcs=rewards)

    with pytest.raises(ValueError, match=r"(?s)GRPOTrainer evaluates in a way of its own.*loss_fn\(model\)"):
        make(FastForwardCallback(config=EVERY_2)).train()
    ids = numbers(0, 4, 6, high=16)
    callback = FastForwardCallback(lambda model: model(input_ids=ids, labels=ids).loss, config=EVERY_2)
    make(callback).train()
    assert callback.stages[0].evaluations > 1


def encoder():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


class OfPairs(Trainer):
    """As sentence-transformers': the loss is outside of the model, of several inputs, without labels."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.can_return_loss, self.label_names = True, []
        self.seen = {"eval": [], "train": []}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = model(inputs["anchor"]) @ model(inputs["positive"]).T
        loss = F.cross_entropy(scores, torch.arange(len(scores)))
        self.seen["train" if model.training else "eval"].append(float(loss.detach()))
        return (loss, {}) if return_outputs else loss


@row("sentence-transformers", LINE)
def sentences(options):
    data = [{"anchor": numbers(i, 4), "positive": numbers(i, 4) + 0.1} for i in range(18)]
    options = {**options, "remove_unused_columns": False, "prediction_loss_only": True}

    def make(callback):
        args = TrainingArguments(**options)
        return OfPairs(encoder(), args, train_dataset=data[:8], eval_dataset=data[8:], callbacks=[callback])

    trainer, _ = told_and_cured(make)
    assert len(trainer.seen["eval"]) == 3  # evaluate()'s own batches of 4, 4 and 2
    with pytest.raises(ValueError, match="pool=40: examples are drawn for a model's own loss only"):
        make(FastForwardCallback(loss="trainer", pool=40)).train()


@row("a model without a loss, the loss in `compute_loss`", LINE)
def outside(options):
    class Outside(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(inputs["input"])
            loss = F.cross_entropy(outputs, inputs["labels"])
            return (loss, (loss, outputs)) if return_outputs else loss

    data = [{"input": numbers(i, 4), "labels": torch.tensor(i % 3)} for i in range(16)]
    options = {**options, "remove_unused_columns": False}
    with pytest.raises(ValueError, match=r"Outside's loss is not its model's.*no labels \(label_names\)"):
        train(encoder(), data, options, cls=Outside)
    with pytest.raises(ValueError, match=r"has no eval_loss.*TrainingArguments\(label_names="):
        train(encoder(), data, options, cls=Outside, callback=FastForwardCallback(loss="trainer"))
    train(encoder(), data, options, cls=Outside, label_names=["labels"])


def loop(model, batches, steps=4, forward=None, **options):
    """A plain loop with a stage after every second step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with FastForward(model, optimizer, [batches[0]], EVERY_2, **options) as ff:
        for step in range(steps):
            (forward or model)(**batches[step % len(batches)]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return ff


def stacked_texts():
    return transformers.default_data_collator(texts(4))


@functools.cache
def counted_graphs():
    """Grows by one at each call of a compiled graph; its backend has a name that accelerate knows."""
    calls = []

    def backend(graph, inputs):
        return lambda *args: calls.append(1) or graph.forward(*args)

    torch._dynamo.register_backend(backend, name="ofi")
    return calls


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, inputs, labels):
        return {"loss": F.mse_loss(self.net(inputs), labels)}


class Watched(Trainer):
    """Compiled graphs called in each training step, and the gradients that it leaves."""

    def training_step(self, *args, **kwargs):
        before = len(counted_graphs())
        loss = super().training_step(*args, **kwargs)
        self.per_step = [*getattr(self, "per_step", []), len(counted_graphs()) - before]
        gradients = [p.grad.clone() for p in self.model.parameters()]
        self.gradients = [*getattr(self, "gradients", []), loss.clone(), *gradients]
        return loss


@row("`torch.compile`", WORKS)
def compiled(options, monkeypatch):
    model = small("LlamaForCausalLM")
    ff = loop(torch.compile(model, backend="eager"), [stacked_texts()])
    loss = float(ValidationLoss(model, [stacked_texts()])())
    assert ff.stages[-1].loss_after == pytest.approx(loss, rel=1e-6)
    counted_graphs()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments sets it for what comes after
    options = {**options, "torch_compile": True, "torch_compile_backend": "ofi", "max_steps": 4}
    data = [{"inputs": numbers(i, 4), "labels": numbers(i, 3)} for i in range(16)]
    batch, rising = transformers.default_data_collator(data), itertools.count()
    callback = FastForwardCallback(
        lambda model: 9 * next(rising) + float(model(**batch)["loss"]), config=EVERY_2
    )
    runs = []
    for callbacks in ([], [callback]):
        torch._dynamo.reset()
        args = TrainingArguments(**options)
        trainer = Watched(Regression(), args, train_dataset=data, callbacks=callbacks)
        trainer.train()
        runs.append((trainer.per_step, trainer.gradients))
    assert [stage.tau for stage in callback.stages] == [0, 0] and callback.flops["measured"] > 0
    (plain, gradients), (with_stages, found) = runs
    assert plain == with_stages == [1] * 4
    assert all(torch.equal(a, b) for a, b in zip(gradients, found, strict=True))


@row('`attn_implementation="flex_attention"`', WORKS)
def flex(options):
    """Where it cannot be trained, as on a CPU, by gradients of the same model under other attention."""
    model, batch = small("LlamaForCausalLM", hidden_size=32), stacked_texts()
    twin = copy.deepcopy(model)
    model.set_attn_implementation("flex_attention")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    costs = StepFlops()
    with torch.compiler.set_stance("force_eager"):  # else it compiles itself for half a minute
        try:
            with torch.no_grad():
                model(**batch)
        except (NotImplementedError, RuntimeError) as error:
            pytest.skip(f"flex attention does not run here: {error}")
        with FastForward(model, optimizer, [batch], EVERY_2) as ff:
            for _ in range(2):
                twin.load_state_dict(model.state_dict())
                with torch.no_grad(), costs.batch(model, batch) as cost:
                    model(**batch)
                twin(**batch).loss.backward()
                for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
                    weight.grad, other.grad = other.grad, None
                optimizer.step()
            (stage,), moved = ff.stages, 2 * ff.trainable_numel
    twin.load_state_dict(model.state_dict())
    validation = ValidationLoss(twin, [batch])
    assert stage.tau > 0 and stage.loss_after == pytest.approx(float(validation()), rel=1e-6)
    assert stage.flops == stage.evaluations * (validation.flops + moved)
    assert cost[0].measured == count_flops(lambda: twin(**batch))


class PulledBack(torch.optim.SGD):
    """As Lookahead: every step ends between the weights that it made and slow ones of its own."""

    @torch.no_grad()
    def step(self, closure=None):
        weights = self.param_groups[0]["params"]
        slow = [self.state[p].setdefault("slow", p.clone()) for p in weights]
        super().step(closure)
        for p, s in zip(weights, slow, strict=True):
            p.copy_(s.lerp_(p, 0.5))


@row("an optimizer that draws moved weights back (Lookahead, schedule-free, MADGRAD)", REFUSED)
def drawn_back(options):
    model, batch = small("LlamaForCausalLM"), stacked_texts()
    message = "PulledBack has weights of its own .* 50% of a move of the weights was"
    with pytest.raises(ValueError, match=message):
        FastForward(model, PulledBack(model.parameters(), lr=0.1), [batch], EVERY_2)


@row("autocast around the forward only", WORKS)
def autocast(options):
    model = small("LlamaForCausalLM")

    def forward(**batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)

    ff = loop(model, [stacked_texts()], forward=forward)
    trained, plain = (float(run(**stacked_texts()).loss) for run in (forward, model))
    assert ff.stages[-1].loss_after == pytest.approx(trained, rel=1e-6) != pytest.approx(plain, rel=1e-5)


@row("Lightning", LINE)
def lightning(options):
    """It calls ``step(closure)``, from wrappers that keep the optimizer as ``.optimizer``."""
    model, batch = small("LlamaForCausalLM"), stacked_texts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def closure():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    with FastForward(model, SimpleNamespace(optimizer=optimizer), [batch], EVERY_2) as ff:
        for _ in range(4):
            optimizer.step(closure)
    assert [stage.optimizer_step for stage in ff.stages] == [2, 4] and ff.stages[0].tau > 0
    assert ff.stages[-1].loss_after == pytest.approx(float(ValidationLoss(model, [batch])()), rel=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_the_row(name, options, request):
    _, check = ROWS[name]
    wanted = check.__code__.co_varnames[: check.__code__.co_argcount]
    check(options, **{key: request.getfixturevalue(key) for key in wanted if key != "options"})


def test_the_documented_table_has_these_rows():
    text = DOC.read_text(encoding="utf-8")
    start = text.index("| what is trained |")
    lines = text[start : text.index("\n\n", start)].splitlines()[2:]
    table = {}
    for line in lines:
        name, verdict = (cell.strip() for cell in line.strip("|").split("|", 1))
        table[name] = re.match(r"works|with|refused", verdict).group()
    expected = {name: {WORKS: "works", LINE: "with", REFUSED: "refused"}[v] for name, (v, _) in ROWS.items()}
    assert table == expected
