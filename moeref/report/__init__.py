"""Verdicts as text, JSON and, later, HTML."""
