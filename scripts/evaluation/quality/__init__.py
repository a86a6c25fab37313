"""Contexts and questions through engines, and what the answers are worth."""
