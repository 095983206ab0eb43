"""Code that the middlewares of all frameworks share."""
