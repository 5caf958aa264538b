"""One patch a file, as its `PATCH`. Files that begin with an underscore are what patches share."""
