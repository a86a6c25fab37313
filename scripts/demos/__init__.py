"""Behind ``demo.py``: a document that people can read, or words of the tiny model."""
