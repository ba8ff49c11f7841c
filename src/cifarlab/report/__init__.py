"""Finished runs in, what a person wants to know of them out: written findings, comparisons, pictures, a model card. No torch here."""
