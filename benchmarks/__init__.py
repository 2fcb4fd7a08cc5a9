"""Numbers against PEFT and against the floor, measured side by side in one run: `python -m benchmarks`."""
