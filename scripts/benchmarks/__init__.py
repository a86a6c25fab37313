"""Behind the benchmark and comparison scripts."""
