"""What is told of requests beside metrics: log lines and traces. A prompt only if asked, a key never."""
