"""Behind ``eval_documents.py``: documents with hidden facts, and how answers are judged."""
