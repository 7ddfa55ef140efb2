"""Training and comparing networks on small data: the loop, the data, the demo."""
