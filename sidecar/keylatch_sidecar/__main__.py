"""`python -m keylatch_sidecar` is `keylatch`."""

from keylatch_sidecar.cli.program import main

main()
