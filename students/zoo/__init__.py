"""Detectors of libreyolo (the extra `[zoo]`): its networks and losses behind adapters of ours."""
