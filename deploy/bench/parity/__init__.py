"""Every model family and checkpoint format against `transformers`, on small random models."""
