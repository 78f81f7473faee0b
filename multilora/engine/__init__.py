"""The engine: requests in, one step at a time, outputs back; and what it is built from."""
