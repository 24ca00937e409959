"""The hub's data sets, as small copies with the same names, columns and splits."""

import json
import sys

import pytest

from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.training import hub_data
from ffkernels.training.tasks import load_task
from ffkernels.training.tokenizer import ByteTokenizer

datasets = pytest.importorskip("datasets")

TOKENIZER = ByteTokenizer()
END = TOKENIZER.eos_token_id
SIZES = {"test_examples": 6, "validation_examples": 3}


def guideline(i):
    text = {"clean_text": f"Guideline {i}: wash hands.", "raw_text": f"<p>{i}</p>", "overview": None}
    return {"id": f"g{i}", "source": "cdc", "title": f"T{i}", "url": "", **text}


def solved(i, length=5):
    return {"instruction": f"Print {i}.", "response": f"print({i})".ljust(length)}


def talk(split, i):
    said = [("user", f"{split} question {i}?"), ("assistant", f"Answer {i}."), ("user", "Thanks!")]
    messages = [{"content": content, "role": role} for role, content in said]
    return {"prompt": said[0][1], "prompt_id": f"{split}{i}", "messages": messages}


SPLITS = {
    "epfl-llm/guidelines": {"train": [guideline(i) for i in range(40)]},
    "ise-uiuc/Magicoder-Evol-Instruct-110K": {"train": [solved(i) for i in range(40)]},
    "HuggingFaceH4/ultrachat_200k": {
        split: [talk(split, i) for i in range(30)]
        for split in ("train_sft", "test_sft", "train_gen", "test_gen")
    },
}


