"""The real service under one virtual clock and one seed, against a simulated machine that fails in every known way."""
