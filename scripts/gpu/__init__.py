"""Behind the GPU suite: cases, checks and times of the kernels."""
