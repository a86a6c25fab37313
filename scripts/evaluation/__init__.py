"""What compression costs a model's answers: contexts, questions, engines, figures."""
