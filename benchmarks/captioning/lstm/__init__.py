"""Show, attend and tell: the LSTM with soft attention that captioned before transformers did."""
