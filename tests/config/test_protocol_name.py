"""A protocol's name is taken apart in one place."""

import pytest

from moco_eval.config.protocol_name import ProtocolName, kind_and_name
from moco_eval.errors import InputError


@pytest.mark.parametrize("text", ["knn/instdisc@1", "linear/moco-lincls@10", "detect/voc-r50-c4-24k@123"])
def test_a_name_is_its_parts_put_together(text):
    name = ProtocolName.parse(text)
    assert str(name) == text
    assert text.startswith(f"{name.kind}/{name.name}@")


def test_versions_are_numbers():
    assert ProtocolName.parse("knn/instdisc@10").version == 10
    assert ProtocolName.parse("knn/instdisc@9") < ProtocolName.parse("knn/instdisc@10")


@pytest.mark.parametrize(
    "text", ["", "knn", "knn/instdisc", "knn/instdisc@", "knn/instdisc@0", "knn@1", "knn/a/b@1", "knn/instdisc@1 "]
)
def test_another_form_is_refused_with_the_value(text):
    with pytest.raises(InputError, match="not a protocol; the form is kind/name@version"):
        ProtocolName.parse(text)


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("linear/moco-lincls@10", "linear", "moco-lincls"),
        ("detect/voc-mine", "detect", "voc-mine"),
        ("odd", "odd", ""),
        ("", "", ""),
        ("a/b/c@1", "a", "b/c"),
    ],
)
def test_what_strangers_wrote_has_the_parts_that_it_has(text, kind, name):
    assert kind_and_name(text) == (kind, name)
