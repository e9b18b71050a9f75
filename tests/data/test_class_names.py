from moco_eval.data.class_names import readable


def test_wordnet_ids_become_words_and_other_names_stay():
    assert readable(("n01440764", "cat", "n99999999")) == ("tench", "cat", "n99999999")


def test_two_classes_of_one_word_stay_apart():
    """The bird and the machine."""
    assert readable(("n02012849", "n03126707")) == ("crane n02012849", "crane n03126707")
