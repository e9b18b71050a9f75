"""Detection: an encoder fine-tuned inside Faster R-CNN and judged by average precision."""
