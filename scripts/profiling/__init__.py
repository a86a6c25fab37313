"""Head profiles: made offline from a model, or from head scores that others published."""
