"""Tests of models, tokenizers and tensor parallelism."""