@pytest.fixture
def hub(monkeypatch):
    """``datasets.load_dataset`` over SPLITS; the rows may be changed by the test."""
    served = {name: dict(splits) for name, splits in SPLITS.items()}

    def load_dataset(repository, split):
        return datasets.Dataset.from_list(served[repository][split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return served


def text(example, labelled=False):
    return TOKENIZER.decode([t for t in example["labels" if labelled else "input_ids"] if t >= 0])


def all_of(task):
    return [*task.train, *task.validation, *task.test]


def test_medical_learns_all_of_the_clean_text_up_to_max_length(hub):
    task = load_task("medical", TOKENIZER, source="hub", **SIZES)
    assert (len(task.train), len(task.validation), len(task.test)) == (31, 3, 6)
    assert sorted(map(text, all_of(task))) == sorted(f"Guideline {i}: wash hands." for i in range(40))
    assert all(example["labels"] == example["input_ids"] for example in all_of(task))
    assert all(example["input_ids"][-1] == END for example in all_of(task))
    task = load_task("medical", TOKENIZER, source="hub", max_length=12, **SIZES)
    assert {text(example) for example in all_of(task)} >= {"Guideline 10", "Guideline 39"}
    assert task.statistics()["train"]["share_cut"] == 1.0


def test_instruction_counts_what_follows_the_response_key(hub):
    task = load_task("instruction", TOKENIZER, source="hub", max_length=400, **SIZES)
    assert (len(task.train), len(task.validation), len(task.test)) == (31, 3, 6)
    for example in all_of(task):
        prompt, response = text(example).split("### Response:\n")
        number = int(response.partition("(")[2].partition(")")[0])
        assert prompt.endswith(f"completes the request.\n\n### Instruction:\nPrint {number}.\n\n")
        assert text(example, labelled=True) == response == f"print({number})\n\n### End"
        assert example["input_ids"][-1] == END


def test_instructions_that_are_too_long_are_left_out_not_cut(hub):
    rows = [solved(i, length=5 if i % 2 else 300) for i in range(40)]
    hub["ise-uiuc/Magicoder-Evol-Instruct-110K"]["train"] = rows
    task = load_task("instruction", TOKENIZER, source="hub", max_length=200, **SIZES)
    kept = {int(text(e, labelled=True).partition("(")[2].partition(")")[0]) for e in all_of(task)}
    assert kept == set(range(1, 40, 2))
    assert not any(example.cut for example in all_of(task))
    # The prompt alone is more than half of 200 tokens; where everything fits, none of it is cut.
    assert all("Below is an instruction" in text(example) for example in task.test)
    assert len(task.train) == len(list(task.train))
    with pytest.raises(ValueError, match=r"has 0 different examples that fit, of 40; .*raise max_length"):
        load_task("instruction", TOKENIZER, source="hub", max_length=64, **SIZES)


def test_chat_trains_on_train_sft_and_holds_test_sft_out(hub):
    task = load_task("chat", TOKENIZER, source="hub", max_length=200, **SIZES)
    assert (len(task.train), len(task.validation), len(task.test)) == (30, 3, 6)
    assert all("train_sft question" in text(example) for example in task.train)
    assert all("test_sft question" in text(example) for example in task.validation + task.test)
    example = max(task.test, key=text)
    number = text(example).partition("question ")[2].partition("?")[0]
    assert text(example) == (
        f"<|system|>\n\n<|user|>\ntest_sft question {number}?\n"
        f"<|assistant|>\nAnswer {number}.\n<|user|>\nThanks!\n"
    )
    assert example["labels"] == example["input_ids"]


def test_chat_may_count_the_assistant_only(hub):
    options = dict(source="hub", max_length=200, chat_loss="assistant", **SIZES)
    task = load_task("chat", TOKENIZER, **options)
    assert {text(example, labelled=True) for example in task.train} == {f"Answer {i}.\n" for i in range(30)}
    with pytest.raises(ValueError, match="chat_loss='user'; allowed are 'all', 'assistant'"):
        load_task("chat", TOKENIZER, chat_loss="user")


def test_the_seed_decides_what_falls_where(hub):
    first, again, other = (load_task("medical", TOKENIZER, source="hub", seed=s, **SIZES) for s in (3, 3, 4))
    assert first.test == again.test and first.validation == again.validation
    assert list(first.train) == list(again.train)
    assert first.test != other.test


@pytest.mark.parametrize("seed", range(5))
def test_a_repeated_text_is_in_one_split_only(hub, seed):
    rows = [guideline(i) for i in range(15)] * 3 + [{**guideline(99), "clean_text": " "}] * 3
    hub["epfl-llm/guidelines"]["train"] = [*rows, {**guideline(98), "clean_text": None}]
    task = load_task("medical", TOKENIZER, source="hub", seed=seed, **SIZES)
    train = {text(example) for example in task.train}
    held_out = [text(example) for example in task.validation + task.test]
    assert len(set(held_out)) == 9 and not train & set(held_out)
    assert train == {f"Guideline {i}: wash hands." for i in range(15)} - set(held_out)


def test_conversations_held_out_are_not_trained_on(hub):
    chats = hub["HuggingFaceH4/ultrachat_200k"]
    chats["train_sft"] = chats["train_sft"][:10] + chats["test_sft"]
    task = load_task("chat", TOKENIZER, source="hub", max_length=200, **SIZES)
    assert not {text(e) for e in task.train} & {text(e) for e in task.validation + task.test}
    assert len(task.train) == len(list(task.train)) == 40


def test_an_odd_conversation_is_passed_over_and_said_once(hub):
    chats = hub["HuggingFaceH4/ultrachat_200k"]
    alone = {**talk("train_sft", 99), "messages": [{"role": "user", "content": "Anybody?"}]}
    chats["train_sft"] = [alone if i % 3 else row for i, row in enumerate(chats["train_sft"])]
    options = dict(source="hub", max_length=200, chat_loss="assistant", **SIZES)
    task = load_task("chat", TOKENIZER, **options)
    with pytest.warns(FFKernelsNotice, match=r"train_sft, row \d+: no turn of the .*passed over") as said:
        numbers = {text(example, labelled=True) for example in task.train}
    assert len(said) == 1 and numbers == {f"Answer {i}.\n" for i in range(0, 30, 3)}
    chats["test_sft"] = [alone] * 20
    with pytest.raises(ValueError, match=r"has 0 different .* of 20; .*test_sft, row \d+: no turn of the"):
        load_task("chat", TOKENIZER, **options)


def test_only_what_is_used_is_tokenized(hub):
    class Counting(ByteTokenizer):
        calls = 0

        def encode(self, text, add_special_tokens=False):
            type(self).calls += 1
            return super().encode(text, add_special_tokens)

    hub["epfl-llm/guidelines"]["train"] = [guideline(i) for i in range(2000)]
    task = load_task("medical", Counting(), source="hub", **SIZES)
    assert Counting.calls <= 12
    assert len(task.train) == 1991
    assert task.train[5:8] == [task.train[5], task.train[6], task.train[7]]
    assert task.train[-1] == task.train[1990]
    assert Counting.calls <= 20
    with pytest.raises(IndexError):
        task.train[1991]


def test_statistics_of_a_split_that_tokenizes_on_demand(hub, monkeypatch):
    monkeypatch.setattr("ffkernels.training.tasks.MEASURED_ON_DEMAND", 10)
    train = load_task("medical", TOKENIZER, source="hub", **SIZES).statistics()["train"]
    assert (train["examples"], train["measured"]) == (31, 10)
    assert train["length"]["max"] == len("Guideline 12: wash hands.") + 1


def test_too_few_rows_are_said(hub):
    message = r"has 40 different examples that fit, of 40; 1000 test and 32 validation examples leave none"
    with pytest.raises(ValueError, match=message):
        load_task("medical", TOKENIZER, source="hub")
    with pytest.raises(ValueError, match="source='web'; allowed are 'offline', 'hub'"):
        load_task("medical", TOKENIZER, source="web")


def test_other_columns_are_said(hub):
    hub["epfl-llm/guidelines"]["train"] = [{"text": "x"}]
    with pytest.raises(RuntimeError, match=r"no column 'clean_text', only \['text'\]"):
        load_task("medical", TOKENIZER, source="hub")


def test_no_network_says_what_to_do(monkeypatch):
    def load_dataset(repository, split):
        raise ConnectionError(f"Couldn't reach {repository}\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"HuggingFaceH4/ultrachat_200k, and neither .*'test_sft' \(Couldn't reach \S+\)\. .*HF_HOME.*offline"
    )
    with pytest.raises(RuntimeError, match=message):
        load_task("chat", TOKENIZER, source="hub")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"task 'chat' needs datasets: pip install 'ffkernels\[tasks\]'"):
        load_task("chat", TOKENIZER, source="hub")


def test_the_real_load_dataset_reads_these_files(tmp_path, monkeypatch):
    """A folder of the repository's name stands for it, with the hub's file layout."""
    chats = tmp_path / "HuggingFaceH4" / "ultrachat_200k" / "data"
    chats.mkdir(parents=True)
    for split, rows in SPLITS["HuggingFaceH4/ultrachat_200k"].items():
        datasets.Dataset.from_list(rows).to_parquet(chats / f"{split}-00000-of-00001.parquet")
    code = tmp_path / "ise-uiuc" / "Magicoder-Evol-Instruct-110K"
    code.mkdir(parents=True)
    lines = map(json.dumps, SPLITS["ise-uiuc/Magicoder-Evol-Instruct-110K"]["train"])
    (code / "data-evol_instruct-decontaminated.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = load_task("chat", TOKENIZER, source="hub", **SIZES)
    assert (len(task.train), len(task.validation), len(task.test)) == (30, 3, 6)
    task = load_task("instruction", TOKENIZER, source="hub", max_length=400, **SIZES)
    assert len(task.train) == 31 and text(task.train[0], labelled=True).endswith("### End")


def test_every_task_has_its_place_on_the_hub():
    assert {name: source.repository for name, source in hub_data.HUB.items()} == {
        "medical": "epfl-llm/guidelines",
        "instruction": "ise-uiuc/Magicoder-Evol-Instruct-110K",
        "chat": "HuggingFaceH4/ultrachat_200k",
    }
