"""What differs between a CPU and a GPU."""
