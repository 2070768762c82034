"""The theory: windows, collections, the fold, the posterior and its derivative."""
