"""Metrics against naive loops, closed forms and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, precision_recall_curve

from moco_eval.classification import knn
from moco_eval.errors import InputError
from moco_eval.results.metrics import (
    accuracy,
    mean_average_precision,
    mean_per_class,
    precision_recall,
    rankings,
    weighted_mean_average_precision,
)


def drawn(seed: int, images: int = 60, classes: int = 4, levels: int | None = None):
    """Scores (ties where there are few levels) and labels of 1, 0 and -1."""
    random = np.random.default_rng(seed)
    size = (images, classes)
    scores = random.normal(size=size) if levels is None else random.integers(levels, size=size)
    labels = random.choice(np.array([1, 0, -1], np.int8), size=size, p=[0.3, 0.6, 0.1])
    return scores.astype(float), labels


def naive_points(scores, labels):
    """(recall, precision) above each threshold, from the definition."""
    kept = [(score, label) for score, label in zip(scores, labels) if label != -1]
    positives = sum(label == 1 for _, label in kept)
    points = []
    for threshold in sorted({score for score, _ in kept}, reverse=True):
        above = [label for score, label in kept if score >= threshold]
        hits = sum(label == 1 for label in above)
        points.append((hits / positives, hits / len(above)))
    return points


def naive_area(points):
    total, before = 0.0, 0.0
    for i, (recall, _) in enumerate(points):
        total += (recall - before) * max(precision for _, precision in points[i:])
        before = recall
    return 100 * total


def naive_eleven(points):
    levels = [i * 0.1 for i in range(11)]  # the devkit's steps, 0.30000000000000004 and all
    return 100 * sum(max((p for r, p in points if r >= level), default=0.0) for level in levels) / 11


@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_the_definition(seed, levels):
    scores, labels = drawn(seed, levels=levels)
    each, mean = mean_average_precision(scores, labels)
    points = [naive_points(scores[:, c], labels[:, c]) for c in range(4)]
    np.testing.assert_allclose(each, [naive_area(one) for one in points], atol=1e-9)
    assert mean == pytest.approx(each.mean())
    eleven, _ = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(labels), points="11")
    np.testing.assert_allclose(eleven, [naive_eleven(one) for one in points], atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_area_under_the_envelope_of_sklearns_curve(seed):
    scores, labels = drawn(seed, levels=None if seed % 2 else 6)
    each, _ = mean_average_precision(scores, labels)
    for c in range(4):
        kept = labels[:, c] >= 0
        precision, recall, _ = precision_recall_curve(labels[kept, c], scores[kept, c])  # recall falls from 1 to 0
        envelope = np.maximum.accumulate(precision)
        assert each[c] == pytest.approx(100 * -np.sum(np.diff(recall) * envelope[:-1]))
        # without the envelope, as in sklearn's own number, it can only be less
        assert each[c] >= 100 * average_precision_score(labels[kept, c], scores[kept, c]) - 1e-9


def test_it_agrees_with_sklearns_own_where_precision_never_rises_again():
    labels = np.array([[1, 1, 1, 0, 0, 1, 0, 0]]).T  # precision at the positives: 1, 1, 1, 4/6
    scores = np.arange(8, 0, -1.0)[:, None]
    ours = mean_average_precision(scores, labels)[1]
    assert ours == pytest.approx(100 * average_precision_score(labels[:, 0], scores[:, 0]))
    assert ours == pytest.approx(100 * (3 + 4 / 6) / 4)
    rises = np.array([[0, 1, 1, 1]]).T  # precision 1/2, 2/3, 3/4: the envelope is 3/4 throughout
    assert mean_average_precision(scores[:4], rises)[1] == pytest.approx(75)
    assert 100 * average_precision_score(rises[:, 0], scores[:4, 0]) == pytest.approx(100 * (1 / 2 + 2 / 3 + 3 / 4) / 3)


def test_the_order_of_images_does_not_matter_where_scores_are_tied():
    scores, labels = drawn(3, levels=3)
    order = np.random.default_rng(9).permutation(len(scores))
    np.testing.assert_allclose(
        mean_average_precision(scores, labels)[0], mean_average_precision(scores[order], labels[order])[0]
    )
    constant = mean_average_precision(np.zeros((10, 1)), np.array([[1] * 3 + [0] * 7]).T)
    assert constant[1] == pytest.approx(30)  # the share of positives, though they come first


def test_ignored_images_and_classes_without_positives_do_not_count():
    scores, labels = drawn(0)
    labels[:, 2] = np.where(labels[:, 2] == 1, -1, labels[:, 2])
    each, mean = mean_average_precision(scores, labels)
    assert np.isnan(each[2]) and mean == pytest.approx(np.delete(each, 2).mean())
    moved = np.where(labels == -1, 1e6, scores)
    np.testing.assert_array_equal(mean_average_precision(moved, labels)[0], each)
    with pytest.raises(InputError, match="shows any of the classes"):
        mean_average_precision(scores, np.minimum(labels, 0))


@pytest.mark.parametrize("levels", [None, 3])
def test_weights_say_how_often_each_image_is_there(levels):
    scores, labels = drawn(2, levels=levels)
    weights = np.random.default_rng(1).integers(0, 4, (len(scores), 6))
    weights[:, 0] = 1
    wanted = [
        mean_average_precision(*(np.repeat(x, column, axis=0) for x in (scores, labels)))[1] for column in weights.T
    ]
    assert weighted_mean_average_precision(rankings(scores, labels), weights) == pytest.approx(wanted, abs=1e-11)


def test_a_class_of_ignored_images_or_without_positives_has_no_average_precision_under_any_weights():
    labels = np.array([[-1, 0, 1], [-1, 0, 0]])
    ranked = rankings(np.array([[3.0, 2.0, np.inf], [1.0, 1.0, np.inf]]), labels)
    each = [ranking.average_precision(np.ones((2, 1), dtype=np.int64))[0] for ranking in ranked]
    assert np.isnan(each[:2]).all() and each[2] == 0.5  # infinite scores are as equal as others


def test_precision_and_recall_of_a_small_case():
    precision, recall = precision_recall(np.array([3.0, 2, 2, 1, 9]), np.array([1, 0, 1, 1, -1]))
    assert precision.tolist() == [1, 2 / 3, 3 / 4] and recall.tolist() == [1 / 3, 2 / 3, 1]


def test_mean_per_class_is_the_mean_over_classes_that_have_images():
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.choice([0, 1, 3], size=200, p=[0.8, 0.15, 0.05]))
    scores = torch.from_numpy(random.normal(size=(200, 5)))
    scores[:, 0] += 1
    rates = [(scores.argmax(1) == c)[labels == c].double().mean().item() for c in (0, 1, 3)]
    assert mean_per_class(scores, labels) == pytest.approx(100 * np.mean(rates))
    with pytest.warns(UserWarning):  # it sees classes that no image has
        balanced = balanced_accuracy_score(labels, scores.argmax(1))
    assert mean_per_class(scores, labels) == pytest.approx(100 * balanced)
    assert mean_per_class(scores, labels) != pytest.approx(accuracy(scores, labels))


def test_accuracy_is_also_where_it_was():
    scores, labels = torch.eye(3), torch.tensor([0, 2, 2])
    assert knn.accuracy(scores, labels) == accuracy(scores, labels) == pytest.approx(200 / 3)
    assert accuracy(scores, labels, 5) == 100
