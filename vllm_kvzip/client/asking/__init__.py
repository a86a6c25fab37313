"""One question: parts are asked, claims are quoted and checked, and partial answers are merged."""
