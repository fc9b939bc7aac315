"""What streaming from disk costs on a CPU, beside memory and beside accelerate's disk offload."""
