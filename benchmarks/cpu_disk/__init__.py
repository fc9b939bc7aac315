"""What does streaming from disk cost on a CPU, beside memory and beside accelerate's offload?"""
