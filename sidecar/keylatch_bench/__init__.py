"""`keylatch bench`: what authentication costs those who run it, and when a revoke is true.

The law of this package: load is bounded in count and time before it starts, goes only where the
operator pointed, and every key that was made is taken back. What was refused or went wrong is
counted and shown; what could not be measured says what to add. Nothing here is imported by the
sidecar, and what the extra `keylatch[bench]` brings only when results are written.
"""
