"""How close is streamed training to what the device, the host and the link allow?"""
