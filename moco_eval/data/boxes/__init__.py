"""Sets of images with boxes, masks and keypoints."""
