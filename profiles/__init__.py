"""Head-budget profiles shipped with the package, as JSON; see README.md for the fields."""
