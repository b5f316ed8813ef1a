"""What is done to a trained detector's numbers, its shape left alone: fewer bits, or fewer distinct values."""
