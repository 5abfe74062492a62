"""What serving many at once is worth, a scenario a file; bench_serving.py runs them."""
