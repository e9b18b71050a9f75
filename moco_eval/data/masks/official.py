"""The published data sets with masks, by their names."""

from moco_eval.data.masks.ade20k import read_ade20k
from moco_eval.data.masks.cityscapes import read_cityscapes
from moco_eval.data.masks.coco_stuff import read_coco_stuff
from moco_eval.data.masks.voc import read_voc2012, read_voc_aug

OFFICIAL = {
    "voc-aug": read_voc_aug,
    "voc2012": read_voc2012,
    "cityscapes": read_cityscapes,
    "ade20k": read_ade20k,
    "coco-stuff": read_coco_stuff,
}
