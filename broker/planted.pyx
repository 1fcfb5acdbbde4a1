"""Turns planted bugs on and off. What they are is in planted.pxd."""

planted_bug = 0


def plant(int which) -> None:
    """Make one mistake from now on, in this process; `Planted.PLANT_NOTHING` makes none."""
    global planted_bug
    planted_bug = which


def planted_now() -> int:
    """The mistake that is being made."""
    return planted_bug
