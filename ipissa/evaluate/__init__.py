"""Measure adapters."""
