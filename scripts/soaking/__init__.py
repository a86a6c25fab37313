"""Behind ``soak.py``: a random load, and what must hold after every step."""
