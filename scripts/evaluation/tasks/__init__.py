"""Contexts and questions about them: running text, and words of the tiny test models."""
