"""`python -m keylatch_sidecar` is `keylatch`."""

from keylatch_sidecar.cli import main

main()
