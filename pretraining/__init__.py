"""Momentum Contrast pretraining: moco.py is the idea, views.py what the network sees, train.py the loop."""
