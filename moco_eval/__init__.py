"""moco-eval: how well does a self-supervised encoder transfer, under the papers' own protocols?"""

__version__ = "0.1.0"
