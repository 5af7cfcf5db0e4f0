"""Studies that measure other things than the accuracy of one training run: time and memory, serving, and fusion."""
