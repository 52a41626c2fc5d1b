"""What benchmarks do before they time a device that had nothing to do."""

# Seconds of requests that do not count. An idle H100 is at 345 of its 1,980 MHz; prompts of 128 tokens of an
# 8B shape took 9.2 to 9.5 ms as the first ones after a pause, 5.0 right after a load.
WAKE_S = 0.5
