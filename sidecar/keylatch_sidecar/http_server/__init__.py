"""uvicorn's HTTP protocol with limits on size, time and number of connections."""
