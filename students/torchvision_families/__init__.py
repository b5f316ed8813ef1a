"""Families around torchvision's own detectors: its models, losses and post-processing, behind our contract."""
