"""What --dataset hf:... may say."""

import pytest

from moco_eval.config.data_name import in_path, layout_of, with_name
from moco_eval.config.hf_name import HfName, parse
from moco_eval.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:/data/pets", HfName("/data/pets")),
        ("hf:/data/pets:small", HfName("/data/pets", "small")),
        ("hf:uoft-cs/cifar100,label=coarse_label", HfName("uoft-cs/cifar100", label="coarse_label")),
        ("hf:a/b:c,image=img,train=all,test=dev", HfName("a/b", "c", image="img", train="all", test="dev")),
    ],
)
def test_place_configuration_and_choices(text, expected):
    assert parse(text) == expected and parse(expected.with_choice()) == expected


def test_a_folder_whose_name_looks_like_choices(in_tmp):
    (in_tmp / "set:2,label=x").mkdir()
    assert parse("hf:set:2,label=x").place == "set:2,label=x"
    assert parse("hf:set:2,label=x,label=y") == HfName("set:2,label=x", label="y")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf", "needs a place behind it"),
        ("hf:", "needs a place behind it"),
        ("hf:pets,lable=x", "no key 'lable'. Did you mean 'label'?"),
        ("hf:pets,label=x,label=y", "label needs one value"),
        ("hf:pets,label=", "label needs one value"),
    ],
)
def test_what_is_no_name(text, words):
    with pytest.raises(InputError, match="--dataset hf") as error:
        parse(text)
    assert words in str(error.value)


def test_what_it_is_called_tells_no_folder(in_tmp):
    assert parse("hf:/data/of/me/pets").called == "hf:pets"
    assert parse("hf:pets/all.parquet").called == "hf:pets_all.parquet"  # of the hub, where no such file is
    (in_tmp / "pets").mkdir()
    (in_tmp / "pets/all.parquet").touch()
    assert parse("hf:pets/all.parquet").called == "hf:all"
    assert parse("hf:uoft-cs/cifar100,label=coarse_label").called == "hf:uoft-cs_cifar100-coarse_label"
    assert parse(with_name("hf:uoft-cs/cifar100,label=fine_label", "my set")).called == "hf:my_set"
    assert layout_of("hf:pets") == "hf" and in_path("hf:pets", "abcdef0") == "hf-pets-abcdef"
