"""What flows through a network: the meaning of every value's dimensions, and what each value is made from."""
