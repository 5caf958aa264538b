"""One file a revision, named by its revision id."""
