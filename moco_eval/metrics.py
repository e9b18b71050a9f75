"""What a classification is measured by, in percent."""

import torch


def accuracy(scores: torch.Tensor, labels: torch.Tensor, top: int = 1) -> float:
    """Top-k accuracy in percent; 100 where there are no more classes than k."""
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()
