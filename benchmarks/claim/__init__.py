"""What the method promises: device memory, speed beside it, and what the freed memory buys."""
