"""A progress bar that costs no training its results."""

import sys
from contextlib import suppress

from tqdm import tqdm


class ProgressBar(tqdm):
    """A bar on stderr that is gone, and nothing more, where stderr is missing, closed, or a broken pipe.

    Parameters
    ----------
    total : int
        How many `update` there will be.
    unit, name : str
        Of one update, and of the whole.
    shown : bool
        Whether there is a bar at all.
    """

    def __init__(self, total, unit, name, shown):
        super().__init__(total=total, unit=unit, desc=name, disable=not shown or sys.stderr is None)

    def display(self, *arguments, **named):
        """Draw the bar, or do without it from now on."""
        try:
            return super().display(*arguments, **named)
        except (OSError, ValueError):  # a ValueError: the file is closed, or cannot encode the bar
            self.disable = True
            return False

    def close(self):
        """Draw the bar for the last time."""
        with suppress(OSError, ValueError):
            super().close()
