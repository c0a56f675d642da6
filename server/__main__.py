"""`python -m server` is `venturi serve`."""

import os

if __name__ == "__main__":
    # Read by gRPC's core when it is imported. The service starts child processes, none of
    # which uses gRPC after the fork; without this each start prints a warning.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # The core's own messages repeat what the server reports in words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from server.cli import main

    main()
