"""Head pages: where they lie, how they are read, written and attended to."""
