"""Uses: noted on the request's path, and on their way to the store beside it."""
