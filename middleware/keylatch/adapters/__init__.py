"""What the middlewares of all frameworks share."""
