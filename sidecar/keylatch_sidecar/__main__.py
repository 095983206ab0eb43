"""`python -m keylatch_sidecar` is `keylatch`."""

from keylatch_sidecar.cli.program import main

if __name__ == "__main__":
    main()
