"""Trees of texts: every text is in them, and every token sees its own text's tokens before it and no others."""

import numpy as np
import pytest

from cai_jax.trees import common, first_fit, lay, plant, shared


def random_texts(seed: int):
    """Up to twelve short texts over three tokens, so that they share much; some stand twice, some begin others."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 4, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 13))]


@pytest.mark.parametrize("limit", [5, 12, 100])
def test_a_token_sees_what_stands_before_it_in_its_text_and_nothing_else(limit):
    for seed in range(60):
        texts, found = random_texts(seed), []
        for tree in plant(texts, limit):
            for number, path in tree.texts:
                found.append(number)
                assert [tree.tokens[i] for i in path] == texts[number]
                assert [tree.positions[i] for i in path] == list(range(len(path)))
                for depth, i in enumerate(path):
                    assert [j for j in range(i + 1) if i < tree.ends[j]] == path[: depth + 1]
            assert len(tree.tokens) <= limit or len(tree.texts) == 1
        assert sorted(found) == list(range(len(texts)))


def test_what_is_shared_stands_once():
    texts = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2], [1, 6], [7, 8]]
    trees = plant(texts, 100)
    assert [t.tokens for t in trees] == [[1, 2, 3, 4, 5, 6], [7, 8]]
    assert trees[0].positions == [0, 1, 2, 3, 3, 1] and trees[0].ends == [6, 5, 5, 4, 5, 6]
    for seed in range(30):  # as many tokens as there are different beginnings
        texts = random_texts(seed)
        beginnings = {tuple(t[: n + 1]) for t in texts for n in range(len(t))}
        assert sum(len(t.tokens) for t in plant(texts, 1000)) == len(beginnings)


def test_texts_with_little_in_common_stand_in_trees_of_their_own():
    texts = [[1, 2, 3, 4, 5, 5, 5, 5], [1, 2, 3, 5, 5, 5, 5, 5], [1, 2, 6, 7, 5, 5, 5, 5]]
    assert [len(plant(texts, 100, worth)) for worth in (1, 2, 3, 4)] == [1, 1, 2, 3]
    assert [t.tokens[:4] for t in plant(texts, 100, 3)] == [[1, 2, 3, 4], [1, 2, 6, 7]]
    assert len(plant([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7], [1, 8, 9, 9]], 100, 50)) == 2  # half of a text is enough


def test_rows_hold_trees_side_by_side():
    trees = plant([[1, 2, 3], [1, 2, 4], [5, 6]], 100)
    placed = first_fit([len(t.tokens) for t in trees], 7)
    out = lay(trees, placed, 2, 7)
    assert placed == [(0, 0), (0, 4)]
    assert out["tokens"].tolist() == [[1, 2, 3, 4, 5, 6, 0], [0] * 7]
    assert out["positions"].tolist()[0] == [0, 1, 2, 2, 0, 1, 0]
    assert out["ends"].tolist()[0] == [4, 4, 3, 4, 6, 6, 0]


def test_first_fit_is_what_its_name_says():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sizes, free, wanted = rng.integers(1, 21, rng.integers(1, 40)).tolist(), [], []
        for size in sizes:
            row = next((i for i, room in enumerate(free) if room >= size), len(free))
            free += [20] * (row == len(free))
            wanted.append((row, 20 - free[row]))
            free[row] -= size
        assert first_fit(sizes, 20) == wanted
    assert first_fit([], 20) == []


def test_first_fit_leaves_no_room_that_a_later_one_would_have_filled():
    assert first_fit([4, 5, 3, 2, 6], 8) == [(0, 0), (1, 0), (0, 4), (1, 5), (2, 0)]
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 100).tolist()
    used = np.zeros((100, 8), int)
    for size, (row, at) in zip(sizes, first_fit(sizes, 8), strict=True):
        used[row, at : at + size] += 1
    assert used.max() == 1 and used.sum() == sum(sizes) and used.any(axis=1).sum() < 1.15 * sum(sizes) / 8


def test_a_common_beginning_is_worth_it_from_sixteen_tokens_of_two_texts():
    long = list(range(20))
    assert shared([1, 2, 3], [1, 2, 4, 5]) == 2 and shared([], [1]) == 0 and shared([1, 2], [1, 2]) == 2
    assert common([long + [1], long + [2, 3]]) == long
    assert common([long[:16], long]) == long[:16] and common([long[:15], long]) == [] and common([long]) == []
