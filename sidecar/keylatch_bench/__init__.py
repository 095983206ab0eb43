"""The load tool `keylatch bench`: measures the cost of authentication and the time of revocations.

`benchmark` runs a `plan`: it creates `temporary_keys` with `key_factories`, drives `scenarios` with
the `load_generator` against the `system_under_test`, and revokes keys with the `revocation_probe`.
The `results` are written by `report`, `plots` and `html_report`; `comparison` compares two runs.

The law of this package: the number of requests and the duration are bounded before the start,
requests go only to the target that the operator named, and every key that was created is revoked.
Wrong answers and errors are counted and shown; a scenario that cannot be measured is reported with
what is missing. The sidecar imports this package only in `keylatch_sidecar.cli.bench`.
"""
