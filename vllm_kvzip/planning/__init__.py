"""What is compressed and into how many blocks; follows from lengths and options alone."""
