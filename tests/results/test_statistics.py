"""Spread over trials and over test images: against naive resampling, closed forms and simulation."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import balanced_accuracy_score

from moco_eval.results import statistics
from moco_eval.results.metrics import accuracy
from moco_eval.results.statistics import Answers, draw_weights, intervals, mean_and_std, resampled, summarise, value


def test_mean_and_sample_deviation():
    assert mean_and_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert mean_and_std([4.0]) == (4.0, None)
    assert summarise([{"top1": 1.0}, {"top1": 3.0}]) == ({"top1": 2.0}, {"top1": pytest.approx(2**0.5)})


def top1_interval(correct):
    """From whether each image was classified rightly, (trials, images): class 0 where it was, 1 where not."""
    return intervals(["top1"], np.zeros(correct.shape[1], int), predictions=np.where(correct, 0, 1))["top1"]


def test_interval_is_the_bootstrap_over_images_of_the_mean_over_trials():
    generator = np.random.default_rng(1)
    correct = generator.random((3, 400)) < np.linspace(0.2, 1, 400)
    naive = [100 * correct[:, generator.integers(0, 400, 400)].mean() for _ in range(4000)]
    assert top1_interval(correct) == pytest.approx(np.percentile(naive, [2.5, 97.5]), abs=0.4)
    low, high = top1_interval(correct)
    assert low < 100 * correct.mean() < high


def test_all_right_leaves_no_doubt_that_images_could_tell():
    assert top1_interval(np.ones((2, 50), dtype=bool)) == (100, 100)


# Invented answers of a given skill


def single_label(generator, images=240, classes=12, trials=3) -> Answers:
    """Unequal classes of unequal difficulty; scores without ties."""
    labels = np.sort(generator.integers(0, classes, images) * generator.integers(0, 2, images))
    scores = generator.normal(size=(trials, images, classes)).astype(np.float32)
    scores[:, np.arange(images), labels] += 1 + labels / classes
    return Answers(labels, scores.argmax(axis=2), scores)


def several_labels(generator, images=150, classes=4, trials=1, levels=None) -> Answers:
    """Labels 1, 0 and -1; with `levels` the scores are whole numbers, with many ties."""
    labels = generator.choice([1, 0, -1], (images, classes), p=[0.2, 0.7, 0.1]).astype(np.int8)
    scores = generator.normal(size=(trials, images, classes)) + (labels == 1)
    return Answers(labels, scores=np.round(scores * levels) if levels else scores)


def naive_ap(scores, labels) -> float:
    """Area under the raised precision-recall curve, threshold by threshold as the definition says."""
    known = labels >= 0
    scores, positive = scores[known], labels[known] == 1
    thresholds = sorted(set(scores), reverse=True)
    recall = [(positive & (scores >= t)).sum() / positive.sum() for t in thresholds]
    precision = [positive[scores >= t].mean() for t in thresholds]
    area, before = 0.0, 0.0
    for i in range(len(thresholds)):
        area += (recall[i] - before) * max(precision[i:])
        before = recall[i]
    return area


def naive_metric(name, answers, rows=slice(None)) -> float:
    """The metric on some rows of the images, trial by trial."""
    labels, found = answers.labels[rows], []
    for index in range(len(answers.scores)):
        scores = answers.scores[index][rows]
        if name == "mAP":
            columns = [c for c in range(labels.shape[1]) if (labels[:, c] == 1).any()]
            found.append(100 * np.mean([naive_ap(scores[:, c], labels[:, c]) for c in columns]))
        elif name == "mean_per_class":
            right = scores.argmax(axis=1) == labels
            found.append(100 * np.mean([right[labels == c].mean() for c in np.unique(labels)]))
        else:
            found.append(accuracy(torch.from_numpy(scores), torch.from_numpy(labels), 5 if name == "top5" else 1))
    return float(np.mean(found))


@pytest.mark.parametrize("name", ["top1", "top5", "mean_per_class", "mAP"])
def test_every_metric_is_its_definition(name):
    generator = np.random.default_rng(2)
    answers = several_labels(generator, trials=2) if name == "mAP" else single_label(generator)
    assert statistics.value(name, answers) == pytest.approx(naive_metric(name, answers))
    if name == "mean_per_class":
        theirs = [balanced_accuracy_score(answers.labels, one) for one in answers.predictions]
        assert statistics.value(name, answers) == pytest.approx(100 * np.mean(theirs))


@pytest.mark.parametrize("name", ["top1", "top5", "mean_per_class"])
def test_every_interval_is_that_of_a_naive_resampling_loop(name):
    generator = np.random.default_rng(3)
    answers = single_label(generator)
    naive = [naive_metric(name, answers, generator.integers(0, 240, 240)) for _ in range(600)]
    found = statistics.resampled(name, answers, resamples=10_000)
    assert found.mean() == pytest.approx(np.mean(naive), abs=4 * np.std(naive) / 600**0.5)
    assert found.std() == pytest.approx(np.std(naive), rel=4 / 1200**0.5)  # of a deviation: sd / sqrt(2 n)
    given = intervals([name], answers.labels, predictions=answers.predictions, scores=answers.scores)[name]
    assert given == pytest.approx(np.percentile(naive, [2.5, 97.5]), abs=0.4 * np.std(naive))


@pytest.mark.parametrize("levels", [None, 2])
def test_average_precision_is_to_the_bit_that_of_each_resample(levels):
    """The weights say which images were drawn, so a loop can redo every resample, ties and all."""
    answers = several_labels(np.random.default_rng(4), trials=2, levels=levels)
    (weights,) = statistics.draw_weights(150, 40, seed=7)
    assert weights.shape == (150, 40) and (weights.sum(axis=0) == 150).all()
    naive = [naive_metric("mAP", answers, np.repeat(np.arange(150), column)) for column in weights.T]
    assert statistics.resampled("mAP", answers, resamples=40, seed=7) == pytest.approx(naive, abs=1e-9)
    assert intervals(["mAP"], answers.labels, scores=answers.scores, resamples=40, seed=7)["mAP"] == pytest.approx(
        np.percentile(naive, [2.5, 97.5])
    )


def test_weights_are_draws_with_replacement():
    weights = np.concatenate([*statistics.draw_weights(20, 20_000)], axis=1)
    assert weights.mean() == 1
    assert weights[0].var() == pytest.approx(1 - 1 / 20, abs=0.04)  # multinomial: n p (1 - p)
    assert np.cov(weights[0], weights[1])[0, 1] == pytest.approx(-1 / 20, abs=0.03)  # and -n p p


def test_blocks_change_nothing_but_memory(monkeypatch):
    answers = several_labels(np.random.default_rng(5))
    whole = statistics.resampled("mAP", answers, resamples=30)
    monkeypatch.setattr(statistics, "BLOCK", 150 * 7)
    assert [block.shape[1] for block in statistics.draw_weights(150, 30)] == [7, 7, 7, 7, 2]
    assert np.array_equal(statistics.resampled("mAP", answers, resamples=30), whole)


def test_a_class_that_no_resample_holds_is_left_out_of_it():
    """One image of class 1, always wrong: the mean is 50 with it and 100 without, which 1 in e resamples are."""
    answers = Answers(np.array([0] * 99 + [1]), np.zeros((1, 100), dtype=int))
    found = statistics.resampled("mean_per_class", answers, resamples=5000)
    assert set(found) == {50.0, 100.0}
    assert (found == 100).mean() == pytest.approx(0.99**100, abs=0.03)
    labels = np.zeros((100, 2), dtype=np.int8)
    labels[:50, 0], labels[99, 1] = 1, 1
    scores = -np.arange(100.0)[None, :, None].repeat(2, axis=2)  # class 1's only image comes last
    found = statistics.resampled("mAP", Answers(labels, scores=scores), resamples=5000)
    assert (found == 100).mean() == pytest.approx(0.99**100, abs=0.03)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """500 test sets from a known population; 95 % intervals miss about one in twenty."""
    generator = np.random.default_rng(6)
    skill = np.array([0.9, 0.7, 0.5])
    inside = {"top1": 0, "mean_per_class": 0}
    for seed in range(500):
        labels = generator.choice(3, 300, p=[0.6, 0.3, 0.1])
        predictions = np.where(generator.random(300) < skill[labels], labels, (labels + 1) % 3)[None]
        found = intervals(inside, labels, predictions=predictions, resamples=300, seed=seed)
        for name, truth in (("top1", 100 * skill @ [0.6, 0.3, 0.1]), ("mean_per_class", 100 * skill.mean())):
            inside[name] += found[name][0] <= truth <= found[name][1]
    for name, count in inside.items():
        assert count / 500 == pytest.approx(0.95, abs=0.029), name  # three standard errors


# Pairs


def pair(generator, images, only_a, only_b) -> tuple[Answers, Answers]:
    """Two runs of one trial, each alone right on a share of the images, both right on a half of the rest."""
    draw = generator.random(images)
    labels = np.zeros(images, dtype=int)
    both = generator.random(images) < 0.5
    a = (draw < only_a) | ((draw > only_a + only_b) & both)
    b = ((draw >= only_a) & (draw < only_a + only_b)) | ((draw > only_a + only_b) & both)
    return Answers(labels, 1 - a[None].astype(int)), Answers(labels, 1 - b[None].astype(int))


def test_equal_runs_differ_by_nothing():
    generator = np.random.default_rng(8)
    for name, answers in (("top1", single_label(generator)), ("mAP", several_labels(generator, trials=2))):
        found = statistics.paired(name, answers, answers, 500)
        assert (found.interval, found.p, found.standard_error, found.detectable) == ((0, 0), 1, 0, 0)


def test_standard_error_is_that_of_the_discordant_counts():
    """sqrt(b + c - (b - c)^2 / n) / n; and the interval is normal at this size."""
    a, b = pair(np.random.default_rng(9), 2000, 0.06, 0.1)
    only_a, only_b, _ = statistics.mcnemar(a.right() == 1, b.right() == 1)
    error = 100 * (only_a + only_b - (only_a - only_b) ** 2 / 2000) ** 0.5 / 2000
    found = statistics.paired("top1", a, b, 20_000)
    assert found.standard_error == pytest.approx(error, rel=0.02)
    difference = 100 * (only_b - only_a) / 2000
    assert found.interval == pytest.approx((difference - 1.96 * error, difference + 1.96 * error), abs=0.1 * error)
    assert found.detectable == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) * found.standard_error, rel=1e-4)


@pytest.mark.parametrize("name", ["mean_per_class", "mAP"])
def test_a_paired_difference_is_on_the_same_resamples(name):
    generator = np.random.default_rng(10)
    if name == "mAP":
        a = several_labels(generator)
        b = Answers(a.labels, scores=a.scores + generator.normal(size=a.scores.shape) / 4)
        (weights,) = statistics.draw_weights(150, 60)
        rows = [np.repeat(np.arange(150), column) for column in weights.T]
        naive = [naive_metric(name, b, some) - naive_metric(name, a, some) for some in rows]
        assert statistics.resampled(name, b, a, resamples=60) == pytest.approx(naive, abs=1e-9)
        return
    a, other = single_label(generator), single_label(generator, trials=1)
    b = Answers(a.labels, scores=(a.scores + 0.3 * other.scores).astype(np.float32))
    rows = [generator.integers(0, 240, 240) for _ in range(600)]
    naive = [naive_metric(name, b, some) - naive_metric(name, a, some) for some in rows]
    found = statistics.resampled(name, b, a, resamples=10_000)
    assert found.mean() == pytest.approx(np.mean(naive), abs=4 * np.std(naive) / 600**0.5)
    assert found.std() == pytest.approx(np.std(naive), rel=4 / 1200**0.5)


def test_swapping_the_runs_turns_the_sign_and_nothing_else():
    a, b = pair(np.random.default_rng(11), 400, 0.05, 0.09)
    there, back = statistics.paired("top1", a, b, 20_000), statistics.paired("top1", b, a, 20_000)
    assert there.interval == pytest.approx([-bound for bound in reversed(back.interval)], abs=0.3)
    assert there.p == pytest.approx(back.p, abs=0.02)


def test_p_agrees_with_mcnemar_and_is_never_zero():
    a, b = pair(np.random.default_rng(12), 1000, 0.05, 0.07)
    only_a, only_b, exact = statistics.mcnemar(a.right() == 1, b.right() == 1)
    assert (only_a, only_b) == (int((a.right() > b.right()).sum()), int((b.right() > a.right()).sum()))
    assert statistics.paired("top1", a, b, 20_000).p == pytest.approx(exact, abs=0.05)
    assert statistics.mcnemar(np.ones(5, dtype=bool), np.ones(5, dtype=bool)) == (0, 0, 1.0)
    # one side only: 2 / 2^6
    assert statistics.mcnemar(np.ones(6, dtype=bool), np.zeros(6, dtype=bool)) == (6, 0, pytest.approx(0.03125))
    far = pair(np.random.default_rng(13), 1000, 0.0, 0.3)
    assert statistics.paired("top1", *far, 999).p == pytest.approx(2 / 1000)


def test_fifths_that_cancel_count_as_no_difference():
    """0.6 - 0.4 and 0.2 - 0.4 do not add to 0 in floating point."""
    answers = [np.array([[0] * right + [1] * (5 - right) for right in each]).T for each in ((2, 2), (3, 1))]
    labels = np.zeros(2, dtype=int)
    found = statistics.paired("top1", *(Answers(labels, each) for each in answers), 2000)
    assert found.p == 1


@pytest.mark.parametrize("true", ["none", "detectable"])
def test_the_detectable_difference_is_found_in_four_of_five_samples_and_nothing_in_one_of_twenty(true):
    """600 paired samples whose discordance is known, tested one by one."""
    generator, images, discordant = np.random.default_rng(14), 1500, 0.12
    difference = 0.0 if true == "none" else 2.8016 * (discordant / images) ** 0.5
    difference = difference * (1 - difference**2 / discordant) ** 0.5  # the variance lacks the squared mean
    found = errors = 0.0
    for seed in range(600):
        a, b = pair(generator, images, (discordant - difference) / 2, (discordant + difference) / 2)
        one = statistics.paired("top1", a, b, 400, seed)
        found, errors = found + (one.p < 0.05), errors + one.detectable
    if true == "none":
        assert found / 600 == pytest.approx(0.05, abs=0.027)  # three standard errors
    else:
        assert found / 600 == pytest.approx(0.8, abs=0.049)
        assert errors / 600 == pytest.approx(100 * difference, rel=0.02)


def test_resampled_overlap_is_that_of_the_sums_over_the_drawn_images():
    """Against a loop over resamples, images and classes; the difference of two runs on the same resamples."""
    random = np.random.default_rng(0)
    matrices = random.integers(0, 9, (2, 6, 4, 4)) * (random.random((2, 6, 4, 1)) < 0.7)
    pixels = np.stack([np.stack([np.diag(m), m.sum(axis=0), m.sum(axis=1)]) for m in matrices.reshape(-1, 4, 4)])
    a, b = (Answers.of_pixels(part) for part in pixels.reshape(2, 1, 6, 3, 4))
    for run in (a, b):
        for metric in ("mIoU", "pixel_accuracy"):
            assert value(metric, run) == pytest.approx(_naive_overlap(metric, run.pixels[0].sum(axis=0)))
    (weights,) = draw_weights(6, 40, 0)
    drawn = [np.repeat(np.arange(6), column) for column in weights.T]
    naive = [[_naive_overlap("mIoU", run.pixels[0][images].sum(axis=0)) for images in drawn] for run in (a, b)]
    assert resampled("mIoU", b, resamples=40) == pytest.approx(naive[1])
    assert resampled("mIoU", b, a, resamples=40) == pytest.approx(np.subtract(naive[1], naive[0]))


def _naive_overlap(metric, counts):
    shared, said, true = counts.tolist()
    if metric == "pixel_accuracy":
        return 100 * sum(shared) / sum(true)
    unions = [(one, p + t - one) for one, p, t in zip(shared, said, true) if p + t - one]
    return 100 * sum(one / union for one, union in unions) / len(unions)
