"""Multi-head models with sparse masks: what a checkpoint carries."""
