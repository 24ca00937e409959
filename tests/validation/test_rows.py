"""Which part of a batch is whose, also where images of all rows lie one after the other."""

import itertools

import pytest
import torch
from torch import nn

from ffkernels import ValidationPool
from ffkernels.validation.rows import placeholder_ids, rows_of

IMAGE, VIDEO, PAD = 90, 91, 0
IDS = {"image": IMAGE, "video": VIDEO}


def tokens(*counts, token=IMAGE, length=14):
    """Rows that have so many placeholders each, and other tokens around them."""
    rows = torch.arange(1, length + 1).repeat(len(counts), 1)
    for row, count in zip(rows, counts, strict=True):
        row[2 : 2 + count] = token
    return rows


def numbered(count, *shape):
    """Entries that say which one they are."""
    return torch.arange(count, dtype=torch.float32).view(-1, *[1] * len(shape)).expand(count, *shape)


def entries(rows, key):
    return [row[key].flatten(1)[:, 0].tolist() if row[key].ndim > 1 else row[key].tolist() for row in rows]


@pytest.mark.parametrize(
    "counts, value, grid, expected",
    [
        # one entry for each token, two for each, and three tokens for each entry
        ((3, 0, 2), numbered(5, 4), None, [[0, 1, 2], [], [3, 4]]),
        ((1, 2, 0), numbered(6, 4), None, [[0, 1], [2, 3, 4, 5], []]),
        ((6, 3, 0), numbered(3, 3, 8, 8), None, [[0, 1], [2], []]),
        # as many images as rows, but not one each
        ((4, 0), numbered(2, 3, 8, 8), None, [[0, 1], []]),
        ((2, 2), numbered(2, 3, 8, 8), None, [[0], [1]]),
        # images of different sizes: 4 and 8 patches, then 12; two patches a token
        ((6, 6), numbered(24, 5), [[1, 2, 2], [1, 2, 4], [3, 2, 2]], [[*range(12)], [*range(12, 24)]]),
        ((6, 0, 6), numbered(3, 7), [[1, 2, 2], [1, 2, 4], [3, 2, 2]], [[0, 1], [], [2]]),
    ],
)
@pytest.mark.parametrize(
    "media, token, name", [("image", IMAGE, "pixel_values"), ("video", VIDEO, "x_videos")]
)
def test_images_go_to_the_rows_whose_tokens_stand_for_them(counts, value, grid, expected, media, token, name):
    batch = {"input_ids": tokens(*counts, token=token), name: value, "scale": torch.tensor(2.0)}
    if grid is not None:
        batch[f"{media}_grid_thw"] = torch.tensor(grid)
    rows = rows_of(batch, IDS)
    assert entries(rows, name) == expected
    assert [row["input_ids"].tolist() for row in rows] == [[ids] for ids in batch["input_ids"].tolist()]
    assert all(row["scale"] == 2.0 for row in rows)
    if grid is not None:
        assert torch.cat([row[f"{media}_grid_thw"] for row in rows]).tolist() == grid


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("labels", torch.arange(42).view(3, 14), [[[*range(14 * i, 14 * i + 14)]] for i in range(3)]),
        ("label", torch.tensor([5, 6, 7]), [[5], [6], [7]]),
        ("attention_mask", numbered(3, 1, 2, 2), [[[[[float(i)] * 2] * 2]] for i in range(3)]),
        ("position_ids", torch.arange(28).view(2, 1, 14).expand(2, 3, 14), None),
        ("position_ids", torch.arange(14)[None], [[[*range(14)]]] * 3),
        ("weights", torch.ones(7, 2), [[[1.0, 1.0]] * 7] * 3),
        ("names", ["a", "b", "c"], [["a"], ["b"], ["c"]]),
        ("factor", 3.0, [3.0] * 3),
    ],
)
def test_what_is_one_for_each_row_and_what_rows_share(key, value, expected):
    rows = rows_of({"input_ids": tokens(2, 0, 1), key: value}, IDS)
    if expected is None:
        assert all(torch.equal(row[key], value[:, :1]) and row[key].shape == (2, 1, 14) for row in rows)
    else:
        assert [row[key].tolist() if torch.is_tensor(row[key]) else row[key] for row in rows] == expected


@pytest.mark.parametrize(
    "counts, value, grid",
    [
        ((3, 2), numbered(4, 4), None),
        ((3, 1), numbered(2, 3, 8, 8), None),  # images of different sizes, and no grid that says which
        ((5, 7), numbered(24, 5), [[1, 2, 2], [1, 2, 4], [3, 2, 2]]),  # an image across two rows
    ],
)
def test_what_cannot_be_divided_is_named(counts, value, grid):
    batch = {"input_ids": tokens(*counts), "pixel_values": value}
    if grid is not None:
        batch["image_grid_thw"] = torch.tensor(grid)
    told = (
        rf"^\w+ has \d+ entries for 2 rows, in which \[{counts[0]}, {counts[1]}\] tokens .*with the collator"
    )
    with pytest.raises(ValueError, match=told):
        rows_of(batch, IDS)


def test_images_of_which_no_token_is_known_are_not_shared():
    batch = {"pixel_values": numbered(6, 3), "labels": torch.arange(2)}
    with pytest.raises(ValueError, match=r"^pixel_values has 6 entries for 2 rows, in which no tokens"):
        rows_of(batch, {})
    batch = {**batch, "labels": torch.arange(1)}
    assert rows_of(batch, {}) == [batch], "as many rows as labels: all are of this one"


class Pooled(nn.Module):
    """Mean over a row's tokens of (embedding + what its images say), as a loss of each row."""

    class Config:
        image_token_index = IMAGE

    def __init__(self):
        super().__init__()
        self.config = self.Config()
        self.embed = nn.Embedding(100, 4)
        self.see = nn.Linear(5, 4)

    def forward(self, input_ids, pixel_values, labels):
        hidden = self.embed(input_ids)
        seen = self.see(pixel_values)
        if len(seen) != int((input_ids == IMAGE).sum()):
            raise ValueError("image features and image tokens do not match")
        hidden = hidden.masked_scatter((input_ids == IMAGE)[..., None], seen)
        return {"loss": ((hidden.mean((1, 2)) - labels) ** 2).mean()}


def test_a_pool_of_batches_is_that_of_its_examples():
    torch.manual_seed(0)
    model = Pooled()
    assert placeholder_ids(nn.Sequential(model)) == {"image": IMAGE}
    counts = [3, 0, 5, 1, 2, 2, 4, 1]
    ids, images = tokens(*counts), torch.randn(sum(counts), 5)
    starts = [0, *itertools.accumulate(counts)]
    labels = torch.randn(8)
    batches = [
        {
            "input_ids": ids[a:b],
            "pixel_values": images[starts[a] : starts[b]],
            "labels": labels[a:b],
        }
        for a, b in ((0, 3), (3, 8))
    ]
    pool = ValidationPool(model, batches, size=3)
    assert pool.pool_size == 8
    for number in range(4):
        pool.draw(number)
        with torch.no_grad():
            own = [
                model(ids[i : i + 1], images[starts[i] : starts[i + 1]], labels[i : i + 1])["loss"].item()
                for i in pool._indices(number)
            ]
        assert float(pool()) == pytest.approx(sum(own) / 3, rel=1e-5)
