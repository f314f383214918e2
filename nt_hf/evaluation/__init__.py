"""Perplexity, diversity and zero-shot tasks of a trained model, and comparisons of results."""
