"""Semantic segmentation: trained on masks from an encoder, judged by mIoU."""
