"""Requests to tokens: scheduling, sampling, speculative decoding, text."""
