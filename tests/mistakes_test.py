"""Which mistakes, and which pictures of them, a report shows."""

import numpy as np

from mfm_jax.evaluation import gallery, mistakes


def test_pairs_by_how_many_images_were_confused():
    labels, answers = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 1, 1, 0, 0, 1])
    assert mistakes.confused(labels, answers) == [(0, 1, 2), (1, 0, 1), (2, 0, 1), (2, 1, 1)]
    weighted = mistakes.confused(np.array([0, 1, 2]), np.array([0, 2, 1]), np.array([9, 3, 4]))
    assert weighted == [(2, 1, 4), (1, 2, 3)]
    assert mistakes.confused(labels, labels) == []


def test_worst_is_not_who_has_two_images_by_chance():
    right, images = np.array([0, 2, 90, 0]), np.array([2, 40, 100, 0])
    assert mistakes.worst(right, images) == [1, 0, 2]  # class 3 was not tested


def test_the_pictures_are_of_rare_classes_and_of_the_worst_mistakes():
    counts = np.array([500, 400, 5])
    labels = np.array([0] * 6 + [1] * 6 + [2] * 4)
    answers = np.array([0, 0, 0, 0, 1, 1] + [1] * 5 + [0] + [2, 2, 2, 0])
    probabilities = np.full((16, 3), 0.1)
    probabilities[np.arange(16), answers] = 0.5 + 0.01 * np.arange(16)
    chosen = gallery.choose(probabilities, labels, counts).tolist()
    assert chosen[:3] == [14, 13, 15]  # the rare class: two right, the most confident first, then the wrong one
    assert sorted(chosen[3:]) == [5, 11]  # 0 taken for 1, the more confident of two, and 1 for 0
    assert len(gallery.choose(np.eye(3)[labels], labels, counts)) == 2  # nothing is wrong
