"""Finished runs in, what a person wants to know of them out: findings, comparisons, pictures, a model card. No torch here."""
