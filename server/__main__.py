"""`python -m server` is `venturi serve`."""

from server.cli import serve

if __name__ == "__main__":
    serve()
