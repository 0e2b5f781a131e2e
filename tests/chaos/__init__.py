"""Chaos: commands are killed, disks fill, bits rot, servers go away; the same command then mends it."""
