"""Suppression: what a model loses when its memory is silenced or shuffled."""
